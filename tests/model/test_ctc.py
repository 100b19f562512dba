"""CTC over a large vocabulary: only what can lie on a path is told apart."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from omni.model.batch import CTCLabels
from omni.model.ctc import CTCHead, LinearCTC, TiedCTC, ctc_losses
from omni.model.losses import LOGITS_PER_CHUNK

WIDTH, LARGE = 8, 5_000
LENGTHS = [7, 1, 12, 3]  # the third utterance has no label, the last more than soft tokens
LABELS = [[4, 4, 4_999], [17], [], [1, 2, 3, 5]]


class Embeddings:
    def __init__(self, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.rows = 0.1 * torch.randn(vocabulary, WIDTH, generator=generator)
        self.rows.requires_grad_()

    def embedding_matrix(self) -> Tensor:
        return self.rows


def soft_tokens(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, WIDTH, generator=generator).requires_grad_()


def over_all_classes(head: CTCHead, soft: Tensor, lm: Embeddings) -> Tensor:
    """The loss as it is defined, each class on its own."""
    parts = F.log_softmax(head(soft, lm), dim=-1).split(LENGTHS)
    return torch.stack(
        [
            F.ctc_loss(
                part[:, None],
                torch.tensor([label], dtype=torch.long).view(1, -1),
                [len(part)],
                [len(label)],
                blank=head.classes - 1,
                reduction="sum",
                zero_infinity=True,
            )
            for part, label in zip(parts, LABELS, strict=True)
        ]
    )


@pytest.mark.parametrize("kind", [LinearCTC, TiedCTC])
def test_loss_and_gradients_are_those_over_all_classes(kind: type[CTCHead]) -> None:
    lm, soft = Embeddings(LARGE), soft_tokens(sum(LENGTHS))
    head = kind(WIDTH, LARGE)
    head.init_weights(torch.Generator().manual_seed(3))
    wanted_by = [soft, *head.parameters(), *([lm.rows] if kind is TiedCTC else [])]
    found = ctc_losses(head, soft, lm, CTCLabels.of(LENGTHS, LABELS))
    expected = over_all_classes(head, soft, lm)
    assert expected[1] > 1 and expected[2] > 1 and expected[3] == 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(found.sum(), wanted_by)
    theirs = torch.autograd.grad(expected.sum(), wanted_by)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


def test_a_long_batch_goes_through_the_vocabulary_in_chunks() -> None:
    lm = Embeddings(LARGE)
    head = TiedCTC(WIDTH, LARGE)
    head.init_weights(torch.Generator().manual_seed(3))
    each, count = 50, 2 * (LOGITS_PER_CHUNK // LARGE) // 50 + 1
    soft, whole = soft_tokens(each * count), soft_tokens(each * count)
    labels = [list(range(first, first + 9)) for first in range(count)]
    loss = ctc_losses(head, soft, lm, CTCLabels.of([each] * count, labels)).sum()
    log_probs = F.log_softmax(head(whole, lm), -1)
    expected = F.ctc_loss(
        log_probs.view(count, each, -1).transpose(0, 1),
        torch.tensor(labels).flatten(),
        [each] * count,
        [9] * count,
        blank=LARGE,
        reduction="sum",
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(soft.grad, whole.grad, rtol=1e-3, atol=1e-5)
