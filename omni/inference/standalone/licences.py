"""Copy the licences of omni, encoder, language model and checkpoint beside what they apply to."""

from __future__ import annotations

from pathlib import Path

from omni.storage.path import StoragePath

_ROOT = Path(__file__).parents[3]
_NAMES = ("licen[cs]e*", "LICEN[CS]E*", "NOTICE*", "COPYING*")


def copy_licences(
    checkpoint: StoragePath, encoder: Path, base: Path | None, out: Path
) -> dict[str, list[str]]:
    """Copy the licence files in each folder; return the names of the copies, by what they are of.

    base: folder of the pretrained language model. A part without a licence file has an empty list.
    """
    copied = {"code": _copy([_own_licence()], "omni", out)}
    copied["encoder"] = _copy(_found(encoder), "encoder", out)
    if base is not None:
        copied["language model"] = _copy(_found(base), "language-model", out)
    if isinstance(checkpoint, Path) and (own := _found(checkpoint)):
        copied["trained weights"] = _copy(own, "weights", out)
    return copied


def _own_licence() -> Path:
    """Return omni's licence: in the source tree, or in the package."""
    here = _ROOT / "LICENSE"
    return here if here.is_file() else _ROOT / "omni" / "assets" / "LICENSE"


def _found(folder: Path) -> list[Path]:
    return sorted({path for name in _NAMES for path in folder.glob(name) if path.is_file()})


def _copy(files: list[Path], part: str, out: Path) -> list[str]:
    names = []
    for path in files:
        names.append(f"{path.stem}.{part}{path.suffix}")
        (out / names[-1]).write_bytes(path.read_bytes())
    return names
