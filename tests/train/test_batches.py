"""Blocks of the stream become microbatches that are checked against the plan and counted."""

from __future__ import annotations

import base64
import tarfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from omni.audio.decode import decode, decode_with_retry
from omni.config import parse_config
from omni.metrics.throughput import Stopwatch
from omni.plan.plan import EMPTY
from omni.report.audio_embed import embed_row
from omni.run.prepare import make_worker_spec, prepare
from omni.run.rates import loaded_blocks
from omni.stream.stages import EncodeStage
from omni.stream.stream_settings import stream_settings
from omni.train.batches import BlockReader
from tests.helpers.stream_order import held_bins
from tests.helpers.whole_runs import embedded, lines, write_manifest
from tests.helpers.worker_specs import encoded_block, small_run

CPU = torch.device("cpu")


def _reader(
    run_dir: Path, blocks: Iterable[pa.Table], rank: int = 0, world: int = 1, **optim: Any
) -> BlockReader:
    prepared = small_run()
    config = prepared.config
    config = config.model_copy(
        update={
            "run": config.run.model_copy(
                update={"storage": str(run_dir.parent), "name": run_dir.name}
            ),
            "optim": config.optim.model_copy(update=optim),
        }
    )
    run_dir.mkdir(exist_ok=True)
    spec = make_worker_spec(replace(prepared, config=config), world)
    return BlockReader(spec, iter(blocks), rank, world, CPU, Stopwatch(CPU))


def _block(*bins: int, **changes: Any) -> pa.Table:
    prepared = small_run()
    return encoded_block(prepared, prepared.splits["train"], bins, **changes)


def test_a_step_is_the_bins_of_the_plan_and_the_ledger_names_them(tmp_path: Path) -> None:
    run, plan = tmp_path / "run", small_run().splits["train"].plan
    reader = _reader(run, [_block(4, 5), _block(6, 7)])
    first, second = reader.microbatches(1)
    assert (first.block, second.block) == (0, 1)
    assert first.batch.tokens_BT.shape == (2, 256)
    assert first.counts.utterances == len(plan.bin(4)) + len(plan.bin(5))
    assert (first.counts.load_seconds, first.counts.encode_seconds) == (0.5, 1.0)
    assert (first.counts.rejected, first.counts.loss) == (0, 0)
    work = reader.ledger.current_work()
    assert (work["step"], work["bins"]) == (2, [4, 5, 6, 7]) and len(work["ids"]) > 4
    reader.ledger.write()
    assert lines(run / "ledger" / "rank-0000.jsonl") == [
        {"step": 2, "bin": number, "utterances": plan.bin(number).tolist()}
        for number in (4, 5, 6, 7)
    ]


def test_ranks_take_turns_and_padding_is_nobodys_work(tmp_path: Path) -> None:
    """Three bins a step make two blocks, the last of them half empty."""
    steps = {"bins_per_step": 3}
    [first] = _reader(tmp_path / "a", [_block(0, 1)], rank=0, world=2, **steps).microbatches(0)
    second_rank = _reader(tmp_path / "b", [_block(2, EMPTY)], rank=1, world=2, **steps)
    [second] = second_rank.microbatches(0)
    assert (first.block, second.block) == (0, 1)
    assert second_rank.ledger.current_work()["bins"] == [2]
    assert not second.batch.segments_BT[1].any()


@pytest.mark.parametrize(
    ("bins", "changes", "sent"),
    [
        ((4, 5), {"bin": 6}, "bin 6 of train, expected bin 4 of train"),
        ((4, 5), {"split": "dev"}, "bin 4 of dev, expected bin 4 of train"),
        ((4, 6), {}, "bin 6 of train, expected bin 5 of train"),
        ((4,), {}, "no more bins, expected bin 5 of train"),
        ((4, 5, 6), {}, "bin 6 of train, expected no more"),
    ],
)
def test_a_block_that_the_plan_does_not_name_is_an_error(
    tmp_path: Path, bins: tuple[int, ...], changes: dict[str, Any], sent: str
) -> None:
    """Also one whose first bin alone is right: it may have been cut or joined on the way."""
    reader = _reader(tmp_path / "run", [_block(*bins, **changes)])
    with pytest.raises(RuntimeError, match=rf"^step 2: .*{sent}"):
        next(reader.microbatches(1))


def test_a_rejected_utterance_is_padding_counted_and_not_in_the_ledger(tmp_path: Path) -> None:
    run, plan = tmp_path / "run", small_run().splits["train"].plan
    whole = _block(0, 1).to_pylist()[0]
    count, frames = len(whole["ids"]), whole["frames"]
    size = len(whole["features"]) // sum(map(sum, frames)) * sum(frames[0])
    rejected = _block(
        0,
        1,
        errors=["unreadable\nno such file", *[None] * (count - 1)],
        frames=[[], *frames[1:]],
        features=whole["features"][size:],
    )
    reader = _reader(run, [rejected, _block(2, 3)])
    first, _ = reader.microbatches(0)
    assert first.counts.rejected == 1
    assert first.counts.utterances == count - 1 + len(plan.bin(1))
    reader.ledger.write()
    assert lines(run / "ledger" / "rank-0000.jsonl")[0]["utterances"] == plan.bin(0).tolist()[1:]
    reader.rejects.share()
    [row] = lines(run / "rejects.jsonl")
    assert (row["id"], row["reason"], row["step"]) == (whole["ids"][0], "unreadable", 1)


def test_held_out_bins_stay_in_memory(tmp_path: Path) -> None:
    prepared = small_run()
    dev = prepared.splits["dev"]
    bins = np.reshape(held_bins(dev, 2, 2), (-1, 2)).tolist()
    blocks = [encoded_block(prepared, dev, block) for block in bins]
    held = [
        _reader(tmp_path / f"run{rank}", blocks[rank::2], rank, 2).hold("dev").held
        for rank in range(2)
    ]
    for rank in range(2):
        members = [int(n) for block in bins[rank::2] for bin_ in block for n in dev.plan.bin(bin_)]
        assert [h.utterance.number for h in held[rank]] == members
    with pytest.raises(RuntimeError, match=r"\bbin 0 of train\b.*\bbin 0 of dev\b"):
        _reader(tmp_path / "run", [_block(0, 1)]).hold("dev")
    with pytest.raises(RuntimeError, match=r"\bbin 2 of dev\b.*\bbin 0 of dev\b"):
        _reader(tmp_path / "run", blocks[1::2]).hold("dev")


def test_transcripts_say_where_their_recording_is(tmp_path: Path) -> None:
    """From manifest and tar through index, loading and encoding to the page that plays it."""
    first, second, third = embedded("dev", 3)
    manifest = write_manifest(tmp_path, [{**first, "offset": 0.25, "duration": 0.5}, second])
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(third["audio"], "third.opus")
        (tmp_path / "third.txt").write_text(third["text"])
        tar.add(tmp_path / "third.txt", "third.txt")
    dev = [str(manifest), str(tmp_path / "shard.tar")]
    values = small_run().config.model_dump(mode="json")
    values["data"] |= {"dev": dev, "allow_absolute": True}
    prepared = prepare(parse_config(values))
    settings = stream_settings(prepared.config, prepared.encoder)
    split = prepared.splits["dev"]
    bins = held_bins(split, 1, settings.bins_per_block)
    loaded, _ = loaded_blocks(split, bins, settings)
    spec = make_worker_spec(prepared)
    reader = BlockReader(spec, map(EncodeStage(settings), loaded), 0, 1, CPU, Stopwatch(CPU))
    held = reader.hold("dev").held
    found = {h.text: h for h in held}
    assert found[first["text"]].location == {
        "audio": first["audio"], "start": 0.25, "duration": 0.5
    }  # fmt: skip
    assert found[second["text"]].location == {"audio": second["audio"]}
    inside = found[third["text"]].location
    assert inside.keys() == {"audio", "bytes"} and inside["audio"] == dev[1]
    for row in held:
        whole = decode_with_retry(row.uri, row.span)
        played = base64.b64decode(embed_row(row.location).src.partition(",")[2])
        heard = decode(played)
        assert len(heard) == len(whole) and abs(heard - whole.clip(-1, 1)).max() < 1e-3


def test_the_reason_of_a_full_cache_is_kept(tmp_path: Path) -> None:
    reader = _reader(tmp_path / "run", [_block(0, 1, cache_full="no space"), _block(2, 3)])
    list(reader.microbatches(0))
    assert reader.cache_full == "no space"
    assert reader.waiting_since is None and reader.waited > 0


def test_halvings_of_an_encoder_are_counted_with_those_of_held_out_bins(tmp_path: Path) -> None:
    dev = small_run().splits["dev"]
    bins = [*range(dev.plan.bins), EMPTY][: 2 * -(-dev.plan.bins // 2)]
    held = [
        encoded_block(small_run(), dev, bins[first : first + 2], halvings=int(first == 0))
        for first in range(0, len(bins), 2)
    ]
    reader = _reader(tmp_path / "run", [*held, _block(0, 1, halvings=2), _block(2, 3)])
    reader.hold("dev")
    assert [part.counts.halvings for part in reader.microbatches(0)] == [3, 0]
