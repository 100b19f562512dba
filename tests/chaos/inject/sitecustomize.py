"""Faults that only the process itself can have: Python loads this in every process of the cluster.

A file CHAOS_DIR/KIND-PID asks process PID for a fault of that kind, once:
    nan    one gradient of the next step becomes NaN, as a flipped bit makes it
    hang   the next block of an encoder never comes back
"""

import os
import sys
import threading
import time
from pathlib import Path


def _watch(folder: Path) -> None:
    while True:
        time.sleep(0.25)
        for kind, fault in (("nan", _nan), ("hang", _hang)):
            order = folder / f"{kind}-{os.getpid()}"
            if order.exists() and fault():
                order.unlink()


def _nan() -> bool:
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    clip = torch.nn.utils.clip_grad_norm_

    def poisoned(parameters, *arguments, **settings):
        torch.nn.utils.clip_grad_norm_ = clip
        parameters = list(parameters)
        next(p.grad for p in parameters if p.grad is not None).view(-1)[0] = float("nan")
        return clip(parameters, *arguments, **settings)

    torch.nn.utils.clip_grad_norm_ = poisoned
    return True


def _hang() -> bool:
    stages = sys.modules.get("omni.stream.stages")
    if stages is None:
        return False

    def forever(self, table):
        time.sleep(1e6)

    stages.EncodeStage.__call__ = forever
    return True


if "CHAOS_DIR" in os.environ:
    threading.Thread(target=_watch, args=(Path(os.environ["CHAOS_DIR"]),), daemon=True).start()
