"""CTC prefix beam search, batched: the most probable label sequences of each recording.

Hannun et al. 2014 (algorithm 1): a prefix keeps the probability of its paths that end in the blank
apart from that of the others, and paths of the same prefix are added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BASE = 6364136223846793005
"""Base of the polynomial hash of a prefix modulo 2^64: the multiplier of Knuth's MMIX."""


@dataclass(frozen=True)
class Hypothesis:
    """A label sequence. log_prob: of the paths in the beam, a lower bound of that of all paths."""

    labels: list[int]
    log_prob: float


@torch.inference_mode()
def prefix_beam_search(
    log_probs_BTK: Tensor, lengths: Sequence[int], *, beam: int, labels_per_frame: int
) -> list[list[Hypothesis]]:
    """Search the label sequences of B recordings, each as if it were alone.

    log_probs_BTK: of the labels 0 to K - 2, and of the blank, K - 1. lengths: frames of each
    recording. labels_per_frame: most probable labels that may extend a prefix at a frame. Returns
    up to `beam` hypotheses of each recording, the most probable first. Nothing is read back from
    the device before the last frame.
    """
    batch, frames, classes = log_probs_BTK.shape
    device, none = log_probs_BTK.device, -torch.inf
    width = min(labels_per_frame, classes - 1)
    top = log_probs_BTK[..., :-1].topk(width)
    lengths_B = torch.tensor(list(lengths), device=device)
    slots_W = torch.arange(beam, device=device)
    # Slots without a prefix have a probability of zero, and a hash that no prefix has.
    unused_W = -2 - slots_W
    blank_BW = torch.full((batch, beam), none, dtype=log_probs_BTK.dtype, device=device)
    blank_BW[:, 0] = 0.0
    label_BW = torch.full_like(blank_BW, none)
    hash_BW = unused_W.expand(batch, beam).clone()
    hash_BW[:, 0] = 0
    parent_BW = torch.full_like(hash_BW, -1)
    last_BW = torch.full_like(hash_BW, -1)
    history: list[tuple[Tensor, Tensor]] = []
    for t in range(frames):
        frame_BK = log_probs_BTK[:, t]
        tokens_BX, token_probs_BX = top.indices[:, t], top.values[:, t]
        total_BW = torch.logaddexp(blank_BW, label_BW)
        # The same prefix: after a blank, by its last label again, or by the prefix before it.
        last_prob_BW = frame_BK.gather(1, last_BW.clamp(min=0))
        repeat_BW = label_BW + last_prob_BW
        follows_BWW = parent_BW[:, :, None] == hash_BW[:, None, :]  # (child, parent)
        same_BWW = last_BW[:, :, None] == last_BW[:, None, :]
        from_BWW = torch.where(same_BWW, blank_BW[:, None, :], total_BW[:, None, :])
        from_BWW = from_BWW.masked_fill(~follows_BWW, none)
        joined_BW = from_BWW.logsumexp(2) + last_prob_BW
        stay_label_BW = torch.logaddexp(repeat_BW, joined_BW).masked_fill(last_BW < 0, none)
        stay_blank_BW = total_BW + frame_BK[:, -1:]
        # New prefixes; those that are in the beam already have been added to above.
        again_BWX = tokens_BX[:, None, :] == last_BW[:, :, None]
        begin_BWX = torch.where(again_BWX, blank_BW[:, :, None], total_BW[:, :, None])
        known_BWX = (
            follows_BWW[:, :, :, None] & (last_BW[:, :, None, None] == tokens_BX[:, None, None, :])
        ).any(1)
        new_BWX = (begin_BWX + token_probs_BX[:, None, :]).masked_fill(known_BWX, none)
        stay_BW = torch.logaddexp(stay_blank_BW, stay_label_BW)
        scores_BY, chosen_BY = torch.cat((stay_BW, new_BWX.flatten(1)), 1).topk(beam)
        stays_BY = chosen_BY < beam
        extension_BY = (chosen_BY - beam).clamp(min=0)
        source_BY = torch.where(stays_BY, chosen_BY, extension_BY // width)
        token_BY = torch.where(stays_BY, -1, tokens_BX.gather(1, extension_BY % width))

        active_B1 = (t < lengths_B)[:, None]
        source_BY = torch.where(active_B1, source_BY, slots_W)
        token_BY = torch.where(active_B1, token_BY, -1)
        stays_BY = stays_BY | ~active_B1
        possible_BY = (scores_BY > none) | ~active_B1
        before_BY = hash_BW.gather(1, source_BY)
        new_hash_BY = torch.where(stays_BY, before_BY, before_BY * _BASE + token_BY + 1)
        parent_BW = torch.where(stays_BY, parent_BW.gather(1, source_BY), before_BY)
        last_BW = torch.where(stays_BY, last_BW.gather(1, source_BY), token_BY)
        hash_BW = torch.where(possible_BY, new_hash_BY, unused_W)
        parent_BW = parent_BW.masked_fill(~possible_BY, -1)
        last_BW = last_BW.masked_fill(~possible_BY, -1)
        kept_blank = torch.where(active_B1, stay_blank_BW, blank_BW).gather(1, source_BY)
        kept_label = torch.where(active_B1, stay_label_BW, label_BW).gather(1, source_BY)
        blank_BW = torch.where(stays_BY, kept_blank, none)
        label_BW = torch.where(stays_BY, kept_label, scores_BY)
        history.append((source_BY, token_BY))
    total_BW = torch.logaddexp(blank_BW, label_BW)
    return _read(total_BW.tolist(), history)


def _read(
    totals: list[list[float]], history: list[tuple[Tensor, Tensor]]
) -> list[list[Hypothesis]]:
    """Follow the history back from each slot of the beam."""
    sources = torch.stack([source for source, _ in history]).tolist() if history else []
    tokens = torch.stack([token for _, token in history]).tolist() if history else []
    found = []
    for b, of_row in enumerate(totals):
        hypotheses = []
        for slot, log_prob in enumerate(of_row):
            if log_prob == -torch.inf:
                continue
            labels, at = [], slot
            for source, token in zip(reversed(sources), reversed(tokens), strict=True):
                if token[b][at] >= 0:
                    labels.append(token[b][at])
                at = source[b][at]
            hypotheses.append(Hypothesis(labels[::-1], log_prob))
        found.append(sorted(hypotheses, key=lambda h: -h.log_prob))
    return found
