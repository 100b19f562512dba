"""A transcriber that the tests of inference share."""

from __future__ import annotations

import pytest
import torch

from omni.corpus.text import TextPolicy
from omni.inference.transcriber import Transcriber
from omni.model.chat_template import Template
from omni.model.encoder.whisper import WhisperEncoder
from omni.model.lm.gpt_block import GPTConfig
from omni.model.speech_lm import OmniConfig, OmniModel
from omni.model.tokenizer import SpeechTokenizer
from omni.stream.codec import FeatureCodec


@pytest.fixture(scope="session")
def speech() -> Transcriber:
    """The real encoder, and a language model that has learnt nothing: what it writes is noise."""
    tokenizer = SpeechTokenizer.train(["you are entering conference number seven"], 300)
    gpt = GPTConfig(256, tokenizer.vocab_size, 1, 1, 1, 64, "L")
    model = OmniModel(OmniConfig(gpt, 384, stack=8)).eval()
    model.init_weights(0)
    encoder = WhisperEncoder("embedded", mode="trim", dtype=torch.bfloat16)
    template = Template(tokenizer)
    return Transcriber(encoder, FeatureCodec(384), model, template, "", False, 8.0, TextPolicy())
