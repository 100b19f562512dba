"""An encoder whose memory does not hold its batches halves them, counts that, and goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pytest
import torch

from omni.config import Config
from omni.errors import LocatedError
from omni.run.rates import loaded_blocks, without_cache
from omni.stream.codec import FeatureCodec
from omni.stream.stages import EncodeStage
from omni.stream.stream_settings import StreamSettings, stream_settings
from tests.helpers.pretended_gpu import Gpu
from tests.helpers.worker_specs import small_run


def _settings(gpus: float = 0, gpu_memory: float | None = None) -> StreamSettings:
    prepared = small_run()
    changes = {"gpus": gpus, "gpu_memory": gpu_memory, "frame_budget": 1500}
    encoder = prepared.config.encoder.model_copy(update=changes)
    config: Config = prepared.config.model_copy(update={"encoder": encoder})
    settings = without_cache(stream_settings(config, prepared.encoder))
    # In bf16, features of other batches differ by rounding.
    codec = FeatureCodec(settings.codec.feature_dim, torch.float32)
    return replace(settings, codec=codec, encoder={**settings.encoder, "dtype": torch.float32})


@contextmanager
def _small_memory(stage: EncodeStage, windows: int) -> Iterator[list[int]]:
    """Memory that holds `windows` windows at a time. Yields the sizes of the batches tried."""
    tried: list[int] = []
    real = stage._encoder.encoder.encode

    def encode(mels: Any, *rest: Any) -> Any:
        tried.append(len(mels))
        if len(mels) > windows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(mels, *rest)

    with patch.object(stage._encoder.encoder, "encode", encode):
        yield tried


@pytest.fixture(scope="module")
def loaded() -> pa.Table:
    """A bin of three utterances."""
    [block], _ = loaded_blocks(small_run().splits["train"], [0], _settings())
    [row] = block.to_pylist()
    lists = {name: value[:3] for name, value in row.items() if isinstance(value, list)}
    return pa.Table.from_pylist([row | lists], block.schema)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_features_are_those_of_undivided_batches(
    loaded: pa.Table, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    settings = _settings(0.25, 0.2) if on_gpu else _settings()
    with Gpu() if on_gpu else nullcontext():
        stage = EncodeStage(settings)
        whole = stage(loaded)
        with _small_memory(stage, windows=1) as tried:
            divided = stage(loaded)
        assert tried[0] == 3 and tried[-3:] == [1, 1, 1]
        with _small_memory(stage, windows=1) as tried:
            again = stage(loaded)
        assert tried == [1, 1, 1] and again["halvings"].to_pylist() == [0], "batches stay small"
    assert limits == ([0.2] if on_gpu else [])
    assert whole["halvings"].to_pylist() == [0] and divided["halvings"].to_pylist()[0] >= 1
    [wanted], [found] = (
        [settings.codec.decode(x.as_py()) for x in table["features"]] for table in (whole, divided)
    )
    if on_gpu:  # Attention over padded rows adds up in another order.
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-3)
    else:
        assert torch.equal(found, wanted)


def test_a_window_that_does_not_fit_alone_is_an_error(loaded: pa.Table) -> None:
    stage = EncodeStage(_settings())
    with _small_memory(stage, windows=0) as tried, pytest.raises(LocatedError) as got:
        stage(loaded)
    assert isinstance(got.value.__cause__, torch.OutOfMemoryError) and tried[-1] == 1
