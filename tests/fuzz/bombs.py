"""Small inputs that claim, or unpack to, very much: memory stays within a bound, whatever they say.

Recordings inside rows, members of archives beside a table, and answers of a web server that is
allowed. Each is a row of a Parquet file, and is read and measured as an index is made.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq

from omni.audio.decode import AudioError, decode, measure
from omni.corpus.sources import Options, open_source, row_audio
from omni.errors import ManifestError
from omni.storage.http import DownloadLimits
from tests.fuzz.recorded import sound
from tests.helpers.hostile_server import BOMBS, hostile_server
from tests.helpers.resident import PeakMemory

LIMIT_MB = 4
BOUND_MB = 64
"""Of one row: a recording of the limit, buffers of the decoders, and what Python itself takes."""
_UNPACKED = 96 << 20
_HUGE = [0x7FFF_FFFF, 0xFFFF_FFFF, 0x8000_0000, 0x4000_0000, 0x1000_0000, 1 << 24]


def bombs(folder: Path, rng: random.Random) -> str:
    """A row is left out, or is the recording that it is; memory grows by a bound at most."""
    home = folder / "corpus"
    home.mkdir(exist_ok=True)
    kind = rng.randrange(5)
    if kind == 0:
        return _read(home, _archive(home, rng))
    if kind == 1:
        with hostile_server() as server:
            return _read(home, f"{server.url}/{rng.choice(BOMBS)}")
    return _read(home, rng.choice([_claims, _sized_chunk, _comments])(rng))


def _read(home: Path, audio: bytes | str) -> str:
    """Read a table of one row."""
    path = home / "x.parquet"
    held = isinstance(audio, bytes)
    row = {"bytes": audio if held else None, "path": None if held else audio}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"audio": pa.array([row], kind), "text": ["a"]})
    pq.write_table(table, path)
    limits = DownloadLimits(megabytes=LIMIT_MB, seconds=0.3, allow_private_hosts=True)
    # A tar is read with its extended headers, which are as large as the file at most.
    size = len(audio) if isinstance(audio, bytes) else _size_of_tar(home, audio)
    peak = PeakMemory()
    with patch.object(row_audio, "_PATIENCE_SECONDS", 0.0):
        answer = _measured(str(path), limits)
    grown = peak.take() - 2 * size
    assert grown < BOUND_MB << 20, f"{grown >> 20} MiB, {answer}: {audio[:120]!r}"
    return answer


def _size_of_tar(home: Path, address: str) -> int:
    return (home / "x.tar").stat().st_size if address.startswith("tar:") else 0


def _measured(spec: str, limits: DownloadLimits) -> str:
    source = open_source(spec, Options(downloads=limits))
    [part] = source.parts()
    try:
        [row] = source.read(part)
        if row.error is not None:
            return "rejected"
        assert row.data is not None
        samples = measure(row.data)
        # Longer ones are decoded in blocks, or while they are trained span by span.
        return "accepted" if samples > 16_000 * 60 else _decoded(row.data, samples)
    except AudioError:
        return "rejected"
    except ManifestError as error:
        assert "x.parquet" in str(error)
        return "refused"


def _decoded(data: bytes, samples: int) -> str:
    assert len(decode(data, samples=samples, allow_silence=True)) == samples
    return "accepted"


# -- recordings ------------------------------------------------------------------------------------


def _claims(rng: random.Random) -> bytes:
    """A recording of any format with huge numbers in its header."""
    kinds = ["WAV", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF", "W64"]
    data = bytearray(sound(0.2, rng.choice(kinds)))
    for _ in range(rng.randint(1, 3)):
        order = rng.choice("<>")
        number = struct.pack(order + "I", rng.choice(_HUGE))
        if rng.random() < 0.3:
            number = struct.pack(order + "Q", 1 << rng.randrange(30, 62))
        at = rng.randrange(4, min(len(data), 160))
        data[at : at + len(number)] = number
    return bytes(data)


def _sized_chunk(rng: random.Random) -> bytes:
    """A tag or chunk before the samples that says it is huge, or is."""
    size = rng.choice(_HUGE)
    kind = rng.randrange(4)
    if kind == 0:  # ID3v2: seven bits of each of four bytes
        seven = bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))
        return b"ID3\x04\0\0" + seven + rng.randbytes(64) + sound(0.2, rng.choice(["MP3", "FLAC"]))
    if kind == 1:
        data = sound(0.2, "WAV")
        name = rng.choice([b"LIST", b"bext", b"cart", b"id3 ", b"fact", b"PEAK", b"smpl", b"JUNK"])
        return data[:36] + name + struct.pack("<I", size) + rng.randbytes(40) + data[36:]
    if kind == 2:
        data = sound(0.2, "AIFF")
        return data[:12] + b"COMT" + struct.pack(">I", size) + rng.randbytes(40) + data[12:]
    data = sound(0.2, "CAF")
    chunk = rng.choice([b"pakt", b"kuki", b"info", b"strg", b"chan"])
    return data[:52] + chunk + struct.pack(">q", size << rng.randrange(8)) + bytes(40) + data[52:]


def _comments(rng: random.Random) -> bytes:
    """FLAC with a block of comments, pictures or seek points that says it has very many."""
    data = sound(0.2)
    number = struct.pack("<I", rng.choice(_HUGE))
    body = rng.choice([number, struct.pack("<I", 4) + b"omni" + number, number * 8])
    block = rng.choice([1, 2, 3, 4, 5, 6])
    stated = rng.choice([len(body), 0xFF_FFFF])
    head = bytes([block]) + stated.to_bytes(3, "big")
    return data[:4] + bytes([data[4] & 0x7F]) + data[5:42] + head + body + data[42:]


# -- archives --------------------------------------------------------------------------------------


def _archive(home: Path, rng: random.Random) -> str:
    """Return the address of a member that unpacks to more than is allowed, or says so."""
    makers: list[Callable[[Path, random.Random], str]] = [_zip, _packed, _tar, _window]
    return rng.choice(makers)(home, rng)


def _zip(home: Path, rng: random.Random) -> str:
    method = rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    path = home / "x.zip"
    with zipfile.ZipFile(path, "w", method) as archive, archive.open("bomb.wav", "w") as member:
        for _ in range(_UNPACKED >> 20):
            member.write(bytes(1 << 20))
    if rng.random() < 0.5:  # Its directory says another size.
        data = bytearray(path.read_bytes())
        at = data.rindex(b"PK\x01\x02") + 24
        data[at : at + 4] = struct.pack("<I", rng.choice([0, 100, *_HUGE]))
        path.write_bytes(data)
    return "zip://bomb.wav::x.zip"


def _packed(home: Path, rng: random.Random) -> str:
    name, pack = rng.choice([("gzip", gzip), ("bz2", bz2), ("xz", lzma)])
    opened: Any = pack
    with opened.open(home / f"x.{name}", "wb") as file:
        for _ in range(_UNPACKED >> 20):
            file.write(bytes(1 << 20))
    return f"{name}://x::x.{name}"


def _tar(home: Path, rng: random.Random) -> str:
    """A header with a huge size, or one that is followed by a huge extended header."""
    info = tarfile.TarInfo("bomb.wav")
    info.size = 1 << rng.randrange(26, 40)
    if rng.random() < 0.5:
        info.type = rng.choice([tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
    path = home / "x.tar"
    with path.open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(512 + (rng.choice([1, 96]) << 20))  # Holes take no room on disk.
    return "tar://bomb.wav::x.tar"


def _window(home: Path, rng: random.Random) -> str:
    """A file of xz whose dictionary, it says, has gigabytes."""
    data = bytearray(lzma.compress(bytes(1000), check=lzma.CHECK_CRC32))
    length = (data[12] + 1) * 4  # of the block's header, after the 12 bytes of the stream's
    at = data.index(b"\x21\x01", 12) + 2
    data[at] = rng.choice([30, 36, 38, 40])
    data[12 + length - 4 : 12 + length] = struct.pack("<I", zlib.crc32(data[12 : 12 + length - 4]))
    (home / "x.xz").write_bytes(data)
    return "xz://x::x.xz"
