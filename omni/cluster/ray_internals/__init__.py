"""Private APIs of Ray that omni needs, all of them. They are those of Ray 2.60.

A module for each library of Ray, whose imports take a second each.
"""

import ray

RELEASE = "2.60"

if ray.__version__.split(".")[:2] != RELEASE.split("."):
    raise RuntimeError(
        f"ray {ray.__version__}: expected {RELEASE}.x, whose internals omni uses: "
        f"pip install 'ray[default,data,train]=={RELEASE}.*'"
    )
