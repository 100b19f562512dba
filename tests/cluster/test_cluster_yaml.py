"""The files that make clusters: cluster.yaml by Ray's own checks, the RayJob by its settings."""

from __future__ import annotations

import re
import shlex
import subprocess
from importlib.metadata import version
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import drain_node

from jobs import train
from omni.config import Config, load_config
from tests.helpers.clusters import ROOT

INSTALLED = "/home/ray/omni"  # where the image of the RayJob keeps this folder


def _written(text: str) -> dict[str, Any]:
    """cluster.yaml with one of its two halves, as Ray completes and accepts it."""
    config = prepare_config(yaml.safe_load(text))
    validate_config(config)
    return config


def _halves() -> tuple[str, str]:
    """Machines of one's own; and AWS, with the comment marks taken away as its heading says."""
    text = (ROOT / "cluster.yaml").read_text()
    own, _, aws = text.partition("\n# cluster_name:")
    lines = f"# cluster_name:{aws}".splitlines()
    assert aws and all(line.startswith("#") for line in lines)
    return own, "\n".join(re.sub("^# ?", "", line) for line in lines)


def test_ray_accepts_the_cluster_of_own_machines() -> None:
    config = _written(_halves()[0])
    assert config["provider"]["type"] == "local"
    (kind,) = config["available_node_types"].values()
    assert kind["min_workers"] == len(config["provider"]["worker_ips"])


def test_ray_accepts_the_cluster_on_aws() -> None:
    config = _written(_halves()[1])
    kinds = config["available_node_types"]
    assert {name: kind.get("labels") for name, kind in kinds.items()} == {
        "head": None,
        "encoder": {"pool": "encoder"},
        "trainer": {"pool": "trainer"},
    }
    assert sum(kind["max_workers"] for kind in kinds.values()) == config["max_workers"]
    assert f":{version('ray')}-" in config["docker"]["image"]


@pytest.mark.parametrize("half", [0, 1], ids=["own machines", "aws"])
def test_every_node_asks_for_the_token(half: int) -> None:
    config = _written(_halves()[half])
    assert "~/.ray/auth_token" in config["file_mounts"]
    for role in ("head", "worker"):
        (start,) = [c for c in config[f"{role}_start_ray_commands"] if "ray start" in c]
        assert "RAY_AUTH_MODE=token" in start


def _rayjob() -> dict[str, Any]:
    job: dict[str, Any] = yaml.safe_load((ROOT / "configs/kuberay/rayjob.yaml").read_text())
    return job


def _pools(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        group["groupName"]: group for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    }


def _settings(job: dict[str, Any]) -> Config:
    """What the entrypoint asks for, by the file of this folder that it names."""
    python, flag, module, option, path, *overrides = shlex.split(job["spec"]["entrypoint"])
    assert (python, flag, module, option) == ("python", "-m", train.__name__, "--config")
    return load_config(path.replace(INSTALLED, str(ROOT)), overrides)


def _total(group: dict[str, Any], resource: str) -> int:
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert limits == container["resources"]["requests"]
    return int(group["replicas"]) * int(limits[resource])


def test_the_rayjob_has_room_for_the_run_that_it_starts() -> None:
    job = _rayjob()
    config, pools = _settings(job), _pools(job)
    assert pools["encoder"]["labels"] == config.encoder.labels != {}
    assert pools["trainer"]["labels"] == config.train.labels != {}
    assert isinstance(config.encoder.actors, int)
    wanted = {
        "encoder": config.encoder.actors * config.encoder.gpus,
        "trainer": config.train.most * config.train.gpus,
    }
    assert {name: _total(group, "nvidia.com/gpu") for name, group in pools.items()} == wanted
    cpus = {name: _total(group, "cpu") for name, group in pools.items()}
    encoding, training = config.encoder.actors * config.encoder.cpus, config.train.most
    assert cpus["encoder"] > encoding and cpus["trainer"] > training * config.train.cpus
    assert sum(cpus.values()) > encoding + training * config.train.cpus + config.data.loaders


def test_every_pod_of_the_rayjob_sees_the_runs() -> None:
    job = _rayjob()
    config, cluster = _settings(job), job["spec"]["rayClusterSpec"]
    for group in [cluster["headGroupSpec"], *_pools(job).values()]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        (place,) = [path for path in mounts if str(config.run_dir).startswith(f"{path}/")]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert "persistentVolumeClaim" in volumes[mounts[place]]
        assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory"}


def test_a_pod_with_stages_drains_its_node_before_it_ends() -> None:
    for group in _pools(_rayjob()).values():
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        shell, flag, script = container["lifecycle"]["preStop"]["exec"]["command"]
        assert subprocess.run([shell, "-n", flag, script]).returncode == 0
        drain = shlex.split(script.partition(";")[0])
        assert drain[:4] == ["timeout", "20", "ray", "drain-node"]
        allowed = int(drain[drain.index("--deadline-remaining-seconds") + 1])
        assert allowed < pod["terminationGracePeriodSeconds"]
        options = drain[4::2]
        assert set(options) <= {o for p in drain_node.params for o in p.opts}
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_the_rayjob_asks_for_this_ray_and_for_a_token() -> None:
    job = _rayjob()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == version("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    variables = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]
    assert all(isinstance(value, str) for value in variables.values())
    assert float(variables["RAY_JOB_STOP_WAIT_TIME_S"]) > _settings(job).run.grace_seconds
