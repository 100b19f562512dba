"""All uses of Ray's private APIs are in one module, which names the release that has them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
_PRIVATE = re.compile(r"^\s*(from|import) ray[\w.]*\._|\bray\._\w+", re.M)


def test_private_apis_of_ray_are_in_one_module() -> None:
    users = {
        str(path.relative_to(ROOT))
        for folder in ("omni", "jobs")
        for path in (ROOT / folder).rglob("*.py")
        if _PRIVATE.search(path.read_text())
    }
    assert users == {"omni/cluster/ray_internals.py"}


def test_another_release_of_ray_is_refused() -> None:
    code = "import ray; ray.__version__ = '2.61.0'; import omni.cluster.ray_internals"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(r"RuntimeError: ray 2\.61\.0: expected 2\.60", done.stderr)
