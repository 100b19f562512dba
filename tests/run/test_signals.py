"""A signal is acknowledged at once and remembered; a second one asks to stop at once."""

from __future__ import annotations

import os
import signal

import pytest

from omni.run.signals import Signals


def test_signals_are_said_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with Signals(25) as signals:
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGINT)
        assert (signals.received, signals.interrupted, signals.repeated) == ("SIGINT", True, False)
        said = capfd.readouterr().err
        assert "SIGINT" in said and "25 s" in said
        os.kill(os.getpid(), signal.SIGTERM)
        assert (signals.received, signals.repeated) == ("SIGINT", True)
        assert "SIGTERM" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
