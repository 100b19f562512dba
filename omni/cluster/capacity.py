"""Nodes of a cluster, and how many workers fit on them beside the encoders that feed them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from omni.config import Config

Bundle = Mapping[str, float]
Labels = Mapping[str, str]
_LOADER: Bundle = {"CPU": 1}
_NODE_ID = "ray.io/node-id"
"""Label that Ray gives to each node."""
_SEVERAL = re.compile(r"(!?)in\((.*)\)")


@dataclass(frozen=True)
class Node:
    """A node of the cluster; `leaving`: it is announced to be taken away."""

    id: str
    resources: Bundle
    leaving: bool = False
    labels: Labels = field(default_factory=dict)
    address: str = ""

    def has(self, labels: Labels) -> bool:
        """Tell whether it satisfies Ray's label selectors: a, !a, in(a,b), !in(a,b)."""
        return all(_satisfies(self.labels.get(name), wanted) for name, wanted in labels.items())


def _satisfies(value: str | None, wanted: str) -> bool:
    several = _SEVERAL.fullmatch(wanted)
    if several is not None:
        among = value in [name.strip() for name in several[2].split(",")]
        return among != bool(several[1])
    return value != wanted[1:] if wanted.startswith("!") else value == wanted


def selectors(config: Config) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Return the label selectors of workers, encoder actors and loaders.

    Of loaders, only `run.exclude_nodes` narrows them.
    """
    excluded = config.run.exclude_nodes
    apart = {_NODE_ID: f"!in({','.join(excluded)})"} if excluded else {}
    return {**config.train.labels, **apart}, {**config.encoder.labels, **apart}, apart


def exclude_nodes(config: Config, ids: Iterable[str]) -> Config:
    """Add nodes to `run.exclude_nodes`."""
    excluded = [*dict.fromkeys([*config.run.exclude_nodes, *ids])]
    run = config.run.model_copy(update={"exclude_nodes": excluded})
    return config.model_copy(update={"run": run})


def cluster_nodes() -> list[Node]:
    """List the living nodes of the cluster that this process is connected to."""
    import ray

    from omni.cluster.ray_internals.core import draining_node_ids

    leaving = draining_node_ids()
    return [
        Node(
            node["NodeID"],
            node["Resources"],
            node["NodeID"] in leaving,
            node.get("Labels") or {},
            node["NodeManagerAddress"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def free_nodes() -> list[Node]:
    """List the living nodes with what other jobs leave of their resources."""
    from omni.cluster.ray_internals.core import used_by_other_jobs

    used = used_by_other_jobs()
    return [
        replace(node, resources=_minus(node.resources, used.get(node.id, {})))
        for node in cluster_nodes()
    ]


def _minus(resources: Bundle, used: Bundle) -> dict[str, float]:
    return {name: max(0.0, n - used.get(name, 0.0)) for name, n in resources.items()}


@dataclass(frozen=True)
class Demand:
    """Resources that a run asks a cluster for, per worker, encoder actor and loader."""

    worker: Bundle
    encoder: Bundle
    encoders: int
    loaders: int
    worker_labels: Labels = field(default_factory=dict)
    encoder_labels: Labels = field(default_factory=dict)
    loader_labels: Labels = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config) -> Demand:
        encoder, train = config.encoder, config.train
        return cls(
            bundle(train.cpus, train.gpus),
            bundle(encoder.cpus, encoder.gpus),
            encoder.actor_count,
            config.data.loaders,
            *selectors(config),
        )

    def fits(self, nodes: Sequence[Node], workers: int, encoders: int, loaders: int) -> bool:
        """Check that so many fit on nodes with their labels that are not leaving."""
        bundles = [(self.worker, self.worker_labels)] * workers
        bundles += [(self.encoder, self.encoder_labels)] * encoders
        bundles += [(_LOADER, self.loader_labels)] * loaders
        return _fit(_staying(nodes), bundles)

    def holds_worker(self, node: Node) -> bool:
        """Tell whether a worker fits on a node on which nothing else runs."""
        return _fit([node], [(self.worker, self.worker_labels)])


def bundle(cpus: float, gpus: float) -> dict[str, float]:
    return {"CPU": cpus, **({"GPU": gpus} if gpus else {})}


def workers_that_fit(nodes: Sequence[Node], demand: Demand, least: int, most: int) -> int:
    """Count the workers, `least` to `most`, that leave room for all encoders and loaders.

    Where not even `least` do, count those that leave room for one of each; 0 where none fit.
    One loader more is counted than will run, because Ray does not place bundles as tightly.
    """
    for encoders, loaders in ((demand.encoders, demand.loaders), (1, 1)):
        for workers in range(most, least - 1, -1):
            if demand.fits(nodes, workers, encoders, loaders + 1):
                return workers
    return 0


def stages_that_fit(nodes: Sequence[Node], demand: Demand, workers: int) -> tuple[int, int]:
    """Count the loaders and the encoders that fit beside so many workers: at least one of both."""

    def most(wanted: int, fits: Callable[[int], bool]) -> int:
        return next((count for count in range(wanted, 1, -1) if fits(count)), 1)

    encoders = most(demand.encoders, lambda count: demand.fits(nodes, workers, count, 1))
    loaders = most(demand.loaders, lambda count: demand.fits(nodes, workers, encoders, count))
    return loaders, encoders


def shortage(nodes: Sequence[Node], demand: Demand, least: int, most: int) -> str | None:
    """Explain why `least` workers and all encoders cannot run together, naming the settings.

    None where they can. Loaders use the CPUs that are left, and need one.
    """
    if demand.fits(nodes, least, demand.encoders, 1):
        return None
    nodes = [node for node in nodes if node.has(demand.loader_labels)]
    if not nodes:
        return "run.exclude_nodes: no node is left"
    cluster = f"the cluster has {describe_resources(nodes)}"
    for setting, need, labels in (
        ("train", demand.worker, demand.worker_labels),
        ("encoder", demand.encoder, demand.encoder_labels),
    ):
        if labels and not any(node.has(labels) for node in nodes):
            own = {name: value for name, value in labels.items() if name != _NODE_ID}
            wanted = ",".join(f"{name}={value}" for name, value in own.items())
            return f"{setting}.labels: no node has {wanted} (ray start --labels {wanted})"
        if not _fit(_staying(nodes), [(need, labels)]):
            gpus = need.get("GPU", 0)
            what = "gpus" if gpus and not any(n.resources.get("GPU") for n in nodes) else "cpus"
            one = "a worker" if setting == "train" else "an encoder"
            return f"{setting}.{what}: no node has the {_bundle_text(need)} of {one}; {cluster}"
    workers = f"train.workers {least if least == most else f'[{least}, {most}]'}"
    if not demand.fits(nodes, least, 0, 1):
        return f"{workers}: {least} x {_bundle_text(demand.worker)} do not fit; {cluster}"
    room = next(n for n in range(demand.encoders, -1, -1) if demand.fits(nodes, least, n, 1))
    encoders = f"encoder.actors {demand.encoders} x {_bundle_text(demand.encoder)}"
    return f"{encoders}: beside {workers} there is room for {room or 'none'}; {cluster}"


def _staying(nodes: Sequence[Node]) -> list[Node]:
    return [node for node in nodes if not node.leaving]


def describe_resources(nodes: Sequence[Node]) -> str:
    """Return the sum of the nodes' GPUs and CPUs in words."""
    total = {name: sum(n.resources.get(name, 0) for n in nodes) for name in ("GPU", "CPU")}
    return f"{_bundle_text(total)} on {len(nodes)} node{'' if len(nodes) == 1 else 's'}"


def _bundle_text(of: Mapping[str, float]) -> str:
    gpus, cpus = of.get("GPU", 0), of.get("CPU", 0)
    parts = [f"{gpus:g} GPU{_plural(gpus)}"] if gpus or "GPU" in of else []
    return " and ".join([*parts, f"{cpus:g} CPU{_plural(cpus)}"])


def _plural(count: float) -> str:
    return "" if 0 < count <= 1 else "s"


def _fit(nodes: Sequence[Node], bundles: Sequence[tuple[Bundle, Labels]]) -> bool:
    """Place bundles first-fit: those with most labels first, then the largest."""
    free = [(node, dict(node.resources)) for node in nodes]

    def difficulty(item: tuple[Bundle, Labels]) -> tuple[int, float, float]:
        need, labels = item
        return -len(labels), -need.get("GPU", 0.0), -need.get("CPU", 0.0)

    for need, labels in sorted(bundles, key=difficulty):
        for node, left in free:
            if node.has(labels) and all(
                left.get(name, 0.0) >= amount - 1e-9 for name, amount in need.items()
            ):
                for name, amount in need.items():
                    left[name] = left.get(name, 0.0) - amount
                break
        else:
            return False
    return True
