"""Errors that people see, and one line for any of them."""

from __future__ import annotations


class ConfigError(ValueError):
    """The configuration is wrong; the message names each field and what was expected."""


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
