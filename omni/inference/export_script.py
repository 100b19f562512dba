"""The transcribe.py of an exported model, which transcribes without omni."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from omni.audio import vad
from omni.audio.windows import SAMPLING_RATE, WINDOW_FRAMES, WINDOW_SAMPLES
from omni.corpus import text
from omni.inference import pieces
from omni.model.chat_template import AUDIO

_HEAD = '''"""Transcribe recordings at 16 kHz of any length: python transcribe.py FILE...

Needs torch, transformers and soundfile, and silero-vad to cut long recordings at pauses. A text is
incomplete if a line on stderr says so.
"""

from __future__ import annotations

import functools
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import regex
import soundfile
import torch
from transformers import (
    AutoFeatureExtractor,
    PreTrainedTokenizerFast,
    VoxtralForConditionalGeneration,
)

HERE = Path(__file__).parent
'''
_BODY = '''
def main(files: Sequence[str]) -> None:
    model = VoxtralForConditionalGeneration.from_pretrained(
        HERE, dtype=torch.float32, trust_remote_code=False
    ).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(HERE, trust_remote_code=False)
    extract = AutoFeatureExtractor.from_pretrained(HERE, trust_remote_code=False)
    end = model.generation_config.eos_token_id

    def transcribe(audio: np.ndarray) -> tuple[str, bool]:
        """Return the text of a piece, and True if it is incomplete."""
        windows = [audio[at : at + WINDOW_SAMPLES] for at in range(0, len(audio), WINDOW_SAMPLES)]
        features = extract(windows, sampling_rate=SAMPLING_RATE, return_tensors="pt").input_features
        heard = [model.config.audio_token_id] * (PER_WINDOW * len(features))
        ids = [*BEFORE, *heard, *AFTER]
        written = model.generate(
            input_ids=torch.tensor([ids]),
            input_features=features,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
        )[0, len(ids) :]
        return tokenizer.decode(written, skip_special_tokens=True).strip(), int(written[-1]) != end

    for file in files:
        rate = soundfile.info(file).samplerate
        assert rate == SAMPLING_RATE, f"{file}: {rate} Hz, expected {SAMPLING_RATE}"
        blocks = soundfile.blocks(file, blocksize=30 * rate, dtype="float32", always_2d=True)
        pieces = cut_at_pauses((block.mean(1) for block in blocks), LONGEST_SECONDS)
        found = [transcribe(piece) for piece in pieces]
        print(join([text for text, _ in found if text]), flush=True)
        if cut := sum(incomplete for _, incomplete in found):
            print(f"{file}: {cut} of {len(found)} pieces: MAX_NEW_TOKENS reached", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
'''
_SHARED: tuple[Callable[..., Any], ...] = (
    vad._model,
    vad.speech_probabilities,
    pieces.is_long,
    pieces.cut_at_pauses,
    pieces.find_pause,
    text.join,
)


def transcribe_script(
    prompt: Sequence[int], *, stack: int, longest_piece: float, max_new_tokens: int
) -> str:
    """Return the source of a program that needs transformers, soundfile and silero-vad.

    prompt: token ids before an answer, AUDIO among them. Long recordings are cut by the functions
    that cut them in omni.
    """
    at = list(prompt).index(AUDIO)
    constants = {
        "SAMPLING_RATE": SAMPLING_RATE,
        "WINDOW_SAMPLES": WINDOW_SAMPLES,
        "PER_WINDOW": WINDOW_FRAMES // stack,  # audio tokens
        "LONGEST_SECONDS": longest_piece,
        "MAX_NEW_TOKENS": max_new_tokens,
        "BEFORE": list(prompt[:at]),
        "AFTER": list(prompt[at + 1 :]),
        "_CHUNK": vad._CHUNK,
    }
    values = [f"{name} = {value!r}" for name, value in constants.items()]
    values.append(f"_NO_SPACE = regex.compile({text._NO_SPACE.pattern!r})")
    sources = [inspect.getsource(inspect.unwrap(shared)) for shared in _SHARED]
    return _HEAD + "\n".join(values) + "\n\n\n" + "\n\n".join(sources) + "\n" + _BODY
