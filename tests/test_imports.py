"""Rooms that never import Ray work where it is not installed."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys

import omni

WITH_RAY = {
    "omni.bench.block_speed",
    "omni.bench.stream_speed",
    "omni.cluster.job_client",
    "omni.cluster.node_check",
    "omni.cluster.node_probe",
    "omni.cluster.ray_errors",
    "omni.cluster.ray_init",
    "omni.cluster.ray_internals",
    "omni.cluster.ray_internals.core",
    "omni.cluster.ray_internals.data",
    "omni.cluster.ray_internals.train",
    "omni.metrics.prometheus",
    "omni.run.attempts",
    "omni.run.early_trial",
    "omni.run.encoder_actors",
    "omni.run.failures",
    "omni.run.fill_cache",
    "omni.run.gpu_memory",
    "omni.run.preflight",
    "omni.run.process_group",
    "omni.run.run",
    "omni.run.train_worker",
    "omni.run.trial",
    "omni.run.worker_group",
    "omni.serve.deploy",
    "omni.serve.replica",
    "omni.stream.pipeline",
    "omni.stream.streams",
    "omni.stream.window_server",
}


def _imports_without_ray(module: str) -> bool:
    code = f"import sys; sys.modules['ray'] = None; import {module}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_modules_outside_the_ray_rooms_import_without_ray() -> None:
    names = {module.name for module in pkgutil.walk_packages(omni.__path__, "omni.")}
    assert names >= WITH_RAY
    assert _imports_without_ray(", ".join(sorted(names - WITH_RAY)))


def test_processes_that_only_coordinate_do_not_import_torch() -> None:
    modules = "omni.stream.pipeline, omni.run.train_worker, omni.run.process_group"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_importing_the_pipeline_without_ray_fails() -> None:
    assert not _imports_without_ray("omni.stream.pipeline")
