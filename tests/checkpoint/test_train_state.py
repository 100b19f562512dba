"""The best checkpoint is chosen by one metric: another decoder measures another WER."""

from __future__ import annotations

import pytest

from omni.checkpoint.train_state import TrainState


@pytest.mark.parametrize(
    ("saved", "now", "forgotten"),
    [
        ("", "dev_wer by lm", None),
        ("", "dev_wer by joint, ctc_weight 0.5", "dev_wer by lm"),
        ("dev_wer by joint, ctc_weight 0.5", "dev_wer by joint, ctc_weight 0.5", None),
        ("dev_wer by joint, ctc_weight 0.5", "dev_loss", "dev_wer by joint, ctc_weight 0.5"),
    ],
)
def test_a_best_value_of_another_metric_is_forgotten(
    saved: str, now: str, forgotten: str | None
) -> None:
    state = TrainState(best_value=0.5, best_step=9, best_metric=saved, evaluations_since_best=3)
    assert state.measure_best(now, "dev_wer by lm") == forgotten
    kept = forgotten is None
    assert (state.best_value, state.evaluations_since_best) == ((0.5, 3) if kept else (None, 0))
    assert (state.best_metric, state.best_step) == (now, 9)


def test_a_run_without_an_evaluation_has_nothing_to_forget() -> None:
    state = TrainState()
    assert state.measure_best("dev_wer by joint", "dev_wer by lm") is None
    assert state.best_metric == "dev_wer by joint"
