"""Storage that is away for a minute must not end a run of days: try again, for a while."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_exponential

RETRY_SECONDS = 180.0
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_HOPELESS = {errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP}

T = TypeVar("T")


def retry_storage(call: Callable[[], T], *, seconds: float = RETRY_SECONDS) -> T:
    """What `call` returns; an OSError that may pass is tried again for `seconds`, then raised.

    The first try comes at once, the others after 0.1, 0.2, ... up to 5 seconds.
    """
    trying = Retrying(
        retry=retry_if_exception(_may_pass),
        wait=wait_exponential(multiplier=0.1, max=5),
        stop=stop_after_delay(seconds),
        reraise=True,
    )
    return trying(call)


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno not in _HOPELESS
