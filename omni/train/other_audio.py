"""Pair the utterances of a held-out split with another recording, over all ranks.

The loss with another utterance's audio is what text alone explains.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omni.inference.choices import audio_for
from omni.inference.decode_batch import HeldUtterance
from omni.storage.digest import digest
from omni.stream.collate import Utterance
from omni.train.distributed import all_gather

_ROUND_BYTES = 32 << 20
"""Features that a rank sends at once; each rank receives those of all."""


@dataclass(frozen=True)
class _Described:
    """Describe an utterance to all ranks. place: of its bin and in it; frames: by recording."""

    place: tuple[int, int]
    recording: Any
    id: str
    frames: tuple[int, ...]


def with_other_audio(
    held: Sequence[HeldUtterance],
    places: Sequence[tuple[int, int]],
    fits: Callable[[Utterance, Sequence[int]], bool],
) -> list[Utterance | None]:
    """Give each utterance of this rank the audio of the next other recording of the split.

    places: number of the bin of each utterance, and its number in that bin; they order the split,
    so that the pairs are the same for any number of ranks. fits: whether an utterance fits into a
    bin with recordings of so many frames. None: it does not, with its own or with any other.
    A collective call.
    """
    own = [
        _Described(place, h.recording, h.id, tuple(map(len, h.utterance.features or ())))
        for place, h in zip(places, held, strict=True)
    ]
    by_rank = all_gather([own])
    order = _pairing_order([described for part in by_rank for described in part])
    utterances = {place: h.utterance for place, h in zip(places, held, strict=True)}
    at = {described.place: i for i, described in enumerate(order)}
    partners = [
        _next_that_fits(order, at[place], functools.partial(fits, h.utterance))
        for place, h in zip(places, held, strict=True)
    ]
    lacking = {p.place for p in partners if p is not None and p.place not in utterances}
    wanted = set(all_gather(sorted(lacking)))
    # A tensor is pickled with its whole storage, which may be that of a block.
    sent = [
        (place, replace(utterance, features=[f.clone() for f in utterance.features or ()]))
        for place, utterance in utterances.items()
        if place in wanted
    ]
    known = dict(utterances)
    for place, utterance in _exchange(sent):
        if place in lacking:
            known[place] = utterance
    return [
        None
        if partner is None
        else replace(h.utterance, features=audio_for(h.utterance, known[partner.place]))
        for h, partner in zip(held, partners, strict=True)
    ]


def _exchange(
    sent: Sequence[tuple[tuple[int, int], Utterance]],
) -> Iterator[tuple[tuple[int, int], Utterance]]:
    """Yield what all ranks send, by rounds, for all of it may be a large split."""
    rounds: list[list[tuple[tuple[int, int], Utterance]]] = []
    size = _ROUND_BYTES
    for place, utterance in sent:
        if size >= _ROUND_BYTES:
            rounds.append([])
            size = 0
        rounds[-1].append((place, utterance))
        size += sum(part.nbytes for part in utterance.features or ())
    for number in range(max(all_gather([len(rounds)]))):
        yield from all_gather(rounds[number] if number < len(rounds) else [])


def _pairing_order(every: list[_Described]) -> list[_Described]:
    """Order the utterances in which each is paired with the next one.

    Those of a bin may be alike, such as in length, which a task may be about: where several tasks
    share recordings the order is random.
    """
    every = sorted(every, key=lambda described: described.place)
    if len({described.recording for described in every}) == len(every):
        return every
    return sorted(every, key=lambda described: digest(f"{described.recording} {described.id}"))


def _next_that_fits(
    order: Sequence[_Described], first: int, fits: Callable[[Sequence[int]], bool]
) -> _Described | None:
    """Find the next other recording, around the end, that fits in the place of an utterance's."""
    mine = order[first]
    if not mine.frames or not fits(mine.frames):
        return None
    for step in range(1, len(order)):
        other = order[(first + step) % len(order)]
        frames = other.frames
        if not frames or other.recording == mine.recording:
            continue
        if fits([frames[i % len(frames)] for i in range(len(mine.frames))]):
            return other
    return None
