"""Speak with free text-to-speech programs: hibari in this process, flite and espeak-ng as commands.

flite and espeak-ng start in 10 to 20 ms and have no means to tell where a sentence of several ends,
so each sentence is a start. Both speak with another voice, and exit code 0, where they do not have
the one asked for: `missing` checks the voices first.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from omni.recipes.takes import ACCENTS, VARIANTS, VOICES, SpeechError, Take

_TIMEOUT_SECONDS = 300  # A machine that does much else may be slow; a hang is longer.
_ESPEAK_WORDS = 175  # a minute, espeak-ng's own speed
SOURCES = {
    "hibari": ("pip install 'nanochat-omni[recipes]'", "Apache-2.0; a voice distilled from Kokoro"),
    "flite": ("apt-get install flite", "free, BSD-like, Carnegie Mellon University and others"),
    "espeak-ng": ("apt-get install espeak-ng", "GPL-3.0 program, run as a command"),
}
"""Installation and licence of each program."""


def speak(text: str, take: Take, folder: Path) -> tuple[np.ndarray, int]:
    """Return a sentence as (S,) float32 and its rate. folder: for temporary files.

    Raises SpeechError.
    """
    if take.program == "hibari":
        audio = _hibari()(text, speed=take.speed, seed=take.seed)
        return np.asarray(audio, np.float32), 24000
    path = folder / "spoken.wav"
    path.unlink(missing_ok=True)
    code, _, _ = _run(_command(text, take, path))
    if code:
        raise SpeechError(f"{take.program} ended with {code}")
    try:
        audio, rate = soundfile.read(path, dtype="float32")
    except (soundfile.LibsndfileError, OSError):
        raise SpeechError(f"{take.program} wrote no audio") from None
    return audio, rate


def _command(text: str, take: Take, path: Path) -> list[str]:
    if take.program == "flite":
        stretch = f"duration_stretch={1 / take.speed:.3f}"
        return ["flite", "-voice", take.voice, "--setf", stretch, "-t", text, "-o", str(path)]
    speed = round(_ESPEAK_WORDS * take.speed)
    voice = ["-v", take.voice, "-p", str(take.pitch), "-s", str(speed)]
    return ["espeak-ng", *voice, "-w", str(path), "--", text]


def _run(command: list[str]) -> tuple[int, str, str]:
    """Run a program; return its exit code, output and error output. Raises SpeechError."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise SpeechError(f"{command[0]} took over {_TIMEOUT_SECONDS} s") from None
    except OSError as error:
        raise SpeechError(f"{command[0]} did not start: {error.strerror}") from None
    return done.returncode, done.stdout, done.stderr


@functools.lru_cache(maxsize=1)
def _hibari() -> Any:
    """Load the voice once per process; it computes in one thread."""
    hibari = importlib.import_module("hibari")
    return hibari.Hibari(voice=VOICES["hibari"][0], threads=1)


def missing(programs: Iterable[str]) -> dict[str, str]:
    """Describe each program that is not there or lacks a voice, with how to get it."""
    found = {}
    for name in programs:
        is_there = importlib.util.find_spec(name) if name == "hibari" else shutil.which(name)
        if not is_there:
            found[name] = f"{name} is not installed: {SOURCES[name][0]}"
        elif name != "hibari":
            try:
                lacking = _lacking(name)
            except SpeechError as error:
                found[name] = str(error)
                continue
            if lacking:
                found[name] = f"{name} lacks its voice {lacking[0]}: {SOURCES[name][0]}"
    return found


def _lacking(program: str) -> list[str]:
    """List the voices that a command does not have. Raises SpeechError if it does not run."""
    if program == "flite":
        known = set(_printed("flite", "-lv").split())
        return [voice for voice in VOICES["flite"] if voice not in known]
    lines = [line.split() for line in _printed("espeak-ng", "--voices=en").splitlines()[1:]]
    known = {fields[1] for fields in lines if len(fields) > 1}
    variants = _printed("espeak-ng", "--voices=variant")
    names = set(re.findall(r"!v/(\S+)", variants))
    return [name for name in ACCENTS if name not in known] + [
        name for name in VARIANTS if name not in names
    ]


_VERSIONS: dict[str, Callable[[], str]] = {
    "hibari": lambda: ", ".join(map(_package, ("hibari-tts", "onnxruntime", "scipy"))),
    "flite": lambda: _version(_printed("flite", "--version")),
    "espeak-ng": lambda: _version(_printed("espeak-ng", "--version")),
}


def version_of(program: str) -> str:
    """Return what decides how a program sounds: its version, and those of what it computes with."""
    return _VERSIONS[program]()


def _package(name: str) -> str:
    """Return name and version; hibari's last bits depend on whether scipy is there."""
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {name}"


def _printed(*command: str) -> str:
    """Return what a program prints; flite --version does so with exit code 1.

    Raises SpeechError where it prints nothing, as one does whose shared libraries are missing.
    """
    code, printed, error = _run(list(command))
    if not printed:
        reason = error.strip().splitlines()[-1:] or [f"it printed nothing and ended with {code}"]
        raise SpeechError(f"{command[0]} does not run: {reason[0]}")
    return printed


def _version(text: str) -> str:
    found = re.search(r"\d+(?:\.\d+)+", text)
    return found[0] if found else "unknown"
