"""Log-probability of several answers to each prompt, in one forward pass of the language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from omni.model.lm.generate import Continued
from omni.model.lm.kv_cache import TreeCache
from omni.model.packed_attention import GROUP_FILL, SegmentLayout
from omni.model.speech_lm import OmniModel


@dataclass(frozen=True)
class _Tree:
    """The answers to one prompt, with their common beginnings only once.

    The first nodes are the tokens that the language model has read already.
    """

    ids: list[int]
    """Token ids of the nodes."""
    parents: list[int]
    """Node before each one; -1: the last position of the prompt."""
    depths: list[int]
    """Tokens of the answer up to the node."""
    read: int
    """Nodes that have been read."""
    steps: dict[tuple[int, int], int]
    """Number of each (node, next token) whose log-probability is needed."""
    paths: list[list[int]]
    """For each answer the numbers of its steps."""

    @classmethod
    def of(cls, read: Sequence[int], answers: Sequence[Sequence[int]], end: int) -> _Tree:
        count = len(read)
        tree = cls(list(read), [*range(-1, count - 1)], [*range(1, count + 1)], count, {}, [])
        known = {(node - 1, token): node for node, token in enumerate(read)}
        for answer in answers:
            at, path = -1, []
            for token in [*answer, end]:
                path.append(tree.steps.setdefault((at, token), len(tree.steps)))
                if len(path) > len(answer):
                    break
                if (at, token) not in known:
                    known[at, token] = len(tree.ids)
                    tree.ids.append(token)
                    tree.depths.append(len(path))
                    tree.parents.append(at)
                at = known[at, token]
            tree.paths.append(path)
        return tree

    @property
    def new(self) -> int:
        """Nodes that are yet to be read."""
        return len(self.ids) - self.read


@torch.inference_mode()
def answer_log_probs(
    model: OmniModel,
    rows: Sequence[Continued],
    answers: Sequence[Sequence[Sequence[int]]],
    end: int,
) -> list[list[float]]:
    """Compute log P(answer, end | prompt) of each answer to each prompt, in nats.

    rows: what the language model holds of the prompts, and of one answer to each. answers: of each
    prompt, token ids without the end token.
    """
    trees = [
        _Tree.of(row.ids, of_prompt, end) for row, of_prompt in zip(rows, answers, strict=True)
    ]
    order = sorted(range(len(rows)), key=lambda i: -trees[i].new)
    found: dict[int, list[float]] = {}
    while order:
        # Rows of similar length go together, for the sake of padding.
        group = [i for i in order if trees[i].new >= GROUP_FILL * trees[order[0]].new]
        order = order[len(group) :]
        scored = _score(model, [rows[i] for i in group], [trees[i] for i in group])
        found |= dict(zip(group, scored, strict=True))
    return [found[i] for i in range(len(rows))]


def _score(
    model: OmniModel, rows: Sequence[Continued], trees: Sequence[_Tree]
) -> list[list[float]]:
    """Compute the log-probabilities of the answers of each tree."""
    read = [row.hidden_SC for row in rows]
    if any(tree.new for tree in trees):
        new = _read_new(model, rows, trees)
        read = [
            torch.cat((old, of_row[: tree.new]))
            for old, of_row, tree in zip(read, new, trees, strict=True)
        ]
    places: list[int] = []
    targets: list[int] = []
    first = 1  # The prompt's last position is node -1.
    for hidden, tree in zip(read, trees, strict=True):
        for node, token in tree.steps:
            places.append(first + node)
            targets.append(token)
        first += len(hidden)
    hidden_NC = torch.cat(read)
    device = hidden_NC.device
    losses: Tensor
    losses, _ = model.lm.loss(
        hidden_NC.index_select(0, torch.tensor(places, device=device)),
        torch.tensor(targets, device=device),
    )
    found = []
    for tree, of_row in zip(
        trees, torch.split(losses.cpu(), [len(tree.steps) for tree in trees]), strict=True
    ):
        found.append([-float(of_row[path].sum()) for path in tree.paths])
    return found


def _read_new(model: OmniModel, rows: Sequence[Continued], trees: Sequence[_Tree]) -> Tensor:
    """Compute the final hidden states (B, T, C) of the nodes that have not been read."""
    count, width = len(rows), max(tree.new for tree in trees)
    longest = max(len(row.prompt.x_TC) + tree.read for row, tree in zip(rows, trees, strict=True))
    positions = np.zeros((count, width), dtype=np.int64)
    # Of the positions that may be seen: those that were read, and then the new ones.
    seen = np.zeros((count, longest + width), dtype=np.int64)
    paths = np.zeros((count, width, longest + width), dtype=bool)
    paths[:, np.arange(width), longest + np.arange(width)] = True  # Padding sees itself.
    ids = np.zeros((count, width), dtype=np.int64)
    previous: list[Tensor] = []
    for b, (row, tree) in enumerate(zip(rows, trees, strict=True)):
        given = len(row.prompt.x_TC)
        seen[b, :longest] = np.arange(longest)
        before = []
        for n in range(tree.new):
            node = tree.read + n
            parent, depth = tree.parents[node], tree.depths[node]
            ids[b, n] = tree.ids[node]
            positions[b, n] = seen[b, longest + n] = given + depth - 1
            if parent < tree.read:
                paths[b, n, : given + parent + 1] = True
            else:
                paths[b, n] |= paths[b, parent - tree.read]
            before.append(parent)
        embedded = model.lm.embed(row.prompt.ids_T.new_tensor([tree.ids]))[0]
        earlier = torch.cat((row.prompt.x_TC[-1:], embedded.to(row.prompt.x_TC.dtype)))
        previous.append(earlier[[parent + 1 for parent in before]])
    device = rows[0].prompt.x_TC.device
    ids_BT = torch.from_numpy(ids).to(device)
    x_BTC = model.lm.embed(ids_BT).to(rows[0].prompt.x_TC.dtype)
    positions_BT = torch.from_numpy(positions).to(device)
    distances = positions_BT[:, :, None] - torch.from_numpy(seen).to(device)[:, None]
    cache = TreeCache(
        [(row.keys, row.values) for row in rows],
        torch.nn.utils.rnn.pad_sequence(previous, batch_first=True),
        torch.from_numpy(paths).to(device),
        distances,
    )
    layout = SegmentLayout(positions_BT, positions_BT > 0)
    return model.lm.trunk(x_BTC, ids_BT, layout, None, cache)
