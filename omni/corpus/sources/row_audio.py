"""Find or fetch the recording that a row of a table names by path or address.

Rows may come from strangers. Opened are files and objects (`recording_uri`), members of an archive
among these, files on web servers and on Hugging Face, and nothing else that fsspec could open.
"""

from __future__ import annotations

import posixpath
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.zip import ZipFileSystem

from omni.corpus.audio_paths import AddressError, shown
from omni.corpus.sources.base import Options, resolve_audio
from omni.errors import ManifestError, first_line
from omni.storage.http import PORTS, DownloadError, download, too_large
from omni.storage.path import StoragePath
from omni.storage.retry import retry_storage
from omni.storage.uri import redact

_ARCHIVES = ("zip", "tar", "gzip", "bz2", "xz", "zstd")
_PATIENCE_SECONDS = 60.0  # Retry a server for this long.


@dataclass(frozen=True)
class Recording:
    """The recording of a row: its location, or its bytes, or why the row is left out."""

    uri: str = ""
    data: bytes | None = None
    error: tuple[str, str] | None = None


def find_recording(
    position: str, address: str, folder: StoragePath | None, options: Options
) -> Recording:
    """Find the file that `address` names, or fetch it. position: of the row, for messages.

    folder: what paths are relative to; the hf:// URI of a dataset on a hub, which has no paths.
    Raises ManifestError for a file that the row may not name.
    """
    try:
        *links, last = address.split("::")  # such as zip://a.flac::clips.zip
        if len(links) > 1 or any(link.partition("://")[0] not in _ARCHIVES for link in links):
            expected = ", ".join(_ARCHIVES)
            raise AddressError(f"{shown(address)}: expected a file, or a member of {expected}")
        scheme, mark, _ = last.partition("://")
        if mark and scheme.lower() in PORTS:
            if links:
                raise AddressError(f"{shown(address)}: expected an archive that is downloaded")
            data = _patiently(lambda: download(last, options.downloads))
            return Recording(data=data)
        if mark and scheme == "hf":
            return Recording(data=_patiently(lambda: _from_hub(address, last, folder, options)))
        uri = _file(position, last, folder, options)
        if not links:
            return Recording(uri=uri)
        return Recording(data=_patiently(lambda: _read("::".join([*links, uri]), options)))
    except AddressError as error:
        return Recording(error=("address", f"{position}: {error}"))
    except DownloadError as error:
        return Recording(error=(error.reason, f"{position}: {error.detail}"))
    except ManifestError:
        raise
    except (OSError, ValueError, ImportError) as error:
        return Recording(error=("missing", f"{position}: {shown(address)}: {redact(str(error))}"))


def _patiently(fetch: Callable[[], bytes]) -> bytes:
    return retry_storage(fetch, seconds=_PATIENCE_SECONDS)


def _file(position: str, name: str, folder: StoragePath | None, options: Options) -> str:
    """Resolve the path or URI of a file. Raises ManifestError, and AddressError."""
    if not isinstance(folder, Path) and (folder is None or str(folder).startswith("hf://")):
        if "://" not in name and not options.allow_absolute:
            raise ManifestError(f"{position}: {shown(name)} is not a file of the dataset")
        folder = Path("/")
    return resolve_audio(position, folder, name, options)


def _from_hub(address: str, uri: str, folder: StoragePath | None, options: Options) -> bytes:
    """Read a file on Hugging Face: with the user's token in the row's own dataset only."""
    plain = uri.partition("://")[2]
    own = str(folder).startswith("hf://") and uri.startswith(f"{folder}/")
    own = own and posixpath.normpath(plain) == plain
    settings = {} if own or options.allow_absolute else {"token": False}
    return _read(address, options, **({"hf": settings} if address != uri else settings))


def _read(url: str, options: Options, **settings: Any) -> bytes:
    most = options.downloads.megabytes
    try:
        files, name = fsspec.core.url_to_fs(url, **settings)
        if isinstance(files, ZipFileSystem):
            _check_method(url, files.zip, name)
        with files.open(name, "rb") as file:
            data: bytes = file.read((most << 20) + 1)
    except (OSError, ValueError, ImportError, DownloadError):
        raise
    except Exception as error:
        if "::" not in url:
            raise
        # Whatever a library raises for a damaged archive: the row is named and left out. So is one
        # for which xz asks more memory than there is.
        problem = f"{shown(url)}: {type(error).__name__}: {first_line(error)}"
        raise DownloadError("unreadable", problem) from None
    if len(data) > most << 20:
        raise too_large(shown(url), most)
    return data


def _check_method(url: str, archive: zipfile.ZipFile, name: str) -> None:
    """Refuse the methods that `zipfile` unpacks without a limit: 4 KiB of bzip2 make gigabytes."""
    method = archive.getinfo(name).compress_type
    if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DownloadError(
            "unreadable", f"{shown(url)}: zip method {method}: expected stored or deflated members"
        )
