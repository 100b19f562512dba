"""Load classes that a setting names as package.module:Class (docs/plug-ins.md)."""

from __future__ import annotations

import importlib
import os
import re
import sys
from typing import Any

from omni.errors import ConfigError, first_line

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_plug_in(name: str) -> bool:
    """Check that a name has the form package.module:Class."""
    return _NAME.fullmatch(name) is not None


def check_plug_in(name: str) -> str:
    if not is_plug_in(name):
        raise ValueError("expected package.module:Class")
    return name


def load_plug_in(name: str, setting: str) -> type[Any]:
    """Import the class that a setting names; Ray's workers have the same working directory.

    Raises ConfigError that names the setting.
    """
    module, _, attribute = name.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:  # The command `omni` has its own folder there, not this one.
        sys.path.append(folder)
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # The module runs code of its own.
        raise ConfigError(
            f"{setting}: {name}: {module} cannot be imported ({type(error).__name__}: "
            f"{first_line(error)}); expected a module in the working directory or an installed one"
        ) from None
    if not isinstance(found, type):
        what = "has no class" if found is None else "does not name a class:"
        raise ConfigError(f"{setting}: {name}: {module} {what} {attribute}")
    return found


def check_methods(made: object, name: str, setting: str, *methods: str) -> None:
    """Raise ConfigError where an object of a plug-in lacks a method."""
    for method in methods:
        if not callable(getattr(made, method, None)):
            raise ConfigError(f"{setting}: {name}: expected a class with the method {method}")


def make_plug_in(name: str, setting: str, *arguments: Any, **options: Any) -> Any:
    """Construct a plug-in. Raises ConfigError that names the setting."""
    made = load_plug_in(name, setting)
    try:
        return made(*arguments, **options)
    except Exception as error:
        raise ConfigError(
            f"{setting}: {name}: cannot be constructed: {type(error).__name__}: {first_line(error)}"
        ) from None
