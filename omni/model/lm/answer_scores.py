"""Log-probability of several answers to each prompt, in one forward pass of the language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from omni.model.chat_template import AUDIO
from omni.model.lm.generate import EmbeddedPrompt
from omni.model.packed_attention import GROUP_FILL, TreeLayout
from omni.model.speech_lm import OmniModel


@dataclass(frozen=True)
class _Tree:
    """The answers to one prompt, with their common beginnings only once."""

    ids: list[int]
    """Token ids of the nodes."""
    parents: list[int]
    """Node before each one; -1: the last position of the prompt."""
    depths: list[int]
    """Tokens of the answer up to the node."""
    ends: list[list[int]]
    """For each answer its nodes, the position before them (-1) first."""

    @classmethod
    def of(cls, answers: Sequence[Sequence[int]]) -> _Tree:
        tree = cls([], [], [], [])
        known: dict[tuple[int, int], int] = {}
        for answer in answers:
            path = [-1]
            for token in answer:
                step = (path[-1], token)
                if step not in known:
                    known[step] = len(tree.ids)
                    tree.ids.append(token)
                    tree.parents.append(path[-1])
                    tree.depths.append(len(path))
                path.append(known[step])
            tree.ends.append(path)
        return tree


@torch.inference_mode()
def answer_log_probs(
    model: OmniModel,
    prompts: Sequence[EmbeddedPrompt],
    answers: Sequence[Sequence[Sequence[int]]],
    end: int,
) -> list[list[float]]:
    """Compute log P(answer, end | prompt) of each answer to each prompt, in nats.

    answers: of each prompt, token ids without the end token.
    """
    trees = [_Tree.of(of_prompt) for of_prompt in answers]
    lengths = [len(p.x_TC) + len(tree.ids) for p, tree in zip(prompts, trees, strict=True)]
    order = sorted(range(len(prompts)), key=lambda i: -lengths[i])
    found: dict[int, list[float]] = {}
    while order:
        # Rows of similar length go together, for the sake of padding.
        group = [i for i in order if lengths[i] >= GROUP_FILL * lengths[order[0]]]
        order = order[len(group) :]
        scored = _score(
            model,
            [prompts[i] for i in group],
            [trees[i] for i in group],
            [answers[i] for i in group],
            end,
        )
        found |= dict(zip(group, scored, strict=True))
    return [found[i] for i in range(len(prompts))]


def _score(
    model: OmniModel,
    prompts: Sequence[EmbeddedPrompt],
    trees: Sequence[_Tree],
    answers: Sequence[Sequence[Sequence[int]]],
    end: int,
) -> list[list[float]]:
    lengths = [len(p.x_TC) + len(tree.ids) for p, tree in zip(prompts, trees, strict=True)]
    rows, width = len(prompts), max(lengths)
    positions = np.zeros((rows, width), dtype=np.int64)
    parents = np.tile(np.arange(width), (rows, 1))
    paths = np.tile(np.eye(width, dtype=bool), (rows, 1, 1))  # Padding sees itself.
    places: list[int] = []
    targets: list[int] = []
    x, ids = [], []
    for b, (prompt, tree) in enumerate(zip(prompts, trees, strict=True)):
        given = len(prompt.x_TC)
        positions[b, :given] = np.arange(given)
        parents[b, 1:given] = np.arange(given - 1)
        paths[b, :given, :given] = np.tri(given, dtype=bool)
        for node, (parent, depth) in enumerate(zip(tree.parents, tree.depths, strict=True)):
            at, before = given + node, given + parent  # -1 is the last one of the prompt.
            positions[b, at], parents[b, at] = given + depth - 1, before
            paths[b, at] |= paths[b, before]
        for path, answer in zip(tree.ends, answers[b], strict=True):
            places += [b * width + given + node for node in path]
            targets += [*answer, end]
        nodes = prompt.ids_T.new_tensor(tree.ids)
        embedded = model.lm.embed(nodes[None])[0].to(prompt.x_TC.dtype)
        x.append(torch.cat((prompt.x_TC, embedded)))
        ids.append(torch.cat((prompt.ids_T, nodes)))
    device = x[0].device
    x_BTC = torch.nn.utils.rnn.pad_sequence(x, batch_first=True)
    ids_BT = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    layout = TreeLayout(
        torch.from_numpy(positions).to(device),
        torch.from_numpy(positions > 0).to(device),
        parents_BT=torch.from_numpy(parents).to(device),
        paths_BTT=torch.from_numpy(paths).to(device),
    )
    hidden = model.lm.trunk(x_BTC, ids_BT.clamp(min=0), layout, ids_BT != AUDIO)
    supervised = torch.tensor(places, device=device)
    losses: Tensor
    losses, _ = model.lm.loss(
        hidden.flatten(0, 1).index_select(0, supervised), torch.tensor(targets, device=device)
    )
    counts = [len(answer) + 1 for of_prompt in answers for answer in of_prompt]
    sums = iter([-float(part.sum()) for part in torch.split(losses.cpu(), counts)])
    return [[next(sums) for _ in of_prompt] for of_prompt in answers]
