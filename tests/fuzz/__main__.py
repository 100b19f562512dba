"""Damaged input of every kind: python -m tests.fuzz --inputs 1000 --seed 0.

A fifth of the inputs are recordings, and go through a real training run; every one of them must be
in the ledger or in rejects.jsonl, and a second decoder, FFmpeg, must hear as much of every one that
was trained as omni does. The others are answered one by one, in a process that may crash or hang
without ending this one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import soundfile

from omni.audio.decode import measure
from omni.audio.windows import SAMPLING_RATE
from tests.fuzz.mutate import mutate_bytes
from tests.fuzz.targets import ASSETS, ROOT, TARGETS, answer
from tests.fuzz.wrong_headers import disagreement, wrong_header

LIMIT_SECONDS = 60.0
START_SECONDS = 600.0
FORMATS = ("wav", "flac", "ogg", "mp3", "opus", "aiff", "au", "w64", "caf")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    recordings = arguments.inputs // 5
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    with tempfile.TemporaryDirectory(prefix="omni-fuzz-") as temporary:
        folder = Path(temporary)
        kinds = [list(TARGETS)[n % len(TARGETS)] for n in range(arguments.inputs - recordings)]
        for number, kind, said, detail in _one_by_one(kinds, arguments.seed, folder):
            answers[kind][said] += 1
            if said in ("CRASH", "HANG"):
                print(f"{kind} {number} (seed {arguments.seed}): {said}\n{detail}", flush=True)
        answers["training"] = _recordings(folder, recordings, arguments.seed)
    columns = ("accepted", "rejected", "refused", "SILENT", "CRASH", "HANG")
    print(f"{'input':<12}" + "".join(f"{name:>10}" for name in columns))
    for kind, counts in answers.items():
        print(f"{kind:<12}" + "".join(f"{counts[name]:>10}" for name in columns))
    total = sum(answers.values(), Counter[str]())
    print(f"{'all':<12}" + "".join(f"{total[name]:>10}" for name in columns))
    return 1 if total["CRASH"] or total["HANG"] or total["SILENT"] else 0


def _one_by_one(kinds: list[str], seed: int, folder: Path) -> Iterator[tuple[int, str, str, str]]:
    """(number, kind, answer, detail) of each input."""
    context = multiprocessing.get_context("spawn")
    process, pipe = _start(context, folder)
    for number, kind in enumerate(kinds):
        pipe.send((kind, seed * 1_000_003 + number))
        try:
            said, detail = pipe.recv() if pipe.poll(LIMIT_SECONDS) else ("HANG", "")
        except (EOFError, ConnectionResetError):
            process.join()
            said, detail = "CRASH", f"the process ended with {process.exitcode}"
        yield number, kind, said, detail
        if said == "HANG" or not process.is_alive():
            process.kill()
            process, pipe = _start(context, folder)
    process.kill()


def _start(context: multiprocessing.context.SpawnContext, folder: Path):  # type: ignore[no-untyped-def]
    ours, theirs = context.Pipe()
    home = Path(tempfile.mkdtemp(dir=folder))
    process = context.Process(target=answer, args=(theirs, home), daemon=True)
    process.start()
    theirs.close()
    if not ours.poll(START_SECONDS):
        raise TimeoutError(f"a process did not start within {START_SECONDS:.0f} s")
    ours.recv()
    return process, ours


def _recordings(folder: Path, count: int, seed: int) -> Counter[str]:
    """A run over damaged recordings in all formats, beside whole ones."""
    rng = random.Random(seed)
    rows = [json.loads(line) for line in (ASSETS / "train.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["duration"] < 3]
    corpus = folder / "recordings"
    corpus.mkdir()
    manifest = []
    for number in range(count + 40):
        row = rows[number % len(rows)]
        name = f"{number:04}.{FORMATS[number % len(FORMATS)]}"
        audio, rate = soundfile.read(ASSETS / row["audio"], dtype="float32")
        path = corpus / name
        if path.suffix == ".opus":
            soundfile.write(path, audio, rate, format="OGG", subtype="OPUS")
        else:
            soundfile.write(path, audio, rate)
        if number >= 40 and number % 2:
            path.write_bytes(mutate_bytes(path.read_bytes(), rng))
        elif number >= 40:
            path.write_bytes(wrong_header(audio, rate, rng))
        manifest.append({"id": str(number), "audio": name, "text": row["text"]})
    path = corpus / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in manifest))
    config = folder / "run.yaml"
    config.write_text("{}\n")
    command = [
        *(sys.executable, "-m", "jobs.train", "--config", str(config)),
        *("--run.storage", str(folder / "runs")),
        *("--data.train", str(path), "--data.max_rejects", "1", "--tokenizer.vocab_size", "300"),
        *("--model.n_layer", "1", "--model.n_head", "1", "--model.n_embd", "32"),
        *("--optim.bin_positions", "256", "--optim.bins_per_step", "8"),
        *("--optim.steps", str(count // 30 + 6), "--train.timeout_seconds", "120"),
        *("--eval.max_utterances", "4"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    counts: Counter[str] = Counter()
    if done.returncode != 0:
        print(done.stdout[-2000:], done.stderr[-4000:])
        counts["CRASH"] = count
        return counts
    run = folder / "runs" / "omni"
    rejected = {row["id"] for row in _lines(run / "rejects.jsonl")}
    trained = _trained_ids(run)
    for number in range(40, count + 40):
        identity = str(number)
        if identity in rejected:
            counts["rejected"] += 1
        elif identity in trained:
            counts["accepted"] += 1
            path = corpus / str(manifest[number]["audio"])
            differs = disagreement(path.read_bytes(), measure(path) / SAMPLING_RATE)
            if differs is not None:
                print(f"recording {identity} ({path.name}): {differs}")
                counts["SILENT"] += 1
        else:
            print(f"recording {identity} ({manifest[number]['audio']}) is not accounted for")
            counts["CRASH"] += 1
    lost = [str(n) for n in range(40) if str(n) not in trained]
    if lost:
        print(f"whole recordings were not trained: {lost}")
        counts["CRASH"] += len(lost)
    return counts


def _trained_ids(run: Path) -> set[str]:
    from omni.plan.plan_file import read_plan_file

    [plan] = (run / "plan").glob("*.parquet")
    ids = read_plan_file(plan).ids
    rows = [row for ledger in (run / "ledger").glob("*.jsonl") for row in _lines(ledger)]
    return {ids[number] for row in rows for number in row["utterances"]}


def _lines(path: Path) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
