"""The alert rules, by promtool: each fires when it should, and not otherwise."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.prometheus_server import ALERTS, binary

pytestmark = pytest.mark.slow  # it needs promtool


@dataclass(frozen=True)
class Case:
    """series: a sample a minute, in promtool's notation (0+5x60: from 0, 60 times 5 more; stale:
    the worker has gone). fires: minutes at which the alert is there, and quiet: where it is not.
    """

    name: str
    alert: str
    series: dict[str, str]
    fires: tuple[int, ...] = ()
    quiet: tuple[int, ...] = ()


STEPS = {'ray_omni_steps{run="r",WorkerId="a"}': "1000x120"}
CASES = [
    Case(
        "a run that hangs",
        "OmniStalled",
        STEPS | {'ray_omni_step{run="r",WorkerId="a"}': "0+10x30 300x60"},
        fires=(52, 80),
        quiet=(20, 45),
    ),
    Case(
        "a run that begins again and again and does no step",
        "OmniStalled",
        {
            'ray_omni_steps{run="r",WorkerId="a"}': "1000x40 stale",
            'ray_omni_step{run="r",WorkerId="a"}': "0+10x30 300x10 stale",
        },
        fires=(52,),
        quiet=(30, 45),
    ),
    Case(
        "a run that repeats steps from its checkpoint on",
        "OmniStalled",
        {
            'ray_omni_steps{run="r",WorkerId="a"}': "1000x40 stale",
            'ray_omni_step{run="r",WorkerId="a"}': "0+10x40 stale",
            'ray_omni_steps{run="r",WorkerId="b"}': "_x42 1000x80",
            'ray_omni_step{run="r",WorkerId="b"}': "_x42 100+2x80",
        },
        quiet=(45, 60, 70, 90),
    ),
    Case(
        "a run that logs every ten minutes",
        "OmniStalled",
        STEPS | {'ray_omni_step{run="r",WorkerId="a"}': "_x10 1x9 2x9 3x9 4x9 5x9 6x9"},
        quiet=(15, 20, 30, 40, 60),
    ),
    Case(
        "a run that has ended",
        "OmniStalled",
        {
            'ray_omni_steps{run="r",WorkerId="a"}': "300x31 stale",
            'ray_omni_step{run="r",WorkerId="a"}': "0+10x30 300 stale",
        },
        quiet=(35, 50, 60, 90),
    ),
    Case(
        "a run that was stopped",
        "OmniStalled",
        {
            'ray_omni_steps{run="r",WorkerId="a"}': "1000x31 stale",
            'ray_omni_step{run="r",WorkerId="a"}': "0+10x30 300 stale",
        },
        quiet=(35, 40, 45, 50, 60, 90),
    ),
    Case(
        "a loss that is no number",
        "OmniNotANumber",
        {'ray_omni_loss{run="r"}': "5x10 NaN NaN NaN NaN NaN 4x10"},
        fires=(11, 15),
        quiet=(5, 20),
    ),
    Case(
        "the first step that is skipped",
        "OmniNotANumber",
        {'ray_omni_skipped_steps_total{run="r"}': "_x10 1x60", 'ray_omni_loss{run="r"}': "5x60"},
        fires=(12, 18),
        quiet=(5, 30),
    ),
    Case(
        "one more step that is skipped",
        "OmniNotANumber",
        {'ray_omni_skipped_steps_total{run="r"}': "3x30 4x60"},
        fires=(32, 38),
        quiet=(20, 50),
    ),
    Case(
        "a model that does not listen",
        "OmniIgnoresAudio",
        STEPS
        | {
            'ray_omni_step{run="r",WorkerId="a"}': "0+10x90",
            'ray_omni_shuffled_audio_gap{run="r",WorkerId="a"}': "0x90",
        },
        fires=(45,),
        quiet=(20, 35),
    ),
    Case(
        "a model that listens",
        "OmniIgnoresAudio",
        STEPS
        | {
            'ray_omni_step{run="r",WorkerId="a"}': "0+10x90",
            'ray_omni_shuffled_audio_gap{run="r",WorkerId="a"}': "0x20 0.5x70",
        },
        quiet=(20, 45, 80),
    ),
    Case(
        "many recordings that are of no use from the start",
        "OmniRejectsRising",
        {
            'ray_omni_rejects_total{run="r",reason="missing"}': "_x10 5x90",
            'ray_omni_rejects_total{run="r",reason="unreadable"}': "_x10 5x90",
            'ray_omni_utterances_total{run="r"}': "_x9 100+10x90",
        },
        fires=(12, 30),
        quiet=(5, 60),
    ),
    Case(
        "few recordings that are of no use",
        "OmniRejectsRising",
        {
            'ray_omni_rejects_total{run="r",reason="missing"}': "_x10 5x90",
            'ray_omni_utterances_total{run="r"}': "1000+100x90",
        },
        quiet=(5, 12, 30, 60),
    ),
    Case(
        "rejects of a run that has ended",
        "OmniRejectsRising",
        {
            'ray_omni_rejects_total{run="r",reason="missing"}': "0+1x30 30x90",
            'ray_omni_utterances_total{run="r"}': "0+10x30 300x90",
        },
        fires=(20,),
        quiet=(61, 90),
    ),
    Case(
        "a cache that becomes full",
        "OmniCacheFull",
        {'ray_omni_cache_full{run="r"}': "0x10 1x20 stale"},
        fires=(15,),
        quiet=(5, 40),
    ),
]


def _rules() -> dict[str, dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


def _promtool(*arguments: str) -> None:
    done = subprocess.run([binary("promtool"), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_are_well_formed() -> None:
    _promtool("check", "rules", str(ALERTS))


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    assert {case.alert for case in CASES if case.fires} == set(_rules())
    assert {case.alert for case in CASES if case.quiet} == set(_rules())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.alert}: {case.name}")
def test_an_alert_fires_when_it_should(case: Case, tmp_path: Path) -> None:
    rule = _rules()[case.alert]
    expected = {
        "exp_labels": {**rule["labels"], "run": "r"},
        "exp_annotations": {
            name: text.replace("{{ $labels.run }}", "r")
            for name, text in rule["annotations"].items()
        },
    }
    looks = [(minute, [expected]) for minute in case.fires]
    looks += [(minute, []) for minute in case.quiet]
    test = {
        "rule_files": [str(ALERTS)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {"series": name, "values": values} for name, values in case.series.items()
                ],
                "alert_rule_test": [
                    {"eval_time": f"{minute}m", "alertname": case.alert, "exp_alerts": alerts}
                    for minute, alerts in sorted(looks, key=lambda look: look[0])
                ],
            }
        ],
    }
    path = tmp_path / "alerts_test.yaml"
    path.write_text(yaml.safe_dump(test))
    _promtool("test", "rules", str(path))
