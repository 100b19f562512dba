"""Errors of wrong settings, and one line for any error."""

from __future__ import annotations


class ConfigError(ValueError):
    """The configuration is wrong; the message names each field and what was expected."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's text that is not empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
