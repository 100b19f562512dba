"""Check the cluster before training: room, nodes, their storage, a block through all stages.

The last also gives an estimate of the training time.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from omni.cluster.capacity import (
    Demand,
    Node,
    cluster_nodes,
    exclude_nodes,
    free_nodes,
    shortage,
    workers_that_fit,
)
from omni.cluster.node_check import check_nodes
from omni.cluster.ray_init import owns_cluster
from omni.cluster.ray_internals.core import autoscaler_limits
from omni.config import Config
from omni.config.plug_in import is_plug_in, load_plug_in
from omni.corpus.index_row import recordings
from omni.errors import ConfigError, counted, first_line
from omni.metrics.run_files import write_event
from omni.run.actor_count import assume_actors, is_auto
from omni.run.early_trial import EarlyTrial
from omni.run.encoder_actors import resolve_encoder_actors
from omni.run.encoder_need import missing_share
from omni.run.estimate import Estimate, estimate
from omni.run.prepare import Prepared
from omni.run.rates import Cost
from omni.run.trial import Trial, try_pipe
from omni.storage.flat_folder import open_folder
from omni.storage.path import StoragePath
from omni.storage.uri import reason_of, redact
from omni.stream.stream_settings import stream_settings

_SETTLE_SECONDS = 15.0  # Nodes of a new cluster may still be joining.
_NODE_SECONDS = 60.0  # timeout of the check on a node


def preflight(
    prepared: Prepared,
    say: Callable[[str], None],
    *,
    trial: bool,
    early: EarlyTrial | None = None,
    dry: bool = False,
) -> Prepared:
    """Check the plan against the cluster; with `encoder.actors: auto`, choose their number.

    Nodes that are not in order join `run.exclude_nodes` of the config that is returned.
    trial: also run a block through all stages and estimate the training time; a continued run does
    without. early: the trial, where it has begun already. dry: also show the memory that a worker
    needs where it is compared with nothing. Raises ConfigError naming the setting, and RuntimeError
    if the block fails.
    """
    auto = is_auto(prepared.config)
    step = 0 if prepared.resume is None else prepared.resume.state.step

    def leave_out(node: Node, reason: str) -> None:
        say(f"  node {node.address} ({node.id[:12]}) is left out: {reason}")
        if not dry:
            reason = f"{node.address}: {reason}"
            write_event(prepared.config.run_dir, "node left out", step, node=node.id, reason=reason)

    present = {node.id for node in cluster_nodes()}
    for id in prepared.config.run.exclude_nodes:
        if id not in present:
            say(f"  run.exclude_nodes: the cluster has no node {id}")
    _check_room(assume_actors(prepared.config, 1))
    if prepared.config.run.check_nodes:
        prepared = replace(prepared, config=_without_bad_nodes(prepared.config, say, leave_out))
    assumed = replace(prepared, config=assume_actors(prepared.config, 1))
    _check_storage(assumed)
    if not trial and not auto:
        return prepared

    def show_memory(block: pa.Table) -> None:
        if dry or (trial and prepared.config.train.gpus):
            # Torch's fake tensors take a second to import.
            from omni.run.gpu_memory import check_memory

            say(f"  {check_memory(prepared, block)}")

    if early is not None:
        tried = early.result()
    else:
        seconds, blocks = (2.0, 8) if auto else (0.0, 2)
        tried = try_pipe(assumed, seconds, blocks, show_memory)
    missing = _missing(prepared)
    if auto:
        prepared = resolve_encoder_actors(prepared, tried, missing)
    if tried.block is None:
        return prepared
    expected = _estimate(prepared, tried, tried.block, missing)
    say(f"  before the start: a block came through; {expected}")
    return replace(prepared, estimate=expected)


# -- room --------------------------------------------------------------------------------------


def _check_room(config: Config, faults: str = "") -> None:
    """Raise ConfigError if workers and encoders do not fit into the cluster.

    faults: nodes that were left out, with their reasons.
    """
    least, most = config.train.least, config.train.most
    demand = Demand.of(config)
    deadline = time.monotonic() + (_SETTLE_SECONDS if os.environ.get("RAY_ADDRESS") else 0)
    while (problem := shortage(cluster_nodes(), demand, least, most)) is not None:
        if _will_grow(demand, least):
            return
        if time.monotonic() > deadline:
            raise ConfigError(problem + faults)
        time.sleep(1.0)


def _will_grow(demand: Demand, workers: int) -> bool:
    """Tell whether the autoscaler may add enough resources."""
    limits = autoscaler_limits()
    if limits is None:
        return False
    return all(
        demand.worker.get(name, 0) * workers + demand.encoder.get(name, 0) * demand.encoders
        <= limits.get(name, 0)
        for name in ("GPU", "CPU")
    )


# -- nodes -------------------------------------------------------------------------------------


def _without_bad_nodes(
    config: Config, say: Callable[[str], None], leave_out: Callable[[Node, str], None]
) -> Config:
    """Check all nodes that may hold a stage; exclude from the run those that are not in order.

    leave_out: called with each of them and its reason. Raises ConfigError if there is no room
    without them.
    """
    uses_gpus = bool(config.train.gpus or config.encoder.gpus)
    if owns_cluster() and not uses_gpus:
        return config  # The trial computes on the same CPUs.
    began, demand = time.monotonic(), Demand.of(assume_actors(config, 1))
    nodes = [
        node
        for node in cluster_nodes()
        if node.resources.get("CPU") and not node.leaving and node.has(demand.loader_labels)
    ]
    ranks = [n.id for n in nodes if config.train.most > 1 and demand.holds_worker(n)]
    free = {node.id: int(node.resources.get("GPU", 0)) for node in free_nodes()}
    report = check_nodes(nodes, ranks, free if uses_gpus else None)
    for note in report.notes:
        say(f"  {note}")
    if report.apart is not None:
        raise ConfigError(
            f"train.workers: {report.apart}; expected a network between them (docs/cluster.md), or "
            "run.check_nodes false"
        )
    named = {node.id: node for node in nodes}
    for id, reason in report.faults.items():
        leave_out(named[id], reason)
    counts = f"{counted(len(nodes), 'node')} checked in {time.monotonic() - began:.1f} s"
    say(f"  {counts}" + (f", {len(report.faults)} left out" if report.faults else ""))
    if report.faults:
        config = exclude_nodes(config, report.faults)
        reasons = (f"node {named[id].address}: {text}" for id, text in report.faults.items())
        _check_room(assume_actors(config, 1), f"; left out: {'; '.join(reasons)}")
    return config


def _check_storage(prepared: Prepared) -> None:
    """Raise ConfigError if another node lacks the run's storage, cache, data or weights."""
    here = ray.get_runtime_context().get_node_id()
    # A plug-in must be found by workers of this node too, whose working directory is another one.
    own = bool(_plug_ins(prepared.config))
    used = Demand.of(prepared.config).loader_labels
    nodes = [n for n in cluster_nodes() if n.resources.get("CPU") and n.has(used)]
    nodes = [n for n in nodes if n.id != here or own]
    config, word = prepared.config, uuid.uuid4().hex
    seen = {node.id: config.run_dir / f".preflight-{node.id[:12]}" for node in nodes}
    answers = {}
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node.id, soft=False)
        look: Any = ray.remote(_look).options(
            num_cpus=0, scheduling_strategy=strategy, max_retries=1
        )
        answers[node.id] = look.remote(
            seen[node.id], word, config.cache, _needed(prepared), _plug_ins(config)
        )
    for node in nodes:
        try:
            problem = ray.get(answers[node.id], timeout=_NODE_SECONDS)
        except ray.exceptions.RayError as error:
            raise RuntimeError(
                f"node {node.address} does not answer: {first_line(error)}"
            ) from None
        if problem is None:
            problem = _not_shared(seen[node.id], word, config)
        if problem is not None:
            raise ConfigError(problem.format(node=node.address))


def _needed(prepared: Prepared) -> dict[str, str]:
    """Return one local file for each setting whose files every node reads."""
    config = prepared.config
    first = recordings(prepared.splits["train"].table.slice(0, 1).to_pylist()[0])[0]
    needed = {"data.train": first["uri"]}
    augmentation = prepared.splits["train"].augmentation
    if augmentation is not None:
        for clips in (augmentation.noise, augmentation.rooms):
            needed |= {f"augment.{clips.kind}": clip.uri for clip in clips.clips[:1]}
    if config.encoder.weights not in ("hub", "embedded"):
        needed["encoder.weights"] = config.encoder.weights
    kind, _, name = config.model.lm.partition(":")
    if kind == "nanochat" or Path(name).is_absolute():
        needed["model.lm"] = name.partition("@")[0]
    return {name: path for name, path in needed.items() if "://" not in path}


def _plug_ins(config: Config) -> list[tuple[str, str]]:
    """List the plug-ins that every node imports, with their settings."""
    projector = config.model.projector or ""
    return [
        *[("model.projector", projector)] * is_plug_in(projector),
        *(("augment.effects", name) for name in config.augment.effects),
        *(("eval.metrics", name) for name in config.eval.metrics),
    ]


def _look(
    mark: StoragePath,
    word: str,
    cache: str | None,
    needed: dict[str, str],
    plug_ins: Sequence[tuple[str, str]] = (),
) -> str | None:
    """Check storage, files and plug-ins on a node; return the problem, with {node} for its address.

    Writes `word` into `mark`, which the driver reads.
    """
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(word)
    except OSError as error:
        return f"run.storage: node {{node}} cannot write {mark.parent}: {reason_of(error)}"
    try:
        if cache is not None:
            open_folder(cache).list()
            if "://" not in cache:
                probe = Path(cache) / mark.name
                probe.parent.mkdir(parents=True, exist_ok=True)
                probe.touch()
                probe.unlink()
    except OSError as error:
        reason = reason_of(error)
        return f"data.cache: node {{node}} cannot use {redact(cache or '')}: {reason}"
    for setting, path in needed.items():
        if not os.path.exists(path):
            return f"{setting}: node {{node}} does not see {path}; expected it on every node"
    for setting, name in plug_ins:
        try:
            load_plug_in(name, setting)
        except ConfigError as error:
            text = str(error).removeprefix(f"{setting}: ").replace("{", "{{").replace("}", "}}")
            return f"{setting}: node {{node}}: {text}"
    return None


def _not_shared(mark: StoragePath, word: str, config: Config) -> str | None:
    """Return the problem if `mark`, which a node wrote, cannot be read here."""
    deadline = time.monotonic() + 5  # Network file systems show new files late.
    while True:
        try:
            if mark.read_text() == word:
                mark.unlink()
                return None
        except OSError:
            pass
        if time.monotonic() > deadline:
            return (
                f"run.storage: what node {{node}} writes into {config.run_dir} is not seen here; "
                "expected a folder that all nodes share"
            )
        time.sleep(0.2)


# -- how long ----------------------------------------------------------------------------------


def _missing(prepared: Prepared) -> float:
    """Return the share of the training audio that will be encoded, of the first window if many."""
    settings = stream_settings(prepared.config, prepared.encoder)
    cache = settings.open_cache()
    if cache is None:
        return 1.0
    split = prepared.splits["train"]
    share = missing_share(split.table, np.unique(split.beginning.members), settings, cache)
    return 1 - (1 - share) * prepared.config.augment.clean_share


def _estimate(prepared: Prepared, tried: Trial, block: Cost, missing: float) -> Estimate:
    config, split = prepared.config, prepared.splits["train"]
    train, found = config.train, free_nodes()
    alone = len(found) == 1 and not (train.gpus or config.encoder.gpus)
    return estimate(
        config,
        split.beginning,
        split.table["samples"].to_numpy(),
        workers=max(1, workers_that_fit(found, Demand.of(config), train.least, train.most)),
        encoders=config.encoder.actor_count,
        decode_rate=tried.decode_rate,
        encoder_rate=tried.encoder_rate,
        block=block,
        missing=missing,
        cores=float(os.cpu_count() or 1) if alone else None,
    )
