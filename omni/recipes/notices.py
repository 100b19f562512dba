"""Write what a folder of synthetic speech was made of, and under which licences."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omni.recipes.shards import ShardStats
from omni.recipes.voices import SOURCES
from omni.recipes.wordnet import licence_of

_FLITE = """\
The voices kal16, awb, rms and slt are files of flite (http://cmuflite.org).

Authors:	Language Technologies Institute
Alan W Black <awb@cs.cmu.edu>
David Huggins-Daines <dhd@cepstral.com>
and others (see ACKNOWLEDGEMENTS for details)

Copyright: Copyright (c) 1999-2001 by:
Language Technologies Institute
Carnegie Mellon University
All Rights Reserved.

License:
Permission is hereby granted, free of charge, to use and distribute
this software and its documentation without restriction, including
without limitation the rights to use, copy, modify, merge, publish,
distribute, sublicense, and/or sell copies of this work, and to
permit persons to whom this work is furnished to do so, subject to
the following conditions:
1. The code must retain the above copyright notice, this list of
conditions and the following disclaimer.
2. Any modifications must be clearly marked as such.
3. Original authors' names are not deleted.
4. The authors' names are not used to endorse or promote products
derived from this software without specific prior written
permission.

CARNEGIE MELLON UNIVERSITY AND THE CONTRIBUTORS TO THIS WORK
DISCLAIM ALL WARRANTIES WITH REGARD TO THIS SOFTWARE, INCLUDING
ALL IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS, IN NO EVENT
SHALL CARNEGIE MELLON UNIVERSITY NOR THE CONTRIBUTORS BE LIABLE
FOR ANY SPECIAL, INDIRECT OR CONSEQUENTIAL DAMAGES OR ANY DAMAGES
WHATSOEVER RESULTING FROM LOSS OF USE, DATA OR PROFITS, WHETHER IN
AN ACTION OF CONTRACT, NEGLIGENCE OR OTHER TORTIOUS ACTION,
ARISING OUT OF OR IN CONNECTION WITH THE USE OR PERFORMANCE OF
THIS SOFTWARE."""
_ESPEAK = """\
espeak-ng is a program under GPL-3.0-or-later, run as a command. Speech that it makes contains no
part of the program and is not covered by its licence."""


def readme(facts: Mapping[str, Any], total: ShardStats, shards: int, passes: float) -> str:
    """Describe sources, settings and counts in Markdown."""
    seconds = total.seconds
    lines = [
        "# Synthetic English speech",
        "",
        "Made by `omni synthesize` of omni. Sentences of WordNet 3, spoken by free text-to-speech "
        "programs; no human voice is in it. LICENSES has the notices.",
        "",
        f"- {total.utterances:,} utterances, {total.words:,} words, {seconds:,.0f} s "
        f"({seconds / 3600:.2f} h), {shards:,} shards of FLAC, 16 kHz",
        f"- seed {facts['seed']}; {passes:.3f} passes over {facts['sentences']:,} sentences",
        f"- left out of WordNet: {_counts(facts['left_out'])}",
        f"- compared with {facts['held_out_texts']:,} texts of {', '.join(facts['exclude'])}",
        f"- not spoken: {_counts(total.failures)}",
        f"- silent frames: {total.silence / max(1, total.utterances):.1%} on average",
        "- versions: " + "; ".join(f"{n}: {v}" for n, v in facts["versions"].items()),
        "",
        "| program | share asked for | hours | licence |",
        "|---|---|---|---|",
    ]
    whole = sum(facts["mixture"].values())
    for name, share in facts["mixture"].items():
        hours = total.programs.get(name, 0.0) / 3600
        lines.append(f"| {name} | {share / whole:.0%} | {hours:.2f} | {SOURCES[name][1]} |")
    lines += ["", "| speaker | hours |", "|---|---|"]
    lines += [f"| {name} | {s / 3600:.2f} |" for name, s in sorted(total.speakers.items())]
    return "\n".join(lines) + "\n"


def licences(wordnet: Path, mixture: Mapping[str, float]) -> str:
    """Return the notices of the text and of each program."""
    sections = [("WordNet 3 (the sentences; changed: selected, cleaned)", licence_of(wordnet))]
    if "hibari" in mixture:
        sections.append(("hibari (Apache-2.0)", _hibari_notice()))
    if "flite" in mixture:
        sections.append(("flite", _FLITE))
    if "espeak-ng" in mixture:
        sections.append(("espeak-ng", _ESPEAK))
    return "\n".join(f"{title}\n{'=' * len(title)}\n\n{text.strip()}\n" for title, text in sections)


def _hibari_notice() -> str:
    """Return NOTICE and licence as the package has them."""
    found = {Path(str(f)).name: f for f in importlib.metadata.files("hibari-tts") or ()}
    texts = [found[name].read_text() for name in ("NOTICE", "LICENSE") if name in found]
    return "\n\n".join(texts)


def _counts(counts: Mapping[str, int]) -> str:
    listed = sorted(counts.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{number:,} {reason}" for reason, number in listed) or "none"
