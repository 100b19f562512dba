"""Retry storage that is unavailable: a minute without it must not end a run of days."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_exponential

RETRY_SECONDS = 180.0
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PERMANENT = {errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP}

T = TypeVar("T")


def retry_storage(call: Callable[[], T], *, seconds: float = RETRY_SECONDS) -> T:
    """Return the result of `call`, retrying an OSError that may pass for `seconds`.

    Waits 0.1, 0.2, ... up to 5 seconds between attempts. Raises the last error.
    """
    trying = Retrying(
        retry=retry_if_exception(_is_transient),
        wait=wait_exponential(multiplier=0.1, max=5),
        stop=stop_after_delay(seconds),
        reraise=True,
    )
    return trying(call)


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno not in _PERMANENT
