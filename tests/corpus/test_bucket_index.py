"""jobs.index whose sources and index lie in a bucket, killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import omni
from omni.corpus.index import build_index
from omni.storage.path import ObjectPath, as_path
from tests.corpus.test_sources import SHAPES, audio_of, make_corpus
from tests.helpers.loopback_s3 import s3_bucket

ROOT = Path(omni.__file__).parents[1]
UTTERANCES = 200


@pytest.mark.slow
def test_a_job_that_writes_into_a_bucket_is_killed_and_goes_on(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, UTTERANCES)
    (tmp_path / "in").mkdir()
    SHAPES["hf parquet"][0](tmp_path, corpus, tmp_path / "in")
    with s3_bucket("indexed") as uri:
        there, out = as_path(uri) / "hub", as_path(uri) / "out"
        assert isinstance(there, ObjectPath) and isinstance(out, ObjectPath)
        for file in sorted((tmp_path / "in" / "hub" / "data").iterdir()):
            (there / file.name).upload(file)
        for row in corpus:
            (there / row["audio"]).upload(tmp_path / row["audio"])
        (there / "m.jsonl").upload(tmp_path / "corpus.jsonl")
        sources = ["--source", f"parquet:{there.uri}", "--source", (there / "m.jsonl").uri]
        command = [sys.executable, "-m", "jobs.index", "--out", out.uri, *sources]
        command += ["--number_ids", "--rows_per_part", "25"]

        running = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 300
        while not list((out / "parts").glob("*.parquet")):
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        assert not (out / "index.json").exists()
        made = len(list((out / "parts").iterdir()))

        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        assert "secret" not in done.stdout + done.stderr
        first, _, total = done.stdout.split(" parts made")[0].splitlines()[-1].partition(" of ")
        assert 0 < int(first) <= int(total) - made + 2, "two tasks may have ended after the look"
        assert int(first) < int(total)
        files = [path.read_bytes() for path in (out / "parts").iterdir()]
        assert not any(b"secret" in data for data in [*files, (out / "index.json").read_bytes()])

        found, plain = build_index([out.uri]), build_index([str(tmp_path / "corpus.jsonl")])
        assert found.table["key"].to_pylist() == 2 * plain.table["key"].to_pylist()
        chosen = found.table.take([0, UTTERANCES - 1, UTTERANCES, 2 * UTTERANCES - 1])
        wanted = plain.table.take([0, UTTERANCES - 1] * 2)
        for one, other in zip(
            audio_of(type(found)(chosen)), audio_of(type(plain)(wanted)), strict=True
        ):
            assert np.array_equal(one, other)
        again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
        assert f"0 of {int(total)} parts made" in again.stdout
        assert json.loads((out / "index.json").read_bytes())["utterances"] == 2 * UTTERANCES
