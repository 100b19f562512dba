"""Index the train, dev and test splits that a config names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from omni.config import Config, SourceConfig
from omni.corpus.index import Index, notes_of
from omni.corpus.labels import label_counts
from omni.corpus.mixture import build_mixture
from omni.corpus.parts import (
    PartedCorpus,
    indexed_rows,
    is_index_folder,
    open_parts,
    parts_of_index,
)
from omni.corpus.tasks import check_rules, draw_prompts, expand_tasks, task_rules
from omni.corpus.text import TextPolicy, apply_policy
from omni.errors import ConfigError, ManifestError
from omni.storage.flat_folder import open_folder
from omni.storage.http import DownloadLimits
from omni.storage.path import join
from omni.storage.uri import reason_of, redact, report_storage_errors


def build_indexes(config: Config) -> dict[str, Index]:
    """Index each split that the config names, of any size, with the utterances of its tasks.

    Raises ConfigError.
    """
    _open_cache(config)
    with naming_settings():
        indexes = {name: _build(specs, config) for name, specs in _specs(config).items()}
    return _with_text(indexes, config)


def open_corpora(config: Config) -> tuple[dict[str, Index], PartedCorpus | None]:
    """Index each split that the config names; open training data larger than a window as parts.

    Returns the indexes, and those parts; the indexes are then without `train`. Raises ConfigError.
    """
    _open_cache(config)
    specs, window = _specs(config), config.data.window_utterances
    train, parts = specs["train"], None
    with naming_settings():
        if indexed_rows(train) > window:
            others = {
                number: _build([source], config)
                for number, source in enumerate(train)
                if not is_index_folder(source)
            }
            parts = open_parts(train, config, others)
            del specs["train"]
        indexes = {name: _build(sources, config) for name, sources in specs.items()}
    if parts is None and len(indexes["train"]) > window:
        parts = parts_of_index(indexes.pop("train"), train, config)
    if parts is not None:
        _refuse_labels(config)
    return _with_text(indexes, config), parts


def _refuse_labels(config: Config) -> None:
    """Raise ConfigError for tasks that parts of a corpus cannot be prepared for one by one."""
    data = config.data
    asked = [
        f"data.tasks.{name}.{setting}"
        for name, task in data.tasks.items()
        for setting in ("answer", "prompts")
        if getattr(task, setting)
    ]
    if asked:
        raise ConfigError(
            f"{asked[0]}: the training data has more than {data.window_utterances} utterances, and "
            "such tasks need all of them at once; expected a larger data.window_utterances"
        )


def _check_kept(keep: Sequence[str], indexes: dict[str, Index]) -> None:
    """Raise ConfigError for a column of `data.keep` that no row has."""
    found = {name for index in indexes.values() for name in label_counts(index.table["labels"])}
    if absent := [name for name in keep if name not in found]:
        raise ConfigError(
            f"data.keep: no row has the column {absent[0]!r} (an index folder has the columns "
            "of its `omni index --keep`)"
        )


def _specs(config: Config) -> dict[str, Sequence[str | SourceConfig]]:
    """Return the sources of each split that has any."""
    data = config.data
    splits = (("train", data.train), ("dev", data.dev), ("test", data.test))
    return {name: specs for name, specs in splits if specs}


def _build(specs: Sequence[str | SourceConfig], config: Config) -> Index:
    return build_mixture(
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


@contextmanager
def naming_settings() -> Iterator[None]:
    """Turn errors of manifests and of storage into ConfigError."""
    try:
        with report_storage_errors("data"):
            yield
    except ManifestError as error:
        raise ConfigError(f"data: {error}") from None


def _open_cache(config: Config) -> None:
    """Check the feature cache, and create the folder of measured lengths. Raises ConfigError."""
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


def _with_text(indexes: dict[str, Index], config: Config) -> dict[str, Index]:
    """Apply the text policy, add the utterances of tasks, and collect notes."""
    given = config.data.model_dump()
    policy, rules, seed = TextPolicy.of(given), task_rules(given), config.run.seed
    check_rules(rules.values())
    if "train" in indexes:
        _check_kept(config.data.keep, indexes)
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
