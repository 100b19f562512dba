"""Read the fields of a request that say how its answer is drawn."""

from __future__ import annotations

import secrets

from omni.model.lm.sampling import GREEDY, Sampling
from omni.serve.answers import RefusedRequest

_SEEDS = 2**63


def make_sampling(temperature: object, top_p: object, seed: object, *, hottest: float) -> Sampling:
    """Check the fields `temperature`, `top_p` and `seed`, each perhaps None; return how to draw.

    hottest: largest temperature. Without a temperature the most probable text is written, whatever
    the seed. With one, a request without a seed gets one here, so that every replica answers it
    alike. Raises RefusedRequest naming the field.
    """
    heat = _number("temperature", temperature, hottest)
    share = _number("top_p", top_p, 1.0)
    if share == 0.0:
        raise RefusedRequest("top_p: expected more than 0 and at most 1, got 0", field="top_p")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise RefusedRequest(f"seed: expected a whole number, got {seed!r}", field="seed")
    if heat is None and share not in (None, 1.0):
        raise RefusedRequest(
            "top_p: expected a temperature beside it: without one nothing is drawn", field="top_p"
        )
    if not heat:
        return GREEDY
    number = secrets.randbelow(_SEEDS) if seed is None else seed % _SEEDS
    return Sampling(heat, 1.0 if share is None else share, number)


def _number(name: str, value: object, most: float) -> float | None:
    if value is None:
        return None
    is_flag = isinstance(value, bool)
    if is_flag or not isinstance(value, int | float) or not 0 <= value <= most:
        raise RefusedRequest(f"{name}: expected 0 to {most:g}, got {value!r}", field=name)
    return float(value)
