"""Adapters of TensorBoard, W&B, MLflow and SwanLab.

A package is imported when its tracker is opened, not before.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from omni.config import Config
from omni.errors import ConfigError
from omni.metrics.table import EVAL_METRICS, TRAIN_METRICS, Example
from omni.storage.path import ObjectPath, StoragePath

PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny", "swanlab": "swanlab"}  # by module
PROJECT = "omni"  # unless the environment names another
_UPLOAD_SECONDS = 30.0  # between two copies of TensorBoard's files into object storage
_MLFLOW_BATCH = 100  # parameters that MLflow accepts in one request


class Tracker(ABC):
    """Adapter of an open run of a tracker. An exception ends its part in the run.

    Methods that are not abstract do nothing where a package needs nothing.
    """

    def rewind(self, step: int) -> None:  # noqa: B027
        """Discard what was logged of `step` and later, if possible: those steps come again."""

    @abstractmethod
    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def examples(self, step: int, examples: Sequence[Example]) -> None:  # noqa: B027
        """Show references and hypotheses of an evaluation, if possible."""

    def flush(self) -> None:  # noqa: B027
        """Send what is buffered, where the package does not do so itself."""

    @abstractmethod
    def close(self, complete: bool) -> None: ...


def check_trackers(config: Config) -> None:
    """Raise ConfigError for a package that is not installed, or cannot store anything."""
    for name in config.run.trackers:
        if find_spec(name) is None:
            raise ConfigError(
                f"run.trackers: {name} is not installed here: pip install {PACKAGES[name]}"
            )
        server = os.environ.get("MLFLOW_TRACKING_URI")
        if name == "mlflow" and isinstance(config.run_dir, ObjectPath) and not server:
            raise ConfigError(
                "run.trackers: mlflow needs MLFLOW_TRACKING_URI where run.storage is a bucket: its "
                "own database is a file"
            )


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row of metrics.jsonl by their names in trackers: group/name."""
    table = EVAL_METRICS if row.get("kind") == "eval" else TRAIN_METRICS
    found: dict[str, Any] = {}
    for metric in table:
        if metric.curve and metric.name in row:
            found.update(flat(row[metric.name], metric.curve))
    return {name: float(v) for name, v in found.items() if _is_number(v)}


def results(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of summary.json by their names in trackers: summary/name."""
    return {name: float(v) for name, v in flat(summary, "summary").items() if _is_number(v)}


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Flatten nested mappings, with names joined by slashes."""
    if not isinstance(value, Mapping):
        return {name: value}
    nested = (flat(v, f"{name}/{k}" if name else str(k)) for k, v in value.items())
    return {key: item for part in nested for key, item in part.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _settings(config: Config) -> dict[str, Any]:
    """Return every setting by its dotted name, without credentials."""
    values = flat(yaml.safe_load(config.to_yaml()))
    return {key.replace("/", "."): value for key, value in values.items()}


class StagingFolder:
    """Local folder for packages that write files: `final` itself, or one that is uploaded there."""

    def __init__(self, final: StoragePath) -> None:
        self._final = final
        self._sizes: dict[Path, int] = {}
        if isinstance(final, Path):
            self.folder = final
        else:
            self._temporary = tempfile.TemporaryDirectory(prefix="omni-trackers-")
            self.folder = Path(self._temporary.name)

    def upload(self) -> None:
        """Upload files that are new or have grown. Raises OSError."""
        if isinstance(self._final, Path):
            return
        for path in sorted(self.folder.rglob("*")):
            if path.is_file() and self._sizes.get(path) != (size := path.stat().st_size):
                (self._final / path.relative_to(self.folder).as_posix()).upload(path)
                self._sizes[path] = size


class TensorBoard(Tracker):
    """A file of events is opened with the first row, and another after each rewind."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._staging = StagingFolder(config.run_dir / "tensorboard")
        self._uploaded = time.monotonic()
        self._first_step = 0
        self._writer: Any = None
        self._has_settings = False

    def rewind(self, step: int) -> None:
        self.close(False)
        self._first_step = step

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        writer = self._open()
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)

    def examples(self, step: int, examples: Sequence[Example]) -> None:
        lines = (
            f"    said   {' '.join(e['reference'].split())}\n"  # indented: not taken for markup
            f"    wrote  {' '.join(e['hypothesis'].split())}"
            for e in examples
        )
        self._open().add_text("dev/examples", "\n".join(lines), step)

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()
            if time.monotonic() - self._uploaded > _UPLOAD_SECONDS:
                self._staging.upload()
                self._uploaded = time.monotonic()

    def close(self, complete: bool) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._staging.upload()

    def _open(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides what earlier files hold of this step and later.
            self._writer = SummaryWriter(str(self._staging.folder), purge_step=self._first_step)
            if not self._has_settings:
                self._has_settings = True
                self._write_settings()
        return self._writer

    def _write_settings(self) -> None:
        from torch.utils.tensorboard.summary import hparams

        shown = self._config.to_yaml().replace("\n", "\n    ")
        self._writer.add_text("config", f"    {shown}", self._first_step)
        values = {
            name: value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
            for name, value in _settings(self._config).items()
        }
        for part in hparams(values, {"train/loss": 0, "dev/loss": 0, "dev/wer": 0}):
            self._writer.file_writer.add_summary(part)


class Wandb(Tracker):
    def __init__(self, config: Config, folder: Path, id: str | None) -> None:
        import wandb

        # A random part: a run of the same name may have been deleted and is trained again.
        self.id = id or f"{config.run.name[:100]}-{secrets.token_hex(4)}"
        self._table = wandb.Table
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=config.run.name,
            id=self.id,
            resume="allow",
            dir=str(folder),
            config=yaml.safe_load(config.to_yaml()),
            allow_val_change=True,
            settings=wandb.Settings(silent=True, console="off", init_timeout=60),
        )
        # W&B's own step cannot go back, as ours does after a crash, so ours is a metric.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def examples(self, step: int, examples: Sequence[Example]) -> None:
        rows = [[example["reference"], example["hypothesis"]] for example in examples]
        table = self._table(columns=["said", "wrote"], data=rows)
        self._run.log({"step": step, "dev/examples": table})

    def close(self, complete: bool) -> None:
        self._run.finish(exit_code=0 if complete else 1)


class Mlflow(Tracker):
    """Shows no examples: they would need a store for files, which not every server has."""

    def __init__(self, config: Config, folder: Path, id: str | None) -> None:
        # By default MLflow retries a silent server for a quarter of an hour.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        local = f"sqlite:///{config.run_dir.parent / 'mlflow.db'}"
        self._metric = Metric
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or local)
        if id is not None:
            self.id = id
            self._client.update_run(id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        self.id = self._client.create_run(experiment, run_name=config.run.name).info.run_id
        params = [Param(key, str(value)) for key, value in _settings(config).items()]
        for first in range(0, len(params), _MLFLOW_BATCH):
            self._client.log_batch(self.id, params=params[first : first + _MLFLOW_BATCH])

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            self._metric(re.sub(r"[^\w./ -]", "_", name), value, now, step)
            for name, value in scalars.items()
        ]
        self._client.log_batch(self.id, metrics=metrics)

    def close(self, complete: bool) -> None:
        self._client.set_terminated(self.id, status="FINISHED" if complete else "KILLED")


class SwanLab(Tracker):
    def __init__(self, config: Config, folder: Path, id: str | None) -> None:
        import swanlab

        self.id = id or secrets.token_hex(11)[:21]  # older versions require this length
        self._text = swanlab.Text
        self._run: Any = swanlab.init(
            project=os.environ.get("SWANLAB_PROJ_NAME", PROJECT),
            experiment_name=config.run.name,
            id=self.id,
            resume="allow",
            logdir=str(folder / "swanlab"),
            config=yaml.safe_load(config.to_yaml()),
        )

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def examples(self, step: int, examples: Sequence[Example]) -> None:
        texts = [self._text(f"said: {e['reference']}\nwrote: {e['hypothesis']}") for e in examples]
        self._run.log({"dev/examples": texts}, step=step)

    def close(self, complete: bool) -> None:
        self._run.finish() if complete else self._run.finish(state="aborted")


OPEN: dict[str, Callable[[Config, Path, str | None], Tracker]] = {
    "wandb": Wandb,
    "mlflow": Mlflow,
    "swanlab": SwanLab,
}
