"""Check the nodes of a cluster before a run starts, and find those that it should leave out.

A probe on each node examines it, all at the same time. Then the nodes add numbers up; where that
fails, pairs of them do, so that the nodes that cannot are found.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from omni.cluster.capacity import Node
from omni.cluster.node_probe import NodeFacts, NodeProbe, own_versions
from omni.errors import counted, first_line

_SHIFTS = 3
"""Ways to form pairs that are tried before the nodes are said not to reach each other."""


@dataclass(frozen=True)
class Limits:
    """Seconds in which a node must answer.

    start: for its facts, with the start of a process there. compute: for its arithmetic, with the
    import of torch. reduce: for a sum over nodes, from meeting to result.
    """

    start: float = 120.0
    compute: float = 120.0
    reduce: float = 60.0
    grace: float = 10.0
    """Seconds after `reduce` in which a living node reports that it waited in vain."""


@dataclass(frozen=True)
class NodeReport:
    """Outcome of the check. faults: reasons by the ids of the nodes to leave out.

    notes: remarks for the user, with addresses. apart: reason why no two nodes can add numbers up,
    so that none can be blamed; None where they can.
    """

    faults: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    apart: str | None = None


class Unattributed(Exception):
    """No two nodes can add numbers up."""


def check_nodes(
    nodes: Sequence[Node],
    ranks: Collection[str] = (),
    free_gpus: Mapping[str, int] | None = None,
    limits: Limits = Limits(),  # noqa: B008  # It is frozen.
) -> NodeReport:
    """Check `nodes`; those whose ids are in `ranks`, and that are in order, also add numbers up.

    free_gpus: whole GPUs of each node that no other job holds; None for a run without GPUs.
    """
    check = _Check(nodes, free_gpus, limits)
    with check.probes():
        check.collect_facts()
        check.compute()
        apart = None
        try:
            check.add_up([n.id for n in nodes if n.id in ranks and n.id not in check.faults])
        except Unattributed as error:
            apart = str(error)
    return NodeReport(check.faults, check.notes, apart)


class _Check:
    """State of one check. faults: reasons by node id."""

    def __init__(
        self, nodes: Sequence[Node], free_gpus: Mapping[str, int] | None, limits: Limits
    ) -> None:
        self._nodes = {node.id: node for node in nodes}
        self._limits = limits
        self._taken = {node.id: (free_gpus or {}).get(node.id, 0) for node in nodes}
        """Whole GPUs that the probe of each node takes."""
        counted = free_gpus is not None
        self._gpus = {n.id: int(n.resources.get("GPU", 0)) if counted else 0 for n in nodes}
        """GPUs of each node."""
        self._probes: dict[str, Any] = {}
        self.faults: dict[str, str] = {}
        self.notes: list[str] = []

    @contextlib.contextmanager
    def probes(self) -> Iterator[None]:
        """Start a probe on each node, which ends with the block."""
        try:
            for id in self._nodes:
                self._start(id)
            yield
        finally:
            for id in list(self._probes):
                self._end(id)

    def _start(self, id: str) -> None:
        actor: Any = ray.remote(NodeProbe)
        self._probes[id] = actor.options(
            num_cpus=0,
            num_gpus=self._taken[id],
            scheduling_strategy=NodeAffinitySchedulingStrategy(id, soft=False),
            max_restarts=0,
        ).remote()

    def _end(self, id: str) -> None:
        ray.kill(self._probes.pop(id))

    def _good(self) -> list[str]:
        return [id for id in self._nodes if id not in self.faults]

    def _note(self, id: str, text: str) -> None:
        self.notes.append(f"node {self._nodes[id].address}: {text}")

    # -- each node by itself -------------------------------------------------------------------

    def collect_facts(self) -> None:
        """Ask all nodes for their facts, and compare their versions with those of this process."""
        found = self._ask(self._good(), self._facts, self._limits.start)
        # A probe may wait for GPUs that another job has taken meanwhile; the node is asked without.
        waiting = [id for id in found.silent if self._taken[id]]
        for id in waiting:
            self._end(id)
            self._taken[id] = 0
            self._start(id)
        again = self._ask(waiting, self._facts, self._limits.start)
        here = own_versions()
        for id, facts in {**found.answers, **again.answers}.items():
            assert isinstance(facts, NodeFacts)
            reasons = facts.faults + [
                f"{name} is {facts.versions.get(name, 'missing')} there and {version} here"
                for name, version in here.items()
                if facts.versions.get(name) != version
            ]
            if reasons:
                self.faults[id] = "; ".join(reasons)
            for text in facts.notes:
                self._note(id, text)
            if busy := self._gpus[id] - self._taken[id]:
                self._note(id, f"{counted(busy, 'GPU')} in use by other jobs, not computed with")
        drivers = {facts.driver for facts in found.answers.values() if facts.driver}
        if len(drivers) > 1:
            self.notes.append(
                f"the nodes have different NVIDIA drivers: {', '.join(sorted(drivers))}"
            )
        self._blame(again, self._limits.start)
        for id in waiting:
            found.silent.remove(id)
        self._blame(found, self._limits.start)

    def _facts(self, id: str) -> Any:
        store = self._nodes[id].resources.get("object_store_memory", 0.0)
        return self._probes[id].facts.remote(self._gpus[id], store)

    def compute(self) -> None:
        """Let every node that is in order multiply matrices."""
        found = self._ask(
            self._good(), lambda id: self._probes[id].multiply.remote(), self._limits.compute
        )
        self.faults |= {id: "; ".join(reasons) for id, reasons in found.answers.items() if reasons}
        self._blame(found, self._limits.compute, "of a product of matrices")

    # -- the nodes together --------------------------------------------------------------------

    def add_up(self, members: list[str]) -> None:
        """Let nodes add numbers up; note those that cannot. Raises Unattributed."""
        innocent = False
        while len(members) > 1:
            found = self._sum([members])
            if not found.errors and not found.silent:
                return
            for id in found.silent:
                self.faults[id] = (
                    f"no answer within {self._limits.reduce:g} s of a sum over the nodes"
                )
            if not found.silent:
                # All of them live, and each says that it failed: any may be the reason.
                reason = next(iter(found.errors.values()))
                if innocent:
                    raise Unattributed(f"the nodes can only add numbers up in pairs: {reason}")
                before = len(self.faults)
                self._try_pairs(members, reason)
                innocent = len(self.faults) == before
            members = [id for id in members if id not in self.faults]
            if len(members) > 1:
                self._renew(members)
                members = [id for id in members if id not in self.faults]

    def _try_pairs(self, members: list[str], reason: str) -> None:
        """Find the nodes that cannot add numbers up with one that can. Raises Unattributed."""
        able: list[str] = []
        for shift in range(min(_SHIFTS, len(members) - 1)):
            turned = members[shift:] + members[:shift]
            pairs = [turned[i : i + 2] for i in range(0, len(turned) - 1, 2)]
            self._renew(members)
            found = self._sum(pairs)
            able = [id for pair in pairs if all(id in found.answers for id in pair) for id in pair]
            if able:
                break
        else:
            names = ", ".join(self._nodes[id].address for id in members)
            raise Unattributed(f"no two of the nodes {names} can add numbers up: {reason}")
        suspects = [id for id in members if id not in able]
        while suspects:
            some, suspects = suspects[: len(able)], suspects[len(able) :]
            self._renew([*some, *able])
            found = self._sum([[partner, id] for partner, id in zip(able, some, strict=False)])
            for id in some:
                if id not in found.answers:
                    self.faults[id] = f"it cannot add numbers up with others: {found.reason(id)}"

    def _sum(self, groups: Sequence[Sequence[str]]) -> _Answers:
        """Let each group of nodes add numbers up, all groups at the same time."""
        leaders = [group[0] for group in groups]
        found = self._ask(
            leaders, lambda id: self._probes[id].free_address.remote(), self._limits.grace
        )
        places = {}
        for group in groups:
            if group[0] in found.answers:
                address, port = found.answers[group[0]]
                gpus = all(self._taken[id] for id in group)
                for rank, id in enumerate(group):
                    places[id] = (address, port, rank, len(group), gpus, self._limits.reduce)
        summed = self._ask(
            list(places),
            lambda id: self._probes[id].add_up.remote(*places[id]),
            self._limits.reduce + self._limits.grace,
        )
        summed.errors |= found.errors
        summed.silent += found.silent
        return summed

    def _renew(self, ids: Sequence[str]) -> None:
        """Replace probes by new ones: one that failed in a collective call may make no other."""
        for id in ids:
            self._end(id)
        for id in ids:
            self._start(id)
        found = self._ask(ids, lambda id: self._probes[id].warm_up.remote(), self._limits.compute)
        self._blame(found, self._limits.compute)

    # -- calls ---------------------------------------------------------------------------------

    def _ask(self, ids: Sequence[str], call: Callable[[str], Any], seconds: float) -> _Answers:
        """Call all nodes at the same time, and wait for their answers for `seconds`."""
        calls = {id: call(id) for id in ids}
        found = _Answers()
        if calls:
            ray.wait(list(calls.values()), num_returns=len(calls), timeout=seconds)
        for id, reference in calls.items():
            try:
                found.answers[id] = ray.get(reference, timeout=0)
            except ray.exceptions.GetTimeoutError:
                found.silent.append(id)
            except RayTaskError as error:
                cause = error.cause
                found.errors[id] = f"{type(cause).__name__}: {first_line(cause)}"
            except RayError as error:
                found.errors[id] = first_line(error)
        return found

    def _blame(self, found: _Answers, seconds: float, during: str = "") -> None:
        for id in found.silent:
            self.faults[id] = f"no answer within {seconds:g} s {during}".strip()
        self.faults |= found.errors


@dataclass
class _Answers:
    """Answers, errors and silence of nodes, by their ids."""

    answers: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)

    def reason(self, id: str) -> str:
        return self.errors.get(id, "no answer")
