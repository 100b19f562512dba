"""Versions where a job was submitted, and where it runs."""

from __future__ import annotations

import json
from importlib import metadata

from omni.cluster.versions import EXPECTED, differences, expected_versions, installed_versions


def test_versions_of_what_omni_requires() -> None:
    found = installed_versions()
    assert found["torch"] == metadata.version("torch").partition("+")[0]
    assert found["ray"] == metadata.version("ray")
    assert "pytest" not in found and "gguf" not in found, "extras are nobody's business"


def test_the_same_machine_has_no_differences() -> None:
    assert differences({EXPECTED: expected_versions()}) == []
    assert differences({}) == []
    assert differences({EXPECTED: "no json"}) == []


def test_each_difference_is_named() -> None:
    expected = installed_versions() | {"torch": "1.0", "nothing-such": "2.0"}
    torch, absent = differences({EXPECTED: json.dumps(expected)})
    assert all(word in torch for word in ("torch", installed_versions()["torch"], "1.0"))
    assert "nothing-such" in absent and "2.0" in absent
