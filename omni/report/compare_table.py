"""Show a comparison of runs in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from omni.report.comparison import Comparison, Figure, Utterance, not_compared
from omni.report.number_text import percent
from omni.report.word_marks import compare_words

_STYLES = {"": "", "mark": "yellow", "ins": "green", "del": "red"}
# Without colours, as wdiff writes them.
_MARKS = {"": "{0}", "mark": "[-{1}-]{{+{0}+}}", "ins": "{{+{0}+}}", "del": "[-{0}-]"}


def print_comparison(found: Comparison, console: Console, utterances: int) -> None:
    """Print settings and figures that differ, and the worst differences of transcripts."""
    for run, name, state in zip(found.runs, found.names, found.states, strict=True):
        console.print(Text.assemble((name, "bold"), f"  {state}  ", (str(run.path), "dim")))
    for note in found.notes:
        console.print(Text(f"note: {note}", "yellow"))
    if found.settings:
        table = _table("Setting", found.names)
        for setting, values in found.settings:
            table.add_row(Text(setting), *map(Text, values))
        console.print(table)
    else:
        console.print("no settings differ, besides run.name and run.storage")
    _print_figures(console, "Final figures", found.names, found.figures)
    if found.at_step:
        _print_figures(console, f"At step {found.step:,}", found.names, found.at_step)
    for split in found.agreements:
        lowest = ", ".join(f"{n} {m}" for n, m in zip(found.names, split.lowest, strict=True))
        console.print(
            Text(
                f"{split.split}: {split.common:,} utterances transcribed by several runs, "
                f"{split.same:,} alike; lowest WER alone: {lowest}"
            )
        )
        if split.alone:
            console.print(f"  transcribed by one run only, not compared: {split.alone:,}")
        for note in split.notes:
            console.print(Text(f"  {note}"))
    if found.utterances[:utterances]:
        console.print(Text("largest differences; [-missing-] and {+inserted+} words", "dim"))
    for utterance in found.utterances[:utterances]:
        _print_utterance(console, found.names, utterance)


def _print_figures(
    console: Console, title: str, names: Sequence[str], figures: Sequence[Figure]
) -> None:
    if not figures:
        return
    table = _table(title, names)
    for figure in figures:
        cells = [
            Text(f"{value} *", "bold green") if best else Text(value)
            for value, best in zip(figure.values, figure.best, strict=True)
        ]
        table.add_row(figure.label, *cells)
    console.print(table)
    if any(any(figure.best) for figure in figures):
        console.print("* best", style="dim")
    for note in not_compared(figures):
        console.print(Text(note, "dim"))


def _print_utterance(console: Console, names: Sequence[str], utterance: Utterance) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row(Text("reference", "dim"), "", Text(utterance.reference))
    for name, transcript in zip(names, utterance.transcripts, strict=True):
        if transcript is None:
            table.add_row(Text(name, "dim"), "", Text("not transcribed", "dim"))
            continue
        rate = "" if transcript.wer is None else percent(transcript.wer)
        text = Text()
        for word in compare_words(utterance.reference, transcript.hypothesis):
            apart = " " if word.kind == "del" and text.plain else ""
            shown = _MARKS[word.kind].format(word.text, word.reference)
            text.append(word.before + apart).append(shown, _STYLES[word.kind])
        style = "bold green" if transcript.best else ""
        table.add_row(Text(name, "dim"), Text(rate, style), text)
    console.print(Text(f"{utterance.split} {utterance.id}", "dim"))
    console.print(table)


def _table(first: str, names: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, title_justify="left", header_style="bold")
    table.add_column(first)
    for name in names:
        table.add_column(Text(name), overflow="fold")
    return table
