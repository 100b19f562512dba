"""Pages say what is true: links lead somewhere, settings and jobs exist, marked commands run.

A shell block after the comment `<!-- runnable -->` is run as written, those of a page one after
another in one copy of the repository; after `<!-- runnable: slow -->` by `make test-all` only.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from pydantic import BaseModel

from jobs.__main__ import main as first_screen
from omni.config import Config
from omni.errors import ExitCode

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
}
SETTING = re.compile(r"(?<![\w./-])(?:--)?([a-z]+)\.([a-z]\w+)\b(?![./(])")
SUFFIXES = {"bin", "csv", "jsonl", "pkl", "py", "tar", "tsv"}
SHELLS = {"", "sh", "bash", "shell"}
MARKER = re.compile(r"<!-- runnable(: slow)? -->")
FIELDS = {
    f"{section}.{field}"
    for section, of in Config.model_fields.items()
    if isinstance(of.annotation, type) and issubclass(of.annotation, BaseModel)
    for field in of.annotation.model_fields
}
CODES_OF_DRIVERS = set(ExitCode) - {ExitCode.PIPE_CLOSED}
JOBS = {path.stem for path in (ROOT / "jobs").glob("[a-z]*.py")} - {"cli"}


@cache
def _tokens(page: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(PAGES[page].read_text("utf-8"))


def _inline(page: str) -> Iterator[Token]:
    for token in _tokens(page):
        yield from token.children or ()


@cache
def _anchors(page: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    slugs: list[str] = []
    seen: Counter[str] = Counter()
    tokens = _tokens(page)
    for heading, inline in zip(tokens, tokens[1:], strict=False):
        if heading.type == "heading_open":
            shown = "".join(child.content for child in inline.children or ())
            slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
            slugs.append(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
    return set(slugs)


def _targets(page: str) -> Iterator[str]:
    for token in [*_tokens(page), *_inline(page)]:
        if token.type in ("link_open", "image"):
            yield str(token.attrs.get("href") or token.attrs.get("src"))
        elif token.type in ("html_block", "html_inline"):
            yield from re.findall(r'(?:href|src)="([^"]+)"', token.content)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    broken = []
    for target in _targets(page):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (PAGES[page].parent / name).resolve() if name else PAGES[page]
        inside = path.exists() and path.is_relative_to(ROOT)
        if not inside or anchor and anchor not in _anchors(str(path.relative_to(ROOT))):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES)
def test_files_and_settings_that_pages_name_exist(page: str) -> None:
    absent = []
    for code in (token.content for token in _inline(page) if token.type == "code_inline"):
        for path in re.findall(r"(?<![\w/.-])(?:omni|jobs|tests|configs)/[\w./-]*\w", code):
            if not (ROOT / path).exists():
                absent.append(path)
        for section, field in re.findall(SETTING, code):
            known = f"{section}.{field}" in FIELDS or field in SUFFIXES
            if section in Config.model_fields and not known:
                absent.append(f"{section}.{field}")
    assert absent == []


def _table(page: str, heading: str) -> list[list[str]]:
    """Cells of the first table after a heading, without its head."""
    section = PAGES[page].read_text("utf-8").partition(f"\n{heading}\n")[2]
    rows = re.search(r"(?:^\|.*\|\n)+", section, re.M)
    assert rows, f"{page}: no table after {heading}"
    return [[cell.strip() for cell in row[1:-1].split("|")] for row in rows[0].splitlines()[2:]]


def test_every_exit_code_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    codes = [int(code) for code, *_ in _table("docs/running.md", "## Exit codes")]
    assert codes == sorted(ExitCode)
    assert first_screen(["--help"]) == 0
    shown = re.findall(r"\b\d+\b", capsys.readouterr().out.partition("Exit codes: ")[2])
    assert [int(code) for code in shown] == [c for c in codes if c in CODES_OF_DRIVERS]
    named: set[int] = set()
    for code, _ in _table("docs/cluster.md", "## Exit codes and orchestrators"):
        named |= {int(number) for number in re.findall(r"\d+", code)}
    assert named == CODES_OF_DRIVERS


@pytest.mark.parametrize("code", [*CODES_OF_DRIVERS, 128 + signal.SIGKILL])
def test_the_loop_of_restarts_does_what_the_table_says(code: int, tmp_path: Path) -> None:
    """The shell's loop as it is written, with a job that always ends with the same code."""
    page = PAGES["docs/cluster.md"].read_text("utf-8")
    loop = page.partition("<!-- restarts -->\n```\n")[2].partition("```\n")[0]
    stand_in = f"omni() {{ echo started; return {code}; }}\nsleep() {{ :; }}\n"
    done = subprocess.run(["sh", "-c", stand_in + loop], capture_output=True, text=True)
    again = [
        cells[1].startswith("yes")
        for cells in _table("docs/cluster.md", "## Exit codes and orchestrators")
        if str(code) in re.findall(r"\d+", cells[0])
    ]
    starts = 20 if again in ([True], []) else 1
    assert (done.returncode, done.stdout.count("started")) == (code, starts)


def test_every_fault_is_in_both_tables_and_every_test_that_they_name_exists() -> None:
    chaos = re.findall(r'^@_fault\("(.+)"\)$', (ROOT / "tests/chaos/faults.py").read_text(), re.M)
    measured = [
        fault.rstrip(" *\\")
        for fault, *_ in _table("docs/faults.md", "## Thirty faults in one run")
    ]
    assert sorted(measured) == sorted(chaos) and len(chaos) > 10
    named: list[str] = []
    for fault, _, tests in _table("docs/faults.md", "## What is survived"):
        assert "`" in tests, f"{fault}: no test"
        named += re.findall(r"`(.+?)`", tests)
    paths = [name for name in named if name.startswith("tests/")]
    assert set(chaos) == {name for name in named if name not in paths}
    for path, _, function in (name.partition("::") for name in paths):
        assert f"def {function or 'test_'}" in (ROOT / path).read_text(), f"{path}::{function}"


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    text: str
    runnable: bool
    slow: bool


def _blocks() -> Iterator[Block]:
    for page in PAGES:
        marker = None
        for token in _tokens(page):
            if token.type == "fence" and token.info in SHELLS:
                line = (token.map or [0])[0] + 1
                yield Block(page, line, token.content, bool(marker), bool(marker and marker[1]))
            else:
                assert not marker, f"{page}: {marker and marker[0]} without a shell block below it"
            marker = MARKER.match(token.content) if token.type == "html_block" else None


BLOCKS = list(_blocks())
RUNNABLE = [
    pytest.param(
        block,
        id=f"{block.page}:{block.line}",
        marks=[pytest.mark.slow, pytest.mark.timeout(3600)] if block.slow else [],
    )
    for block in BLOCKS
    if block.runnable
]


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each page, a copy of the repository as `make setup` leaves it."""
    copies = {}
    environment = [path for path in Path(sys.prefix).iterdir() if path.name != ".ready"]
    for page in {block.page for block in BLOCKS if block.runnable}:
        copy = copies[page] = tmp_path_factory.mktemp("reader") / "omni"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "build"))
        (copy / ".venv").mkdir()
        for path in environment:
            (copy / ".venv" / path.name).symlink_to(path)
        (copy / ".venv/.ready").touch()
    return copies


@pytest.mark.parametrize("block", RUNNABLE)
def test_marked_commands_run_as_written(block: Block, copies: dict[str, Path]) -> None:
    copy = copies[block.page]
    path = f"{copy}/.venv/bin{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=copy,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(copy)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert done.returncode == 0, done.stdout[-4000:]


@cache
def _help(job: str) -> str:
    """Everything that a job's --help prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        importlib.import_module(f"jobs.{job}").main(["--help"])
    return printed.getvalue()


def test_commands_of_all_pages_name_jobs_and_flags_that_exist() -> None:
    wrong = []
    for block in BLOCKS:
        for command in block.text.replace("\\\n", " ").splitlines():
            found = re.search(
                r"(?:^|&& |= )(?:\w+=\S+ )*(?:\S*python -m jobs\.|\S*\bomni )(\w+)(.*)", command
            )
            if not found:
                continue
            job, arguments = found[1], found[2].partition(" #")[0]
            if job not in JOBS:
                wrong.append(f"{block.page}:{block.line}: {job}")
                continue
            for flag in re.findall(r"(?<=\s)--([\w.-]+)", arguments):
                if flag not in FIELDS and not re.search(rf"--{re.escape(flag)}\b", _help(job)):
                    wrong.append(f"{block.page}:{block.line}: {job} --{flag}")
    assert wrong == []


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").exists()
