"""The frozen encoder is Whisper's, whatever a clip's length and whoever shares its batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder as Reference

from omni.audio.windows import FRAME, SAMPLING_RATE, WINDOW_SAMPLES, encoder_frames, plan_windows
from omni.config import OptimConfig
from omni.model.encoder.weights import EMBEDDED_WHISPER, read_whisper_files
from omni.model.encoder.whisper import WhisperEncoder
from omni.model.speech_lm import OmniConfig, OmniModel
from omni.train.optim import make_optimizers
from tests.helpers.small_gpt import SMALL


@pytest.fixture(scope="module")
def long_audio(clips: list[np.ndarray]) -> np.ndarray:
    """61 s of real speech: two windows of 30 s and a tail of 1 s."""
    return np.concatenate(clips)[: 61 * SAMPLING_RATE]


def seconds(amount: float) -> int:
    return round(amount * SAMPLING_RATE)


# --- the referee: transformers -------------------------------------------------------------------


@torch.inference_mode()
def test_full_mode_equals_the_encoder_of_transformers(
    full: WhisperEncoder, clips: list[np.ndarray]
) -> None:
    _, state = read_whisper_files(EMBEDDED_WHISPER)
    reference = Reference(WhisperConfig.from_pretrained(EMBEDDED_WHISPER)).eval()
    reference.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    for clip in clips[:2]:
        wanted = reference(full.preprocess([clip])).last_hidden_state[0]
        (features,) = full.encode([clip])
        assert features.shape == (1500, 384)
        assert features.dtype == torch.float32
        assert float((features - wanted).abs().max()) < 2e-4
        assert float(wanted.abs().max()) > 1.0, "a difference of 2e-4 is small"


# --- trim: batches do not matter -----------------------------------------------------------------


def _frames_per_pass(encoder: WhisperEncoder) -> list[int]:
    """Frames that go through the first layer at a time, noted from now on."""
    seen: list[int] = []
    encoder.encoder.layers[0].register_forward_hook(
        lambda module, inputs, out: seen.append(len(out))
    )
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_do_not_matter_to_the_last_bit_on_cpu(
    dtype: torch.dtype, clips: list[np.ndarray]
) -> None:
    encoder = WhisperEncoder("embedded", mode="trim", dtype=dtype)
    seen = _frames_per_pass(encoder)
    together = encoder.encode(clips[:17])
    assert len(seen) < 5 and max(seen) <= 1500, "it really batches"
    for number in range(17):
        (alone,) = encoder.encode([clips[number]])
        assert torch.equal(together[number], alone)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-9), (torch.bfloat16, 0.2)])
def test_padded_batches_change_rounding_only(
    dtype: torch.dtype, bound: float, clips: list[np.ndarray]
) -> None:
    # In fp64 rounding is 1e-15: what remains would be a fault of the masks.
    packed = WhisperEncoder("embedded", mode="trim", dtype=dtype)
    padded = WhisperEncoder("embedded", mode="trim", dtype=dtype, frame_budget=2000, padded=True)
    sizes: list[tuple[int, int]] = []
    padded.encoder.conv2.register_forward_hook(
        lambda module, inputs, output: sizes.append((len(output), output.shape[-1]))
    )
    together = padded.encode(clips[:9])
    assert sum(rows for rows, _ in sizes) == 9
    assert max(rows for rows, _ in sizes) >= 4, "it really batches"
    assert all(rows * frames <= 2000 for rows, frames in sizes)
    for features, alone in zip(together, packed.encode(clips[:9]), strict=True):
        assert features.shape == alone.shape
        assert float((features - alone).abs().max()) < bound


def test_windows_of_one_length_need_no_mask(clips: list[np.ndarray]) -> None:
    packed = WhisperEncoder("embedded", mode="full")
    padded = WhisperEncoder("embedded", mode="full", padded=True)
    for one, other in zip(packed.encode(clips[:2]), padded.encode(clips[:2]), strict=True):
        assert float((one - other).abs().max()) < 2e-4


def test_a_clip_over_the_budget_is_a_batch_of_its_own(
    trim: WhisperEncoder, clips: list[np.ndarray]
) -> None:
    tight = WhisperEncoder("embedded", mode="trim", frame_budget=1)
    assert torch.equal(tight.encode(clips[:2])[1], trim.encode(clips[1:2])[0])


def test_trim_keeps_the_real_frames(trim: WhisperEncoder, clips: list[np.ndarray]) -> None:
    for clip, features in zip(clips[:5], trim.encode(clips[:5]), strict=True):
        assert len(features) == encoder_frames(len(clip), "trim") == -(-len(clip) // FRAME)


def test_the_margin_is_context_and_not_output(clips: list[np.ndarray]) -> None:
    clip = clips[4]
    bare, roomy = (
        WhisperEncoder("embedded", mode="trim", margin_seconds=m).encode([clip])[0] for m in (0, 2)
    )
    assert bare.shape == roomy.shape
    assert not torch.equal(bare, roomy)


def test_a_clip_of_5_ms_is_one_frame(trim: WhisperEncoder, clips: list[np.ndarray]) -> None:
    (features,) = trim.encode([clips[0][: seconds(0.005)]])
    assert features.shape == (1, 384)
    assert features.isfinite().all()


def test_bf16_stays_close_to_fp32(trim: WhisperEncoder, clips: list[np.ndarray]) -> None:
    rounded = WhisperEncoder("embedded", mode="trim", dtype=torch.bfloat16)
    for clip in clips[:5]:
        (exact,), (close,) = trim.encode([clip]), rounded.encode([clip])
        assert close.dtype == torch.bfloat16
        error = (close.float() - exact).abs().mean() / exact.abs().mean()
        assert 0 < float(error) < 0.05


# --- preprocess and forward ----------------------------------------------------------------------


def test_preprocess_and_forward_are_the_two_halves_of_encode(
    full: WhisperEncoder, trim: WhisperEncoder, clips: list[np.ndarray]
) -> None:
    mels = full.preprocess(clips[:2])
    assert mels.shape == (2, 80, 3000)
    features = full(mels)
    assert features.shape == (2, 1500, full.d_model)
    torch.testing.assert_close(features[1], full.encode(clips[1:2])[0], rtol=0, atol=1e-3)

    mel = trim.preprocess(clips[:1])
    kept = encoder_frames(len(clips[0]), "trim")
    assert torch.equal(trim(mel)[0, :kept], trim.encode(clips[:1])[0])


def test_preprocess_refuses_more_than_30_s(full: WhisperEncoder, long_audio: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"clip 1\b.*\b61\.0 s\b"):
        full.preprocess([long_audio[:100], long_audio])


# --- over 30 s -----------------------------------------------------------------------------------


def test_long_audio_is_the_concatenation_of_its_windows(
    trim: WhisperEncoder, long_audio: np.ndarray
) -> None:
    (features,) = trim.encode([long_audio])
    assert len(features) == encoder_frames(len(long_audio), "trim") == 61 * 50
    windows = long_audio[:WINDOW_SAMPLES], long_audio[WINDOW_SAMPLES : 2 * WINDOW_SAMPLES]
    first, second = (trim.encode([window])[0] for window in windows)
    (tail,) = trim.encode([long_audio[2 * WINDOW_SAMPLES :]])
    assert torch.equal(features, torch.cat((first, second, tail)))


def test_windows_of_several_clips_come_back_in_order(
    trim: WhisperEncoder, clips: list[np.ndarray], long_audio: np.ndarray
) -> None:
    # Windows are encoded sorted by length, a tail of 2 s before the 30 s that precede it.
    head, tail = long_audio[:WINDOW_SAMPLES], long_audio[WINDOW_SAMPLES : seconds(32)]
    before, between, after = trim.encode([clips[1], np.concatenate((head, tail)), clips[2]])
    one, two, three, four = (trim.encode([audio])[0] for audio in (clips[1], head, tail, clips[2]))
    assert torch.equal(before, one)
    assert torch.equal(between, torch.cat((two, three)))
    assert torch.equal(after, four)


def test_full_mode_gives_1500_frames_for_each_window(
    full: WhisperEncoder, long_audio: np.ndarray
) -> None:
    assert encoder_frames(len(long_audio), "full") == 4500
    (features,) = full.encode([long_audio[: seconds(31)]])
    assert features.shape == (3000, 384)


@pytest.mark.parametrize("mode", ["trim", "full"])
@pytest.mark.parametrize("length", [1, 79, 320, 480_000, 480_001, 487_999, 488_000, 976_000])
def test_windows_cover_every_sample_once(length: int, mode: str) -> None:
    windows = plan_windows(length, mode)
    assert [w.start for w in windows] == [0, *(w.stop for w in windows[:-1])]
    assert windows[-1].stop == length
    for window in windows:
        assert 0 < window.stop - window.start <= window.padded <= WINDOW_SAMPLES
        assert window.padded % FRAME == 0
        assert 0 < window.frames <= window.padded // FRAME


def test_a_short_tail_takes_samples_over_from_the_window_before(
    trim: WhisperEncoder, long_audio: np.ndarray
) -> None:
    # 30.2 s: 29.5 s + 0.7 s instead of 30 s + 0.2 s, and as many frames as its length says.
    audio = long_audio[: seconds(30.2)]
    head, tail = plan_windows(len(audio), "trim")
    assert (head.stop, tail.start, tail.stop) == (seconds(29.5), seconds(29.5), seconds(30.2))
    (features,) = trim.encode([audio])
    assert len(features) == encoder_frames(len(audio), "trim") == 1510
    assert torch.equal(features[head.frames :], trim.encode([audio[tail.start :]])[0])
    # A tail of half a second stands alone.
    assert plan_windows(seconds(30.5), "trim")[1].start == seconds(30)


# --- frozen --------------------------------------------------------------------------------------


def test_the_encoder_stays_frozen_in_eval_mode(trim: WhisperEncoder) -> None:
    parent = nn.ModuleList([trim])
    parent.train()
    assert parent.training
    assert not any(module.training for module in trim.modules())
    assert trim.train() is trim and not trim.training
    assert not any(parameter.requires_grad for parameter in trim.parameters())


def test_features_carry_no_gradient(trim: WhisperEncoder, clips: list[np.ndarray]) -> None:
    (features,) = trim.encode(clips[:1])
    assert not features.requires_grad


@pytest.mark.parametrize("muon_lr", [None, 0.02])
def test_no_weight_of_the_encoder_reaches_an_optimizer(
    trim: WhisperEncoder, muon_lr: float | None
) -> None:
    model = OmniModel(OmniConfig(SMALL, feature_dim=trim.d_model, ctc=True))
    system = nn.ModuleDict({"encoder": trim, "omni": model})
    held = [
        parameter
        for optimizer in make_optimizers(system, OptimConfig(muon_lr=muon_lr)).values()
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert len(held) == len(list(model.parameters()))


def test_the_fingerprint_names_the_weights_and_not_their_use(
    full: WhisperEncoder, trim: WhisperEncoder
) -> None:
    rounded = WhisperEncoder("embedded", dtype=torch.bfloat16)
    assert full.fingerprint == trim.fingerprint == rounded.fingerprint
    assert len(trim.fingerprint) == 24
