"""The HTTP interface in front of omni-tiny, in one process."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from starlette.testclient import TestClient

from omni.checkpoint.base import checkpoint_folder
from omni.inference.transcriber import Transcriber, transcribe_files
from omni.model.chat_template import Message
from omni.model.decode import Decoding
from omni.model.lm.sampling import GREEDY, Sampling
from omni.serve.answers import Answers, Opened, Piece, RefusedRequest, Reply, Span
from omni.serve.api import make_app
from omni.serve.settings import ServeSettings
from omni.serve.writer import Writer, write_reply

pytestmark = pytest.mark.unit
ASSETS = Path("omni/assets/prompts-en")
ROWS = [json.loads(line) for line in (ASSETS / "dev.jsonl").read_text().splitlines()]
_SECONDS = 60.0
"""Longest that an answer may take, on a busy machine."""
PATH = "/v1/audio/transcriptions"
SETTINGS = ServeSettings("omni-tiny", keys=("k",), max_megabytes=1.0, max_seconds=60.0)


class Here:
    """The model without Ray: what a replica does, one request at a time."""

    def __init__(self, answers: Answers) -> None:
        self._answers, self._writer = answers, Writer(answers, 16)

    async def spans(
        self, data: bytes, language: str | None, timed: bool, sampling: Sampling
    ) -> AsyncIterator[Opened | Span]:
        for item in self._answers.split(data, language, timed, sampling):
            if isinstance(item, Opened):
                yield item
                continue
            found = await asyncio.wrap_future(self._writer.add(item))
            yield Span(item.start, item.seconds, found.text, found.cut)

    async def reply(
        self,
        messages: list[Message],
        recordings: list[bytes],
        limit: int | None,
        sampling: Sampling,
        stream: bool,
    ) -> AsyncIterator[str | Reply]:
        piece = self._answers.conversation(messages, recordings, limit, sampling)
        async for item in write_reply(self._writer, piece, stream):
            yield item

    async def healthy(self) -> bool:
        return True


@pytest.fixture(scope="module")
def tiny() -> Transcriber:
    return Transcriber.load(checkpoint_folder("omni-tiny"))


@pytest.fixture(scope="module")
def client(tiny: Transcriber) -> TestClient:
    app = make_app(Here(Answers(tiny, SETTINGS.max_seconds)), SETTINGS)
    return TestClient(app, headers={"Authorization": "Bearer k"}, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sentences with two seconds of silence between them, as WAV."""
    parts = []
    for row in [row for row in ROWS if row["duration"] > 2][:2]:
        samples, rate = soundfile.read(ASSETS / row["audio"], dtype="float32")
        parts += [samples, np.zeros(2 * rate, dtype=np.float32)]
    path = tmp_path_factory.mktemp("two") / "two.wav"
    soundfile.write(path, np.concatenate(parts), rate)
    return path


def _send(client: TestClient, path: Path, **fields: Any) -> Any:
    with path.open("rb") as file:
        return client.post(PATH, files={"file": file}, data={"model": "omni-tiny", **fields})


def test_a_transcript_is_that_of_omni_transcribe(client: TestClient, tiny: Transcriber) -> None:
    for row in ROWS[:6]:
        path = ASSETS / row["audio"]
        [line] = transcribe_files(tiny, [str(path)])
        assert _send(client, path).json() == {"text": line["text"]}


def test_formats_with_times_are_of_the_spans_of_speech(client: TestClient, two: Path) -> None:
    verbose = _send(client, two, response_format="verbose_json").json()
    first, second = verbose["segments"]
    assert 0 <= first["start"] < first["end"] < second["start"] < second["end"]
    assert second["start"] - first["end"] > 1
    assert verbose["text"] == f"{first['text']} {second['text']}"
    assert verbose["duration"] == pytest.approx(soundfile.info(two).duration, abs=1e-3)
    srt = _send(client, two, response_format="srt")
    assert srt.headers["content-type"].startswith("application/x-subrip")
    assert srt.text.count("-->") == 2 and first["text"] in srt.text
    assert _send(client, two, response_format="vtt").text.startswith("WEBVTT")
    assert _send(client, two, response_format="text").text.endswith("\n")


def test_a_stream_has_the_same_words(client: TestClient, two: Path) -> None:
    whole = _send(client, two).json()["text"]
    lines = [line for line in _send(client, two, stream="true").text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    deltas = [e["delta"] for e in events if e["type"] == "transcript.text.delta"]
    assert "".join(deltas) == whole == events[-1]["text"]


def test_a_conversation_with_a_recording_is_answered(client: TestClient) -> None:
    path = ASSETS / ROWS[0]["audio"]
    data = base64.b64encode(path.read_bytes()).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "opus"}}
    body: dict[str, Any] = {"messages": [{"role": "user", "content": [part]}]}
    answer = client.post("/v1/chat/completions", json=body).json()
    [choice] = answer["choices"]
    assert choice["message"]["content"] == _send(client, path).json()["text"] != ""
    assert choice["finish_reason"] == "stop"
    short = client.post("/v1/chat/completions", json={**body, "max_tokens": 1}).json()
    assert short["choices"][0]["finish_reason"] == "length"
    stream = client.post("/v1/chat/completions", json={**body, "stream": True}).text
    chunks = [json.loads(e[6:]) for e in stream.split("\n\n") if e and "[DONE]" not in e]
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
    assert text == choice["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "file", "status", "field"),
    [
        ({"response_format": "docx"}, "two", 400, "response_format"),
        ({"prompt": "names"}, "two", 400, "prompt"),
        ({"language": "fr"}, "two", 400, "language"),
        ({"model": "whisper-1"}, "two", 404, "model"),
        ({"stream": "true", "response_format": "srt"}, "two", 400, "response_format"),
        ({"include[]": "logprobs"}, "two", 400, "include[]"),
        ({"temperature": "1.5"}, "two", 400, "temperature"),
        ({"temperature": "nan"}, "two", 400, "temperature"),
        ({"temperature": "warm"}, "two", 400, "temperature"),
        ({"temperature": "0.5", "seed": "1.5"}, "two", 400, "seed"),
        ({"timestamp_granularities[]": "word"}, "two", 400, "timestamp_granularities"),
        ({}, "noise", 400, "file"),
        ({}, "long", 413, "file"),
        ({}, "large", 413, None),
        ({}, "none", 400, "file"),
    ],
)
def test_what_cannot_be_answered_says_why(
    client: TestClient, two: Path, tmp_path: Path, fields: Any, file: str, status: int, field: Any
) -> None:
    contents = {
        "two": two.read_bytes(),
        "noise": b"no recording at all",
        "large": bytes(1_100_000),
    }
    if file == "long":
        path = tmp_path / "long.flac"
        soundfile.write(path, np.zeros(61 * 16_000, dtype=np.float32), 16_000)
        contents["long"] = path.read_bytes()
    sent = {"file": ("x.wav", contents[file])} if file != "none" else {"other": ("x.wav", b"")}
    answer = client.post(PATH, files=sent, data=fields)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["param"] == field or file == "none"
    assert "0x" not in error["message"]


def test_words_of_a_conversation_are_sent_as_they_are_written(tiny: Transcriber) -> None:
    by_lm = dataclasses.replace(tiny, decoding=Decoding("lm", max_new_tokens=40))
    app = make_app(Here(Answers(by_lm, 60.0)), dataclasses.replace(SETTINGS, keys=()))
    client = TestClient(app)
    longest = max(ROWS, key=lambda row: row["duration"])
    data = base64.b64encode((ASSETS / longest["audio"]).read_bytes()).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "opus"}}
    body = {"messages": [{"role": "user", "content": [part]}]}
    [choice] = client.post("/v1/chat/completions", json=body).json()["choices"]
    stream = client.post("/v1/chat/completions", json={**body, "stream": True}).text
    events = [e.removeprefix("data: ") for e in stream.split("\n\n") if e]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event)["choices"][0] for event in events]
    words = [c["delta"]["content"] for c in chunks[1:] if "content" in c["delta"]]
    assert "".join(words) == choice["message"]["content"]
    assert len(words) > 2, "not the whole answer at once"
    assert chunks[0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["finish_reason"] == choice["finish_reason"]


def test_the_same_seed_draws_what_omni_transcribe_draws(
    client: TestClient, tiny: Transcriber
) -> None:
    path = ASSETS / ROWS[0]["audio"]
    drawing = dataclasses.replace(
        tiny, decoding=Decoding("lm", max_new_tokens=40, sampling=Sampling(1.0, seed=3))
    )
    [line] = transcribe_files(drawing, [str(path)])
    assert _send(client, path, temperature="1", seed="3").json()["text"] == line["text"]
    data = base64.b64encode(path.read_bytes()).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "opus"}}

    def reply(**fields: Any) -> str:
        body = {"messages": [{"role": "user", "content": [part]}], **fields}
        answer = client.post("/v1/chat/completions", json=body).json()
        return str(answer["choices"][0]["message"]["content"])

    assert reply(temperature=1, seed=3) == line["text"]
    assert reply(temperature=2) != reply(temperature=2), "another seed each time"
    greedy = Decoding("lm", max_new_tokens=40)
    [line] = transcribe_files(dataclasses.replace(tiny, decoding=greedy), [str(path)])
    assert reply(temperature=1, seed=3, top_p=1e-9) == line["text"]


def test_drawn_answers_stand_beside_beams(tiny: Transcriber) -> None:
    data = (ASSETS / ROWS[0]["audio"]).read_bytes()
    wide = Answers(
        dataclasses.replace(tiny, decoding=Decoding("lm", max_new_tokens=40, beam=3)), 60.0
    )
    mixed = [
        piece
        for sampling in (GREEDY, Sampling(1.5, seed=1), Sampling(1.5, seed=2))
        for piece in wide.split(data, None, False, sampling)
        if isinstance(piece, Piece)
    ]
    writer = Writer(wide, 16)
    together = [writer.add(piece) for piece in mixed]
    found = [answer.result(_SECONDS) for answer in together]
    assert found == [writer.add(piece).result(_SECONDS) for piece in mixed]
    assert found[1].text != found[2].text


def test_a_server_that_transcribes_by_ctc_draws_nothing(tiny: Transcriber) -> None:
    data = (ASSETS / ROWS[0]["audio"]).read_bytes()
    by_ctc = dataclasses.replace(tiny, decoding=Decoding("ctc"))
    with pytest.raises(RefusedRequest) as refused:
        list(Answers(by_ctc, 60.0).split(data, None, False, Sampling(0.5)))
    assert refused.value.field == "temperature"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 1, "top_p": 0}, "top_p"),
        ({"temperature": 1, "top_p": 1.1}, "top_p"),
        ({"top_p": 0.5}, "top_p"),
        ({"temperature": 1, "seed": "x"}, "seed"),
        ({"n": 2}, "n"),
    ],
)
def test_wrong_fields_of_a_conversation_are_named(
    client: TestClient, fields: dict[str, Any], named: str
) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], **fields}
    answer = client.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, named)


def test_a_body_without_a_length_is_limited_too(client: TestClient) -> None:
    def parts() -> Any:
        for _ in range(30):
            yield bytes(100_000)

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert client.post(PATH, content=parts(), headers=headers).status_code == 413


def test_a_conversation_is_bounded_before_it_is_decoded(client: TestClient) -> None:
    """A file of constant samples is small, however long."""
    memory = io.BytesIO()
    soundfile.write(memory, np.zeros(300 * 16_000, dtype=np.float32), 16_000, format="FLAC")
    data = base64.b64encode(memory.getvalue()).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "flac"}}
    body = {"messages": [{"role": "user", "content": [part]}]}
    assert client.post("/v1/chat/completions", json=body).status_code == 413


def test_turns_that_the_model_does_not_know_are_refused(client: TestClient) -> None:
    data = base64.b64encode((ASSETS / ROWS[0]["audio"]).read_bytes()).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "opus"}}
    user, assistant = {"role": "user", "content": [part]}, {"role": "assistant", "content": [part]}
    for messages in (
        [user, assistant, user],
        [user, user],
        [user, {"role": "user", "content": []}],
    ):
        answer = client.post("/v1/chat/completions", json={"messages": messages})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")


def test_a_plain_model_wants_a_recording(client: TestClient) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}]}
    answer = client.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")


def test_only_the_page_and_the_health_are_open(client: TestClient) -> None:
    stranger = {"Authorization": "Bearer wrong"}
    for path in ("/v1/models", "/metrics", "/nowhere"):
        assert client.get(path, headers=stranger).status_code == 401
    answer = client.post(PATH, headers=stranger, files={"file": ("x", b"x")})
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/health"):
        assert client.get(path, headers=stranger).status_code == 200
    assert client.get("/v1/models").json()["data"][0]["id"] == "omni-tiny"


def test_requests_are_counted_by_path_and_status(client: TestClient, two: Path) -> None:
    def count(name: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    answered = f'omni_serve_requests_total{{path="{PATH}",status="200"}}'
    before = count(answered), count("omni_serve_audio_seconds_total"), count("omni_serve_requests")
    _send(client, two)
    client.get("/nowhere/1"), client.get("/nowhere/2")
    assert count(answered) == before[0] + 1
    assert count("omni_serve_audio_seconds_total") > before[1] + 4
    assert "nowhere" not in client.get("/metrics").text
    assert count("omni_serve_open_requests") == 1, "this one"
