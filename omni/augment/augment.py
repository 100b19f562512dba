"""Augment training audio, with changes drawn anew for each epoch.

The result is a pure function of run.seed, epoch, content, settings and noise corpora; order,
worker and interruptions have no influence.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from omni.audio.windows import HOP, SAMPLING_RATE, Window
from omni.augment import effects
from omni.augment.noise import Clips
from omni.augment.plug_in import apply_effect
from omni.augment.speed import Speeds, names_of
from omni.config import AugmentConfig
from omni.storage.digest import digest

_DIRECT_DB = (0.0, 10.0)  # direct over reverberant sound, from distant to close speakers


@dataclass(frozen=True)
class Change:
    """The changes of one recording in one epoch. Use it once: its generators advance."""

    speed: float
    reverb: bool
    snr_db: float | None
    telephone: bool
    gain_db: float | None
    masks: bool
    room: np.random.Generator = field(repr=False)  # chooses the response
    noise: np.random.Generator = field(repr=False)  # chooses the recording and its start
    places: np.random.Generator = field(repr=False)  # places the masks
    effects: tuple[tuple[str, np.random.Generator], ...] = ()  # plug-ins that change it

    @property
    def clean(self) -> bool:
        """Check that nothing is changed."""
        changed = self.reverb or self.telephone or self.masks or self.speed != 1.0
        changed = changed or bool(self.effects)
        return not changed and self.snr_db is None and self.gain_db is None


@dataclass(frozen=True)
class Augmentation:
    """Settings and corpora of augmentation; picklable. speeds: None where no speed changes."""

    settings: AugmentConfig
    seed: int
    speeds: Speeds | None = None
    noise: Clips = Clips("noise")
    rooms: Clips = Clips("reverb")

    @property
    def identity(self) -> str:
        """Hash everything that changes a recording, except the run's seed."""
        # Runs of versions without plug-ins have a hash without these settings.
        plug_ins = set() if self.settings.effects else {"effects", "effects_probability"}
        left_out = {"noise", "reverb", *plug_ins}
        settings = self.settings.model_dump(mode="json", exclude=left_out)
        parts = [json.dumps(settings, sort_keys=True), self.noise.identity, self.rooms.identity]
        return digest(" ".join(parts))

    def change(self, number: int, keys: Sequence[str], epoch: int) -> list[Change]:
        """Draw the changes of each recording of an utterance; all of them share one speed."""
        speed = 1.0 if self.speeds is None else self.speeds.of(number, epoch)
        names = names_of(keys).tolist()
        return [self._draw(speed, [self.seed, epoch, part, n]) for part, n in enumerate(names)]

    def _draw(self, speed: float, entropy: list[int]) -> Change:
        """Draw all effects, used or not, so that enabling one leaves the others as they are."""
        settings = self.settings
        seeds = np.random.SeedSequence(entropy).spawn(4 + len(settings.effects))
        generators = [np.random.default_rng(seed) for seed in seeds]
        drawn, room, sounds, places = generators[:4]
        reverb, noise, telephone, gain = drawn.random(4)
        snr_db, gain_db = drawn.uniform(*settings.noise_snr_db), drawn.uniform(*settings.gain_db)
        return Change(
            speed=speed,
            reverb=bool(reverb < settings.reverb_probability),
            snr_db=snr_db if noise < settings.noise_probability else None,
            telephone=bool(telephone < settings.telephone_probability),
            gain_db=gain_db if gain < settings.gain_probability else None,
            masks=settings.masks,
            room=room,
            noise=sounds,
            places=places,
            effects=tuple(
                (name, generator)
                for name, generator in zip(settings.effects, generators[4:], strict=True)
                if generator.random() < settings.effects_probability
            ),
        )


def augment(audio: np.ndarray, change: Change, augmentation: Augmentation) -> np.ndarray:
    """Apply the changes to (S,) float32 audio at 16 kHz; the new length is `changed_length`.

    Order: speed, reverberation, noise, telephone, gain, plug-ins. Raises AudioError where a noise
    or an impulse response cannot be decoded, or a plug-in fails.
    """
    audio = effects.change_speed(audio, change.speed)
    if change.reverb:
        audio = effects.reverberate(audio, _response(augmentation, change.room))
    if change.snr_db is not None:
        noise = augmentation.noise.excerpt(change.noise, len(audio))
        audio = effects.mix(audio, noise, change.snr_db)
    if change.telephone:
        audio = effects.telephone(audio)
    if change.gain_db is not None:
        audio = effects.gain(audio, change.gain_db)
    for name, generator in change.effects:
        audio = apply_effect(name, audio, generator)
    return audio


def _response(augmentation: Augmentation, generator: np.random.Generator) -> np.ndarray:
    if augmentation.rooms.clips:
        return augmentation.rooms.whole(generator)
    seconds = generator.uniform(*augmentation.settings.reverb_seconds)
    return effects.made_response(generator, seconds, generator.uniform(*_DIRECT_DB))


def spec_augment(
    mel: np.ndarray, settings: AugmentConfig, generator: np.random.Generator
) -> np.ndarray:
    """Mask time and frequency of a log-mel (n_mels, T), after Park et al. 2019 without warping.

    Masked values become the mean of the clip, which is zero in the paper's normalised input.
    """
    masked: np.ndarray = mel.copy()
    mean = float(mel.mean(dtype=np.float64))
    frames = mel.shape[1]
    longest = int(settings.time_mask_seconds * SAMPLING_RATE / HOP)
    longest = min(longest, int(settings.time_mask_share * frames))
    for _ in range(settings.time_masks):
        effects.mask(masked, 1, longest, generator, mean)
    for _ in range(settings.freq_masks):
        effects.mask(masked, 0, settings.freq_mask_bins, generator, mean)
    return masked


def mask_windows(
    mel: np.ndarray, windows: Sequence[Window], settings: AugmentConfig, change: Change
) -> np.ndarray:
    """Apply `spec_augment` to each encoder window of a clip, leaving out its padding."""
    masked: np.ndarray = mel.copy()
    first = 0
    for window in windows:
        real = slice(first, first + min(window.padded, window.stop - window.start) // HOP)
        if real.stop > real.start:
            masked[:, real] = spec_augment(mel[:, real], settings, change.places)
        first += window.padded // HOP
    return masked
