"""Fetch recordings from object storage ahead of their decoding, many at a time."""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from omni.audio.recording import MAX_WHOLE, AudioSpan, FetchedRecording
from omni.storage.parallel_reads import parallel_map
from omni.storage.path import ObjectPath, literal_path
from omni.storage.s3_client import read_start

_AT_ONCE = 32
"""Requests of one loader that are under way."""
_OPEN_ARCHIVES = 64
_MOST_LARGE = 100_000
_MOST_FAILURES = 3
"""Failed requests of a bucket after which nothing more of it is fetched ahead."""
_log = logging.getLogger(__name__)

Name = TypeVar("Name", bound=Hashable)


def fetch_ahead(
    wanted: Iterable[tuple[Name, str, AudioSpan]],
) -> Iterator[tuple[Name, FetchedRecording | None]]:
    """Yield recordings in order while those after them are fetched.

    wanted: the name of each, its URI, and where it lies in that. None stands for those that are to
    be opened as usual: files on disk, large objects, and objects whose request failed.
    """
    asked = list(wanted)
    if not any("://" in uri for _, uri, _ in asked):
        return ((name, None) for name, _, _ in asked)
    return parallel_map(lambda of: (of[0], _fetch(of[1], of[2])), asked, _AT_ONCE)


def _fetch(uri: str, span: AudioSpan) -> FetchedRecording | None:
    path = literal_path(uri)
    if not isinstance(path, ObjectPath) or path in _LARGE or _FAILED[path.root] >= _MOST_FAILURES:
        return None
    try:
        if span.bytes is None:
            data = read_start(path, MAX_WHOLE)
        else:
            offset, length = span.bytes
            data = None if length > MAX_WHOLE else _from_archive(path, offset, length)
    except FileNotFoundError:
        return None  # Opening it again says so.
    except OSError as error:
        _count_failure(path, error)
        return None  # Opening it again tells what is wrong, or tries for longer.
    if data is None and span.bytes is None and len(_LARGE) < _MOST_LARGE:
        _LARGE.add(path)
    return None if data is None else FetchedRecording(str(path), data)


def _count_failure(path: ObjectPath, error: OSError) -> None:
    """Count a failure of a bucket; say once that its recordings are read one at a time."""
    _FAILED[path.root] += 1
    if _FAILED[path.root] == _MOST_FAILURES:
        _log.warning("%s: recordings are read one at a time: %s", path, error)


def _from_archive(path: ObjectPath, offset: int, length: int) -> bytes | None:
    file = _archive(path)
    if offset + length > file.size():
        return None
    return bytes(file.read_at(length, offset)) if length else b""


def _archive(path: ObjectPath) -> Any:
    """Open an archive, once for its many recordings: opening asks for its size. Raises OSError."""
    with _LOCK:
        mine = path not in _ARCHIVES
        opened = _ARCHIVES.setdefault(path, Future())
        _ARCHIVES.move_to_end(path)
        if len(_ARCHIVES) > _OPEN_ARCHIVES:
            _ARCHIVES.popitem(last=False)
    if mine:
        try:
            opened.set_result(path.ranges())
        except BaseException as error:
            with _LOCK:
                _ARCHIVES.pop(path, None)
            opened.set_exception(error)
    return opened.result()


_LARGE: set[ObjectPath] = set()
"""Objects that are too large to be read whole."""
_FAILED: Counter[str] = Counter()
"""Failures by bucket."""
_LOCK = threading.Lock()
_ARCHIVES: OrderedDict[ObjectPath, Future[Any]] = OrderedDict()
