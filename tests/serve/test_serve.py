"""`omni serve` as its users see it: OpenAI's client, replicas that die, a full queue."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from omni.checkpoint.base import checkpoint_folder
from omni.inference.transcriber import Transcriber, transcribe_files

pytestmark = pytest.mark.ray
ASSETS = Path("omni/assets/prompts-en")
ROWS = [json.loads(line) for line in (ASSETS / "dev.jsonl").read_text().splitlines()]
FILES = [ASSETS / row["audio"] for row in ROWS[:12]]


@contextmanager
def served(log: Path, *arguments: str) -> Iterator[tuple[openai.OpenAI, subprocess.Popen[bytes]]]:
    """Run the server with a key until the test has finished."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMNI_API_KEY": "k"}
    command = [sys.executable, "-m", "jobs.serve", "--port", str(port), *arguments]
    with log.open("wb") as output:
        job = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        end = time.monotonic() + 180
        while b"serving " not in log.read_bytes():
            assert job.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        url = f"http://127.0.0.1:{port}/v1"
        yield openai.OpenAI(base_url=url, api_key="k", max_retries=0, timeout=120), job
    finally:
        family = [job, *psutil.Process(job.pid).children(recursive=True)] if not job.poll() else []
        job.terminate()
        job.wait(60)
        _, left = psutil.wait_procs(family[1:], timeout=20)
        assert not left, left
    assert job.returncode == 0, log.read_text()


def _text(client: openai.OpenAI, path: Path) -> str:
    with path.open("rb") as file:
        return client.audio.transcriptions.create(model="omni-tiny", file=file).text


def _drawn(client: openai.OpenAI, path: Path, seed: int, temperature: float = 1.0) -> str:
    body = {"seed": seed}
    with path.open("rb") as file:
        return client.audio.transcriptions.create(
            model="omni-tiny", file=file, temperature=temperature, extra_body=body
        ).text


def _chat(client: openai.OpenAI, path: Path, stream: bool = True) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    part: Any = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    answer = client.chat.completions.create(
        model="omni-tiny", messages=[{"role": "user", "content": [part]}], stream=stream
    )
    if not stream:
        return str(answer.choices[0].message.content)
    return "".join(chunk.choices[0].delta.content or "" for chunk in answer)


@pytest.fixture(scope="module")
def wanted() -> dict[Path, str]:
    tiny = Transcriber.load(checkpoint_folder("omni-tiny"))
    lines = transcribe_files(tiny, list(map(str, FILES)))
    return {path: line["text"] for path, line in zip(FILES, lines, strict=True)}


def test_openais_client_gets_what_omni_transcribe_writes(
    tmp_path: Path, wanted: dict[Path, str]
) -> None:
    with served(tmp_path / "log") as (client, _):
        assert [model.id for model in client.models.list()] == ["omni-tiny"]
        assert {path: _text(client, path) for path in FILES} == wanted
        with FILES[0].open("rb") as file:
            events = list(
                client.audio.transcriptions.create(model="omni-tiny", file=file, stream=True)
            )
        assert events[-1].type == "transcript.text.done"
        assert events[-1].text == wanted[FILES[0]]
        assert _chat(client, FILES[0], stream=False) == wanted[FILES[0]]
        assert _chat(client, FILES[0], stream=True) == wanted[FILES[0]]
        drawn = [_drawn(client, FILES[0], seed) for seed in (3, 3, 4)]
        assert drawn[0] == drawn[1] != drawn[2]
        with pytest.raises(openai.BadRequestError):
            _drawn(client, FILES[0], 3, temperature=1.5)
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="other").models.list()
        with pytest.raises(openai.BadRequestError):
            client.audio.transcriptions.create(model="omni-tiny", file=("x.wav", b"noise"))


@pytest.mark.slow
def test_a_replica_that_dies_costs_no_answer(tmp_path: Path, wanted: dict[Path, str]) -> None:
    with served(tmp_path / "log", "--replicas", "2") as (client, job):
        found: Counter[str] = Counter()
        end = time.monotonic() + 40

        def ask(number: int) -> None:
            turn = number
            while time.monotonic() < end:
                path = FILES[turn % len(FILES)]
                try:
                    ask_for = _text if turn % 2 else _chat
                    right = ask_for(client, path) == wanted[path]
                    found["right" if right else "wrong"] += 1
                except openai.APIStatusError as error:
                    found[str(error.status_code)] += 1
                turn += 1

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for _ in range(2):
            time.sleep(8)
            os.kill(_replicas(job)[0], signal.SIGKILL)
        for thread in threads:
            thread.join()
        assert set(found) <= {"right", "429"} and found["right"] > 40, found
        assert len(_replicas(job)) == 2, "those that died were replaced"


@pytest.mark.slow
def test_a_full_queue_answers_429(tmp_path: Path, wanted: dict[Path, str]) -> None:
    with served(tmp_path / "log", "--queue", "1") as (client, _):
        codes: Counter[int] = Counter()

        def ask(path: Path) -> None:
            try:
                assert _text(client, path) == wanted[path]
                codes[200] += 1
            except openai.APIStatusError as error:
                codes[error.status_code] += 1

        threads = [threading.Thread(target=ask, args=(FILES[n % 12],)) for n in range(96)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(codes) == {200, 429} and codes[200] >= 32, codes


def _replicas(job: subprocess.Popen[bytes]) -> list[int]:
    """Return the processes of the model's replicas."""
    return [
        process.pid
        for process in psutil.Process(job.pid).children(recursive=True)
        if "ServeReplica:omni:model" in " ".join(process.cmdline())
    ]
