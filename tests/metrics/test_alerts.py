"""The alert rules, by promtool: each fires when it should, and not otherwise."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
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
    labels: those of the alert besides its severity.
    """

    name: str
    alert: str
    series: dict[str, str]
    fires: tuple[int, ...] = ()
    quiet: tuple[int, ...] = ()
    labels: Mapping[str, str] = field(default_factory=lambda: {"run": "r"})


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
    Case(
        "a driver that is killed",
        "OmniDied",
        {'ray_omni_driver_began{run="r",WorkerId="a"}': "1000x30 stale"},
        fires=(43, 100, 300),
        quiet=(20, 38, 400),
    ),
    Case(
        "a driver that ends with the plan trained, on a cluster that ends with it",
        "OmniDied",
        {
            'ray_omni_driver_began{run="r",WorkerId="a"}': "1000x30 stale",
            'ray_omni_driver_ended_total{run="r",WorkerId="a"}': "_x29 1000x2 stale",
        },
        quiet=(20, 38, 43, 100, 300),
    ),
    Case(
        "a driver that is killed after an earlier one was stopped by a signal",
        "OmniDied",
        {
            'ray_omni_driver_began{run="r",WorkerId="a"}': "1000x30 stale",
            'ray_omni_driver_ended_total{run="r",WorkerId="a"}': "_x29 1000x300",
            'ray_omni_driver_began{run="r",WorkerId="b"}': "_x60 4600x30 stale",
        },
        fires=(105, 200),
        quiet=(50, 59, 80, 95),
    ),
    Case(
        "a driver that is killed, and one that continues its run to the end",
        "OmniDied",
        {
            'ray_omni_driver_began{run="r",WorkerId="a"}': "1000x30 stale",
            'ray_omni_driver_began{run="r",WorkerId="b"}': "_x60 4600x30 stale",
            'ray_omni_driver_ended_total{run="r",WorkerId="b"}': "_x89 4600x300",
        },
        fires=(50,),
        quiet=(38, 62, 80, 100, 200),
    ),
    Case(
        "a driver that another run's does not replace",
        "OmniDied",
        {
            'ray_omni_driver_began{run="r",WorkerId="a"}': "1000x30 stale",
            'ray_omni_driver_began{run="s",WorkerId="b"}': "4600x300",
            'ray_omni_driver_ended_total{run="t",WorkerId="c"}': "5000x300",
        },
        fires=(50,),
    ),
    Case(
        "six attempts in half an hour, of two drivers",
        "OmniRestarts",
        {
            'ray_omni_attempts_total{run="r",WorkerId="a"}': "1x9 2x9 3x90",
            'ray_omni_attempts_total{run="r",WorkerId="b"}': "_x30 1x4 2x4 3x90",
        },
        fires=(45, 58),
        quiet=(25, 35, 75, 100),
    ),
    Case(
        "an attempt every twenty minutes",
        "OmniRestarts",
        {'ray_omni_attempts_total{run="r",WorkerId="a"}': "1x19 2x19 3x19 4x19 5x19 6x19 7x90"},
        quiet=(30, 70, 110, 150),
    ),
    Case(
        "storage that refuses the first checkpoint, and takes it a minute later",
        "OmniCheckpointFailing",
        {'ray_omni_checkpoint_failures_total{run="r"}': "_x20 1 30x90"},
        fires=(21, 28),
        quiet=(10, 35),
    ),
    Case(
        "checkpoints that do not come any more",
        "OmniCheckpointOld",
        {
            'ray_omni_step{run="r"}': "0+10x90",
            'ray_omni_checkpoint_step{run="r"}': "0x9 100x9 200x90",
            'ray_omni_checkpoint_every{run="r"}': "100x90",
        },
        fires=(48, 80),
        quiet=(15, 25, 39, 44),
    ),
    Case(
        "steps of minutes, and no checkpoint for hours",
        "OmniCheckpointOld",
        {
            'ray_omni_step{run="r"}': "0+1x400",
            'ray_omni_steps{run="r"}': "1000x400",
            'ray_omni_checkpoint_time{run="r"}': "0x400",
            'ray_omni_checkpoint_step{run="r"}': "0x400",
            'ray_omni_checkpoint_every{run="r"}': "500x400",
        },
        fires=(250,),
        quiet=(60, 235),
    ),
    Case(
        "the scoring of a run whose plan is trained",
        "OmniCheckpointOld",
        {
            'ray_omni_step{run="r"}': "1000x400",
            'ray_omni_steps{run="r"}': "1000x400",
            'ray_omni_checkpoint_time{run="r"}': "0x400",
            'ray_omni_checkpoint_step{run="r"}': "1000x400",
            'ray_omni_checkpoint_every{run="r"}': "500x400",
        },
        quiet=(250, 390),
    ),
    Case(
        "a checkpoint that takes 6 of 10 minutes",
        "OmniCheckpointSlow",
        {
            'ray_omni_step{run="r"}': "0+10x90",
            'ray_omni_checkpoint_every{run="r"}': "100x90",
            'ray_omni_checkpoint_write_seconds{run="r"}': "_x10 60x10 360x30 240x90",
        },
        fires=(35, 50),
        quiet=(15, 28, 60, 80),
    ),
    Case(
        "one slow rank of two",
        "OmniStraggler",
        {
            'ray_omni_rank_step_seconds{run="r",rank="0"}': "1x90",
            'ray_omni_rank_step_seconds{run="r",rank="1"}': "1.2x10 2x30 1x50",
        },
        fires=(30, 40),
        quiet=(9, 20, 45),
        labels={"run": "r", "rank": "1"},
    ),
    Case(
        "a slow rank among those of a slow node",
        "OmniStraggler",
        {
            **{f'ray_omni_rank_step_seconds{{run="r",rank="{rank}"}}': "1x60" for rank in range(4)},
            'ray_omni_rank_step_seconds{run="r",rank="4"}': "1.6x60",
            **{f'ray_omni_rank_step_seconds{{run="r",rank="{n}"}}': "1.45x60" for n in (5, 6, 7)},
            'ray_omni_rank_step_seconds{run="fast",rank="0"}': "0.1x60",
        },
        fires=(30,),
        labels={"run": "r", "rank": "4"},
    ),
    Case(
        "blocks on disk while a run trains, and after it",
        "OmniSpilling",
        {
            'ray_object_store_memory{Location="SPILLED",NodeId="n"}': "0x10 5e9x100",
            'ray_object_store_memory{Location="MMAP_SHM",NodeId="n"}': "5e9x100",
            'ray_omni_driver_began{run="r"}': "1000x40 stale",
        },
        fires=(25, 40),
        quiet=(9, 18, 50),
        labels={"Location": "SPILLED"},
    ),
    Case(
        "a GPU that is full for a while",
        "OmniGpuMemory",
        {
            'ray_omni_gpu_free_bytes{run="r",rank="3",WorkerId="a"}': "40e9x10 1e9x30 8e9x30",
            'ray_omni_gpu_size_bytes{run="r",rank="3",WorkerId="a"}': "80e9x70",
            'ray_omni_gpu_free_bytes{run="r",rank="2",WorkerId="b"}': "8e9x70",
            'ray_omni_gpu_size_bytes{run="r",rank="2",WorkerId="b"}': "80e9x70",
        },
        fires=(25, 40),
        quiet=(9, 18, 45),
        labels={"run": "r", "rank": "3"},
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
        "exp_labels": {**rule["labels"], **case.labels},
        "exp_annotations": {
            name: re.sub(r"{{ \$labels\.(\w+) }}", lambda label: case.labels[label[1]], text)
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
