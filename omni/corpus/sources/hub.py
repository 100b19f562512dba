"""Read datasets of Hugging Face and ModelScope: from a hub, saved on disk, or in a folder.

Audio stays encoded: it is never decoded by these libraries, and rows stream by.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from omni.corpus.sources.base import Options, Part, Row, explain_missing, fingerprint_of
from omni.corpus.sources.parquet import BATCH, Labels, label_names, rows_of, wanted_columns
from omni.corpus.sources.webdataset import rows_of_tar
from omni.errors import ManifestError, first_line
from omni.model.download import HubError, once_per_node
from omni.storage.path import ObjectPath, StoragePath


def is_saved(folder: Path) -> bool:
    """Check whether `save_to_disk` wrote this folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def split_spec(text: str) -> tuple[str, list[str]]:
    """Split ID_OR_FOLDER[:config][:split] into the name and the words behind it."""
    if Path(os.path.expanduser(text)).is_dir():
        return text, []
    name, *words = text.split(":")
    if not name or len(words) > 2 or not all(words):
        raise ManifestError(f"{text}: expected ID[:config][:split]")
    return name, words


class HubSource:
    """A dataset that `datasets` streams; a part is one of its files.

    name: an ID on the hub with an optional @REVISION, or a folder.
    Raises HubError where the hub does not serve, which may pass.
    """

    def __init__(
        self, spec: str, name: str, words: list[str], options: Options, modelscope: bool = False
    ) -> None:
        self.spec, self.name, self.words, self.options = spec, name, words, options
        self.modelscope = modelscope

    def parts(self) -> list[Part]:
        try:
            folder, revision = _locate(self.name, self.modelscope)
            config, split = _choose(folder, revision, self.words)
            tars = _tars(folder, config, split, revision)
            stream = None if tars else _stream(folder, config, split, revision)
            count = len(tars) if stream is None else stream.num_shards
        except ManifestError as error:
            raise ManifestError(f"{self.spec}: {error}") from None
        except Exception as error:  # Hub clients raise errors of many families.
            what = f"{type(error).__name__}: {first_line(error)}"
            kind = HubError if _may_pass(error) else ManifestError
            raise kind(f"{self.spec}: cannot be opened: {what}") from None
        mark = revision or _folder_mark(Path(folder))
        if labels := _labels(stream and stream.features):
            mark = fingerprint_of(mark, labels)
        return [
            Part(f"{config}-{split}-{n:05}", fingerprint_of(mark, n, count),
                 (config, split, revision, n, count, folder))
            for n in range(count)
        ]  # fmt: skip

    def read(self, part: Part) -> Iterator[Row]:
        config, split, revision, number, count, folder = part.where
        try:
            if self.modelscope and not Path(folder).is_dir():  # on another node than the driver's
                folder, _ = _locate(self.name, self.modelscope)
            if tars := _tars(folder, config, split, revision):
                yield from rows_of_tar(tars[number], self.options)
                return
            stream = _stream(folder, config, split, revision).shard(count, number)
            tables = stream.with_format("arrow").iter(batch_size=BATCH)
            labels = _labels(stream.features)
            home: StoragePath = ObjectPath(f"hf://datasets/{folder}@{revision}")
            if Path(folder).is_dir():
                home = Path(folder).absolute()
            yield from self._rows(tables, home, f"{split}-{number:05}", labels)
        except (ManifestError, OSError):
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {first_line(error)}"
            kind = HubError if _may_pass(error) else ManifestError
            raise kind(f"{self.spec}: {part.name}: cannot be read: {what}") from None

    def _rows(self, tables: Any, home: StoragePath, name: str, labels: Labels) -> Iterator[Row]:
        first = 0
        for table in tables:
            columns = table.column_names
            wanted = wanted_columns(self.options)
            yield from rows_of(
                table.select([c for c in columns if c in wanted]),
                f"{self.spec}: {name}", f"{Path(self.name).name}/{name}", first, home,
                self.options, columns, {**label_names(table.schema.metadata), **labels},
            )  # fmt: skip
            first += len(table)


class SavedSource:
    """A dataset written by `Dataset.save_to_disk`; a part is a range of rows."""

    def __init__(self, spec: str, folder: Path, options: Options, split: str | None = None) -> None:
        self.spec, self.folder, self.options, self.split = spec, folder, options, split

    def parts(self) -> list[Part]:
        dataset, step = self._open(), self.options.rows_per_part
        mark = _folder_mark(self.folder)
        if labels := _labels(dataset.features):
            mark = fingerprint_of(mark, labels)
        return [
            Part(f"rows-{first:09}", fingerprint_of(mark, first, step), (first, first + step))
            for first in range(0, len(dataset), step)
        ]

    def read(self, part: Part) -> Iterator[Row]:
        dataset = self._open()
        columns = dataset.column_names
        wanted = [c for c in columns if c in wanted_columns(self.options)]
        for name in ("audio", "text"):
            if not any(c in wanted for c in [self.options.columns.get(name, ""), *columns]):
                missing = explain_missing(name, columns, self.options)
                raise ManifestError(f"{self.spec}: {missing}")
        labels = _labels(dataset.features)
        dataset = dataset.select_columns(wanted).with_format("arrow")
        for first in range(part.where[0], min(part.where[1], len(dataset)), BATCH):
            table = dataset[first : min(first + BATCH, part.where[1])]
            yield from rows_of(
                table, self.spec, self.folder.name, first, self.folder, self.options, columns,
                labels,
            )  # fmt: skip

    def _open(self) -> Any:
        from datasets import Dataset, load_from_disk

        try:
            found = load_from_disk(str(self.folder))
        except Exception as error:
            what = f"{type(error).__name__}: {first_line(error)}"
            raise ManifestError(f"{self.spec}: not a saved dataset: {what}") from None
        if isinstance(found, Dataset):
            return found
        names = list(found)
        if self.split is None and len(names) == 1:
            return found[names[0]]
        if self.split not in names:
            raise ManifestError(f"{self.spec}: expected one of its splits: {', '.join(names)}")
        return found[self.split]


def _may_pass(error: BaseException | None) -> bool:
    """Check the causes of a client's error for a hub that is unavailable or overloaded."""
    while error is not None:
        # Errors of httpx are recognised by name: importing it is left to the clients.
        family = {base.__name__ for base in type(error).__mro__}
        if isinstance(error, (ConnectionError, TimeoutError, socket.gaierror)):
            return True
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if "TransportError" in family or status in (408, 429) or status >= 500:
            return True
        error = error.__cause__ or error.__context__
    return False


def _locate(name: str, modelscope: bool) -> tuple[str, str | None]:
    """Fix the revision of an ID, so that workers read what the driver saw."""
    if Path(os.path.expanduser(name)).is_dir():
        return str(Path(os.path.expanduser(name)).absolute()), None
    name, _, revision = name.partition("@")
    if modelscope:
        return _download(name, revision or None), None
    return name, _newest(name, revision or None)


@lru_cache(maxsize=8)
def _newest(name: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    return str(HfApi().dataset_info(name, revision=revision).sha)


@lru_cache(maxsize=8)
def _download(name: str, revision: str | None) -> str:
    """ModelScope's client keeps the files that it has, and fetches what is missing."""
    from modelscope import dataset_snapshot_download

    with once_per_node(f"ModelScope dataset {name}@{revision}"):
        return str(dataset_snapshot_download(name, revision=revision))


def _choose(name: str, revision: str | None, words: list[str]) -> tuple[str, str]:
    """Choose config and split. One word may name either; the only one need not be named."""
    from datasets import get_dataset_config_names, get_dataset_split_names

    configs = get_dataset_config_names(name, revision=revision)
    if len(words) == 2 or (words and words[0] in configs):
        config, words = words[0], words[1:]
    elif len(configs) == 1 or "default" in configs:
        config = configs[0] if len(configs) == 1 else "default"
    else:
        raise ManifestError(f"expected one of its configs: {', '.join(configs)}")
    if config not in configs:
        raise ManifestError(f"no config {config!r}: expected one of {', '.join(configs)}")
    # Tars are not asked: their builder opens one, and refuses what it finds beside utterances.
    splits = list(_tar_files(name, config, revision)) or get_dataset_split_names(
        name, config, revision=revision
    )
    if not words and len(splits) > 1:
        raise ManifestError(f"expected one of its splits: {', '.join(splits)}")
    split = words[0] if words else splits[0]
    if split not in splits:
        raise ManifestError(f"no split {split!r}: expected one of {', '.join(splits)}")
    return config, split


@lru_cache(maxsize=8)
def _tar_files(name: str, config: str, revision: str | None) -> dict[str, list[str]]:
    """Return the tars of a WebDataset by split; nothing for a dataset of another kind.

    omni reads them itself: as examples of `datasets`, rows must all have the same members.
    """
    from datasets import load_dataset_builder

    builder = load_dataset_builder(name, config, revision=revision)
    if ".webdataset." not in type(builder).__module__:
        return {}
    files = builder.config.data_files or {}
    return {str(split): [str(file) for file in named] for split, named in files.items()}


def _tars(name: str, config: str, split: str, revision: str | None) -> list[str]:
    return _tar_files(name, config, revision).get(split, [])


def _labels(features: Any) -> Labels:
    """Return the names of ClassLabel columns, from the features of a dataset."""
    return {
        column: list(feature.names)
        for column, feature in (features or {}).items()
        if type(feature).__name__ == "ClassLabel"
    }


@lru_cache(maxsize=4)
def _stream(name: str, config: str, split: str, revision: str | None) -> Any:
    from datasets import load_dataset

    stream = load_dataset(name, config, split=split, revision=revision, streaming=True)
    return stream.decode(False) if stream.features else stream


def _folder_mark(folder: Path) -> str:
    """Hash names, sizes and times of a folder's files."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    stats = [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return fingerprint_of(stats)
