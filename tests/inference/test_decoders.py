"""Rows say which decoder wrote them, and each decoder's own error rate stands beside."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import evaluate as evaluate_job
from jobs import transcribe as transcribe_job
from omni.config import parse_config
from omni.errors import ConfigError
from omni.inference.rows import evaluate
from omni.inference.transcriber import Transcriber, transcribe_files
from omni.metrics.score import count_errors, total
from omni.model.decode import Decoding, DecodingOptions
from omni.model.lm.gpt_block import GPTConfig
from omni.model.speech_lm import OmniConfig, OmniModel
from omni.run.prepare import prepare
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.long_recordings import ASSETS

SHORT = [json.loads(line) for line in (ASSETS / "dev.jsonl").read_text().splitlines()][:4]


def _model(vocabulary: int, ctc: bool) -> tuple[OmniConfig, OmniModel]:
    """A model that writes something else about each recording."""
    shape = OmniConfig(GPTConfig(256, vocabulary, 1, 1, 1, 64, "L"), 384, stack=8, ctc=ctc)
    model = OmniModel(shape).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return shape, model


@pytest.fixture(scope="module")
def both(speech: Transcriber) -> Transcriber:
    _, model = _model(speech.template.tokenizer.vocab_size, ctc=True)
    return dataclasses.replace(speech, model=model, decoding=Decoding("joint", max_new_tokens=9))


@pytest.fixture
def manifest(tmp_path: Path) -> str:
    """Three recordings to be written down, and one to be judged."""
    rows = [{**row, "audio": str(ASSETS / row["audio"])} for row in SHORT]
    rows[2] |= {"task": "mood"}
    path = tmp_path / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _scored(
    speech: Transcriber, manifest: str, decoder: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    decoding = dataclasses.replace(speech.decoding, decoder=decoder)
    given = dataclasses.replace(speech, decoding=decoding)
    return evaluate(given, manifest, allow_absolute=True)


def _wer(rows: list[dict[str, Any]], texts: list[str]) -> float | None:
    pairs = zip(rows, texts, strict=True)
    return total([count_errors(row["reference"], text) for row, text in pairs]).wer


def test_evaluate_scores_each_decoder_on_what_both_can_decode(
    both: Transcriber, manifest: str
) -> None:
    summaries, texts = {}, {}
    for decoder in ("lm", "ctc", "joint"):
        summary, rows = _scored(both, manifest, decoder)
        expected = [decoder, decoder, "lm", decoder]
        assert [row["decoder"] for row in rows] == expected
        counts = {"lm": 4} if decoder == "lm" else {"lm": 1, decoder: 3}
        assert summary["decoders"] == counts
        assert "alone" not in rows[2], "a mood is not what is said"
        summaries[decoder], texts[decoder] = summary, rows
    said = [0, 1, 3]
    for decoder in ("lm", "ctc"):
        own = [texts[decoder][i]["hypothesis"] for i in said]
        assert [texts["joint"][i]["alone"][decoder] for i in said] == own
        assert summaries["joint"][f"{decoder}_wer"] == _wer([texts[decoder][i] for i in said], own)
        assert summaries[decoder][f"{decoder}_wer"] == summaries["joint"][f"{decoder}_wer"]
    assert "lm_wer" not in summaries["ctc"], "the language model was not run"
    assert texts["lm"][0]["hypothesis"] != texts["ctc"][0]["hypothesis"]


def test_transcribed_files_say_who_wrote_them(both: Transcriber) -> None:
    [line] = transcribe_files(both, [str(ASSETS / SHORT[0]["audio"])])
    assert line["decoder"] == "joint" and line.keys() <= {"audio", "text", "cut", "decoder"}


def test_a_decoder_without_its_head_is_refused_by_name(
    speech: Transcriber, manifest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = speech.template.tokenizer
    values: dict[str, Any] = {"encoder": {"dtype": "fp32"}, "train": {"precision": "fp32"}}
    paths = {}
    for ctc in (False, True):
        shape, model = _model(tokenizer.vocab_size, ctc)
        folder = tmp_path / f"checkpoints-{ctc}"
        paths[ctc] = write_checkpoint(folder, parse_config(values), shape, model, tokenizer)
    data = ["--data", manifest, "--allow_absolute"]
    for job, rest in ((evaluate_job, data), (transcribe_job, [str(ASSETS / SHORT[0]["audio"])])):
        assert job.main(["--checkpoint", str(paths[False]), *rest, "--decode", "ctc"]) == 2
        assert "error: --decode: ctc needs a CTC head" in capsys.readouterr().err
        with pytest.raises(SystemExit) as ended:
            job.main(["--checkpoint", str(paths[True]), *rest, "--ctc_weight", "0"])
        assert ended.value.code == 2 and "--ctc_weight" in capsys.readouterr().err
    # The settings are those of the training, unless others are given.
    assert Transcriber.load(paths[True]).decoding.decoder == "joint"
    assert Transcriber.load(paths[False]).decoding.decoder == "lm"
    given = Transcriber.load(
        paths[True], options=DecodingOptions(decode="joint", ctc_weight=0.25)
    ).decoding
    assert (given.decoder, given.ctc_weight) == ("joint", 0.25)


@pytest.mark.parametrize(
    ("ctc_weight", "given", "expected"),
    [(0.0, "auto", "lm"), (0.5, "auto", "joint"), (0.5, "lm", "lm")],
)
def test_a_run_resolves_its_decoder_before_it_starts(
    tmp_path: Path, ctc_weight: float, given: str, expected: str
) -> None:
    assert prepare(_run(tmp_path, ctc_weight, given)).config.eval.decode == expected


def test_a_run_with_a_decoder_that_its_model_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^eval\.decode: joint needs a CTC head"):
        prepare(_run(tmp_path, 0.0, "joint"))


def _run(storage: Path, ctc_weight: float, decode: str) -> Any:
    return parse_config(
        {
            "run": {"storage": str(storage)},
            "data": {"train": ["embedded:dev"], "dev": ["embedded:test"], "cache": None},
            "tokenizer": {"vocab_size": 300},
            "model": {"n_layer": 1, "n_head": 2, "n_embd": 32},
            "optim": {"steps": 3, "ctc_weight": ctc_weight},
            "eval": {"decode": decode},
        }
    )
