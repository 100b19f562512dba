"""Index the train, dev and test splits that a config names."""

from __future__ import annotations

from dataclasses import replace

from omni.config import Config
from omni.corpus.index import Index, notes_of
from omni.corpus.labels import label_counts
from omni.corpus.mixture import build_mixture
from omni.corpus.tasks import check_rules, draw_prompts, expand_tasks, task_rules
from omni.corpus.text import TextPolicy, apply_policy
from omni.errors import ConfigError, ManifestError
from omni.storage.flat_folder import open_folder
from omni.storage.http import DownloadLimits
from omni.storage.path import join
from omni.storage.uri import reason_of, redact, report_storage_errors


def build_indexes(config: Config) -> dict[str, Index]:
    """Index each split that the config names, with the utterances of its tasks.

    Raises ConfigError.
    """
    rules = task_rules(config.data.model_dump())
    check_rules(rules.values())
    try:
        if config.cache is not None:
            open_folder(join(config.cache, "encoder"))
    except (OSError, ValueError, NotImplementedError) as error:
        reason = redact(str(error))
        raise ConfigError(f"data.cache: expected a folder or a URI: {reason}") from None
    if config.cache_dir is not None:  # Measured lengths are kept there.
        try:
            config.cache_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            within = str(config.cache_dir).startswith(str(config.run_dir.parent))
            setting, where = (
                ("run.storage", config.run_dir.parent)
                if within
                else ("data.cache", config.cache_dir)
            )
            raise ConfigError(f"{setting}: {where} cannot be written: {reason_of(error)}") from None
    policy = TextPolicy.of(config.data.model_dump())
    try:
        with report_storage_errors("data"):
            indexes = {
                name: build_mixture(
                    specs,
                    prompt=config.data.prompt,
                    cache_dir=config.cache_dir,
                    allow_absolute=config.data.allow_absolute,
                    duration_tolerance=config.data.duration_tolerance,
                    downloads=DownloadLimits(
                        config.data.download_mb,
                        config.data.download_seconds,
                        config.data.allow_private_hosts,
                    ),
                    keep=config.data.keep,
                )
                for name, specs in (
                    ("train", config.data.train),
                    ("dev", config.data.dev),
                    ("test", config.data.test),
                )
                if specs
            }
    except ManifestError as error:
        raise ConfigError(f"data: {error}") from None
    if config.data.keep:
        found = {name for index in indexes.values() for name in label_counts(index.table["labels"])}
        if absent := [name for name in config.data.keep if name not in found]:
            raise ConfigError(
                f"data.keep: no row has the column {absent[0]!r} (an index folder has the columns "
                "of its `omni index --keep`)"
            )
    seed = config.run.seed
    indexes["train"] = draw_prompts(indexes["train"], rules, seed)
    try:
        indexes = {name: apply_policy(index, policy) for name, index in indexes.items()}
    except ValueError as error:
        raise ConfigError(f"data.language_tag: {error}") from None
    indexes = {
        name: expand_tasks(
            index, rules, f"data.{name}", seed=seed if name == "train" else None, form=policy.form
        )
        for name, index in indexes.items()
    }
    indexes = {
        name: replace(index, notes=[f"data.{name}: {note}" for note in notes_of(index)])
        for name, index in indexes.items()
    }
    if without := [name for name, index in indexes.items() if not len(index)]:
        raise ConfigError(f"data.punctuation: no text is left of data.{without[0]}")
    return indexes
