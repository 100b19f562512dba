"""Settings of a server."""

from __future__ import annotations

import hmac
from dataclasses import dataclass


@dataclass(frozen=True)
class ServeSettings:
    """checkpoint: as `--checkpoint` takes it. keys: bearer tokens; none: everyone may ask."""

    checkpoint: str
    language: str = "en"
    """Language that the model writes, unless a request names another."""
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    replicas: int = 1
    gpus: float = 0.0
    """GPUs of a replica, which may be a share of one."""
    cpus: float = 1.0
    """CPUs of a replica, as Ray counts them."""
    threads: int = 1
    batch: int = 16
    """Most pieces that a replica decodes at a time."""
    queue: int = 64
    """Requests that may wait for a replica; more are answered with 429."""
    max_megabytes: float = 25.0
    """Largest body of a request, in MB."""
    max_seconds: float = 3600.0
    """Longest recording."""
    decode: str | None = None
    ctc_weight: float | None = None
    max_new_tokens: int | None = None
    beam: int | None = None

    @property
    def model(self) -> str:
        """Name of the model, as `/v1/models` lists it."""
        return self.checkpoint.rstrip("/").removesuffix("/checkpoints/best").rpartition("/")[2]

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"

    def admits(self, authorization: str) -> bool:
        """Tell whether a request with this Authorization header may be answered."""
        scheme, _, key = authorization.partition(" ")
        given = key.strip().encode()
        fits = [hmac.compare_digest(given, known.encode()) for known in self.keys]
        return not self.keys or (scheme.lower() == "bearer" and any(fits))
