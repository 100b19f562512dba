"""Utterances of one recording, laid out plainly: audio, bos, prompt, text, end."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from omni.model.chat_template import AUDIO
from omni.stream.collate import Utterance


def spoken(
    features: Tensor | None,
    prompt: Sequence[int],
    text: Sequence[int],
    *,
    bos: int,
    end: int,
    number: int = -1,
) -> Utterance:
    ids = [AUDIO, bos, *prompt, *text, end]
    supervised = [False] * (2 + len(prompt)) + [True] * (len(text) + 1)
    return Utterance(
        None if features is None else [features],
        ids,
        supervised,
        number,
        transcript_tokens=[list(text)],
    )
