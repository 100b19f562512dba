"""Damage as it comes: flipped bits, missing ends, repeated blocks, foreign values."""

from __future__ import annotations

import json
import random
from typing import Any

INTERESTING = [
    b"\x00",
    b"\xff",
    b"\x7f",
    b"\x80\x00\x00\x00",
    b"\xff\xff\xff\xff",
    b"\n",
    b"{",
    b"]",
]
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1e308,
        10**30,
        1.5,
        "",
        " ",
        "nan",
        "\u0000",
        "\ud800",
        "x" * 10_000,
    ),
    *([], {}, [[]], {"a": {"b": []}}, float("nan"), float("inf"), -0.0, "../../etc/passwd", "1e9"),
]


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four injuries; headers, where parsers live, are hit as often as all the rest."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not out:
            return bytes(out)
        size = len(out)
        at = rng.randrange(min(size, 128)) if rng.random() < 0.5 else rng.randrange(size)
        kind = rng.randrange(7)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at] = rng.randrange(256)
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            del out[at : at + rng.randint(1, 64)]
        elif kind == 4:
            out[at:at] = out[at : at + rng.randint(1, 256)]
        elif kind == 5:
            piece = rng.choice(INTERESTING)
            out[at : at + len(piece)] = piece
        else:
            out[at:at] = rng.randbytes(rng.randint(1, 32))
    return bytes(out)


def mutate_value(value: Any, rng: random.Random) -> Any:
    """Plain data with one field exchanged, dropped, renamed or added, at any depth."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(sorted(value))
        kind = rng.random()
        copy = dict(value)
        if kind < 0.7:
            copy[key] = mutate_value(value[key], rng)
        elif kind < 0.8:
            del copy[key]
        elif kind < 0.9:
            copy[key + rng.choice(["x", " ", "\u0301"])] = copy.pop(key)
        else:
            copy["extra"] = rng.choice(VALUES)
        return copy
    if isinstance(value, list) and value and rng.random() < 0.6:
        at = rng.randrange(len(value))
        return [*value[:at], mutate_value(value[at], rng), *value[at + 1 :]]
    return rng.choice(VALUES)


def as_json(value: Any) -> bytes:
    """JSON as Python writes it, with NaN and half characters, which others write too."""
    return json.dumps(value).encode()
