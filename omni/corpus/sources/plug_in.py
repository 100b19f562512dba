"""Read a corpus with a source of the user's own, named as package.module:Class:NAME."""

from __future__ import annotations

from collections.abc import Iterator

from omni.config.plug_in import check_methods, is_plug_in, make_plug_in
from omni.corpus.manifest import ManifestError
from omni.corpus.sources.base import Options, Part, Row, Source
from omni.errors import ConfigError, first_line

_SETTING = "--source"


def names_plug_in(spec: str) -> bool:
    module, _, rest = spec.partition(":")
    attribute, colon, _ = rest.partition(":")
    return bool(colon) and is_plug_in(f"{module}:{attribute}")


class PlugInSource:
    """A source of the user's own; its rows are checked, and its failures name it."""

    def __init__(self, spec: str, name: str, options: Options) -> None:
        """Construct Class(NAME, options) for name, package.module:Class:NAME.

        spec: name without credentials. Raises ManifestError.
        """
        self.spec = spec
        module, attribute, rest = name.split(":", 2)
        self.plug_in = f"{module}:{attribute}"
        try:
            self.source: Source = make_plug_in(self.plug_in, _SETTING, rest, options)
            check_methods(self.source, self.plug_in, _SETTING, "parts", "read")
        except ConfigError as error:
            raise ManifestError(str(error).removeprefix(f"{_SETTING}: ")) from None

    def parts(self) -> list[Part]:
        try:
            parts = list(self.source.parts())
        except (ManifestError, OSError):
            raise
        except Exception as error:
            raise self._failure("parts", error) from None
        for part in parts:
            if not isinstance(part, Part):
                raise ManifestError(
                    f"{self.plug_in}: expected parts() to list Part, got {type(part).__name__}"
                )
        return parts

    def read(self, part: Part) -> Iterator[Row]:
        try:
            for row in self.source.read(part):
                if not isinstance(row, Row):
                    raise ManifestError(
                        f"{self.plug_in}: expected read() to yield Row, got {type(row).__name__}"
                    )
                yield row
        except (ManifestError, OSError):
            raise
        except Exception as error:
            raise self._failure(f"read of part {part.name}", error) from None

    def _failure(self, method: str, error: Exception) -> ManifestError:
        reason = f"{type(error).__name__}: {first_line(error)}"
        return ManifestError(f"{self.plug_in}: {method} failed: {reason}")
