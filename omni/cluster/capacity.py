"""How many workers a cluster has room for, beside the encoders that feed them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from omni.config import Config

Bundle = Mapping[str, float]
Labels = Mapping[str, str]
_LOADER: Bundle = {"CPU": 1}


@dataclass(frozen=True)
class Node:
    id: str
    resources: Bundle
    leaving: bool = False  # announced to be taken away
    labels: Labels = field(default_factory=dict)
    address: str = ""

    def has(self, labels: Labels) -> bool:
        return all(self.labels.get(name) == value for name, value in labels.items())


@dataclass(frozen=True)
class Demand:
    """What a run asks a cluster for, besides its number of workers."""

    worker: Bundle
    encoder: Bundle
    encoders: int
    loaders: int
    worker_labels: Labels = field(default_factory=dict)
    encoder_labels: Labels = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config) -> Demand:
        encoder, train = config.encoder, config.train
        return cls(
            bundle(train.cpus, train.gpus),
            bundle(encoder.cpus, encoder.gpus),
            encoder.actor_count,
            config.data.loaders,
            train.labels,
            encoder.labels,
        )

    def fits(self, nodes: Sequence[Node], workers: int, encoders: int, loaders: int) -> bool:
        """Whether so many find a place on nodes that have their labels and are here to stay."""
        bundles = [(self.worker, self.worker_labels)] * workers
        bundles += [(self.encoder, self.encoder_labels)] * encoders
        bundles += [(_LOADER, {})] * loaders
        return _packs([node for node in nodes if not node.leaving], bundles)


def bundle(cpus: float, gpus: float) -> dict[str, float]:
    return {"CPU": cpus, **({"GPU": gpus} if gpus else {})}


def workers_that_fit(nodes: Sequence[Node], demand: Demand, least: int, most: int) -> int:
    """The largest number of workers, `least` to `most`, that leaves room for all encoders and
    loaders; where there is none, for one of each. 0 where not even that fits.

    One loader more is counted than will run: Ray does not place things as tightly as this does.
    """
    for encoders, loaders in ((demand.encoders, demand.loaders), (1, 1)):
        for workers in range(most, least - 1, -1):
            if demand.fits(nodes, workers, encoders, loaders + 1):
                return workers
    return 0


def shortage(nodes: Sequence[Node], demand: Demand, least: int, most: int) -> str | None:
    """Why `least` workers and all encoders cannot be at work together, naming the settings; None
    where they can. Loaders take what CPUs are left, and need one.
    """
    if demand.fits(nodes, least, demand.encoders, 1):
        return None
    cluster = f"the cluster has {_told(nodes)}"
    for setting, need, labels in (
        ("train", demand.worker, demand.worker_labels),
        ("encoder", demand.encoder, demand.encoder_labels),
    ):
        if labels and not any(node.has(labels) for node in nodes):
            wanted = ",".join(f"{name}={value}" for name, value in labels.items())
            return f"{setting}.labels: no node has {wanted} (ray start --labels {wanted})"
        if not _packs([node for node in nodes if not node.leaving], [(need, labels)]):
            gpus = need.get("GPU", 0)
            what = "gpus" if gpus and not any(n.resources.get("GPU") for n in nodes) else "cpus"
            one = "a worker" if setting == "train" else "an encoder"
            return f"{setting}.{what}: no node has the {_bundle_text(need)} of {one}; {cluster}"
    range_text = str(least) if least == most else f"[{least}, {most}]"
    asked = f"{least} x {_bundle_text(demand.worker)}"
    encoders = f"encoder.actors {demand.encoders} x {_bundle_text(demand.encoder)}"
    if not demand.fits(nodes, least, 0, 1):
        return f"train.workers {range_text}: {asked} do not fit; {cluster}"
    room = next(n for n in range(demand.encoders, -1, -1) if demand.fits(nodes, least, n, 1))
    expected = f"room for {room}" if room else "room for none"
    return f"{encoders} would starve: beside train.workers {range_text} is {expected}; {cluster}"


def _told(nodes: Sequence[Node]) -> str:
    total: Counter[str] = Counter()
    for node in nodes:
        for name in ("GPU", "CPU"):
            total[name] += node.resources.get(name, 0)  # type: ignore[assignment]  # may be 0.5
    one = len(nodes) == 1
    return f"{_bundle_text(total)} on {len(nodes)} node{'' if one else 's'}"


def _bundle_text(of: Mapping[str, float]) -> str:
    gpus, cpus = of.get("GPU", 0), of.get("CPU", 0)
    parts = [f"{gpus:g} GPU{_plural(gpus)}"] if gpus or "GPU" in of else []
    return " and ".join([*parts, f"{cpus:g} CPU{_plural(cpus)}"])


def _plural(count: float) -> str:
    return "" if 0 < count <= 1 else "s"


def _packs(free: Sequence[Node], bundles: Sequence[tuple[Bundle, Labels]]) -> bool:
    """First fit; what may go to some nodes only comes first, then the largest."""
    left = [(of, dict(of.resources)) for of in free]

    def difficulty(item: tuple[Bundle, Labels]) -> tuple[int, float, float]:
        need, labels = item
        return -len(labels), -need.get("GPU", 0.0), -need.get("CPU", 0.0)

    for need, labels in sorted(bundles, key=difficulty):
        for of, node in left:
            if of.has(labels) and all(
                node.get(name, 0.0) >= much - 1e-9 for name, much in need.items()
            ):
                for name, much in need.items():
                    node[name] = node.get(name, 0.0) - much
                break
        else:
            return False
    return True
