"""Corpora whose texts, names and labels hold what a terminal or a browser would obey."""

from __future__ import annotations

import contextlib
import io
import random
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import index as index_job
from jobs import inspect as inspect_job
from jobs.cli import json_text, run_job
from omni.errors import ConfigError
from omni.run.console import LiveView
from tests.fuzz.recorded import sound

MARK = "<img src=x onerror=alert(1)>"
ESCAPES = [
    "\x1b[2J", "\x1b]0;title\x07", "\x1b]52;c;cm0gLXJm\x07", "\x1b]8;;http://127.0.0.1/\x1b\\",
    "\x1bP$q\x1b\\", "\x1b[8;1;1t", "\x1b[6n", "\x1bc", "\x9b31m", "\x9d0;title\x9c", "\x90",
    "\x08\x08", "\r", "\x0b", "\x0c", "\x07", "\x7f", "\x85", "\u2028", "\u2029", "\u202e",
    "\u2066", "\u200e", "\ufeff", "\u00ad", "\U000e0041", "[/]", "\\[/b]", "[bold]", "[/04]",
    "[link=http://127.0.0.1]", "a\\", "\n", "\t", "{{1}}", "%s%n", "&lt;b&gt;",
    MARK, "</script><script>alert(1)</script>", "'\"><svg/onload=alert(1)>",
]  # fmt: skip
"""Escape sequences and controls, marks of direction, markup of rich, and HTML."""


def terminal(folder: Path, rng: random.Random) -> str:
    """Everything that is shown of such a corpus is printable, and its page has no foreign tags."""
    home = folder / "corpus"
    home.mkdir(exist_ok=True)
    texts = [_text(rng) for _ in range(24)]
    rows = [
        {
            "id": f"{n} {texts[n]}",
            "text": texts[n + 4],
            "language": texts[n + 8][:12],
            "speaker": texts[n + 12],
            "kind": texts[n + 16],
            "audio": {"bytes": sound() if n else None, "path": None if n else texts[n + 20]},
        }
        for n in range(4)
    ]
    pq.write_table(pa.Table.from_pylist(rows), home / "x.parquet")
    out = folder / f"index-{rng.randrange(1 << 40):x}"
    keep = ["--keep", "kind"] if rng.random() < 0.5 else []
    code, said = _job(index_job.main, "--source", str(home / "x.parquet"), "--out", str(out), *keep)
    assert code in (0, 2), f"exit code {code}: {said}"
    answer = "refused"
    if code == 0:
        answer = "accepted"
        code, more = _job(inspect_job.main, str(out), "--out", str(folder / "page.html"))
        assert code in (0, 2), f"exit code {code}: {more}"
        said += more
        if code == 0:
            page = (folder / "page.html").read_text()
            assert MARK not in page and "<script>alert" not in page and "<svg/onload" not in page
    said += _shown(texts)
    wrong = {c for c in said if not c.isprintable() and c != "\n"}
    assert not wrong, f"{sorted(map(ascii, wrong))} in {said!a}"
    return answer


def _text(rng: random.Random) -> str:
    """A word with one to three of them, or with any other control characters."""
    pieces = ["word", *(rng.choice(ESCAPES) for _ in range(rng.randint(1, 3)))]
    if rng.random() < 0.3:
        pieces.append(chr(rng.choice([rng.randrange(1, 32), rng.randrange(0x7F, 0xA1)])))
    rng.shuffle(pieces)
    return "".join(pieces)


def _job(main: Any, *arguments: str) -> tuple[int, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(arguments))
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, out.getvalue() + err.getvalue()


def _shown(texts: list[str]) -> str:
    """What the live view, an error and a row of JSON say of them."""

    def fail() -> None:
        raise ConfigError(texts[0])

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        view = LiveView()
        examples = [{"reference": texts[1], "hypothesis": texts[2]}]
        scores: dict[str, Any] = {"dev_loss": 1.0, "dev_accuracy": 0.5, "shuffled_audio_gap": 0.1}
        view.rows([{"kind": "eval", "step": 1, **scores, "dev_wer": 0.5, "examples": examples}])
        view.rows([{"kind": "note", "step": 1, "text": texts[3]}])
        view.events([{"event": "failure", "step": 1, "reason": texts[4]}])
        view.warn(texts[5])
        view.footer({"rejects": {texts[6]: 1}}, Path("page"))
        assert run_job(fail) == 2
        print(json_text({"id": texts[7], "text": texts[8]}), file=sys.stdout)
    return out.getvalue()
