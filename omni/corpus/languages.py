"""Languages of utterances: their codes, whatever a corpus calls them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping

from omni.errors import counted

_CHINESE = {
    "zh", "cmn", "yue", "wuu", "nan", "hak", "gan", "hsn", "lzh", "cdo", "cjy", "mnp", "cpx", "czh",
    "czo", "cnp", "csp",
}  # fmt: skip
UNSPACED = _CHINESE | {"ja", "th", "lo", "my", "km"}
"""Codes of languages that are written without spaces between words."""
# Countries in place of languages, as some corpora have them. These two are no codes of languages.
_COUNTRIES = {"cn": "zh", "jp": "ja"}


def language_code(language: str) -> str:
    """Reduce a code or a name to a code: fr, fr-CA, fr_FR.UTF-8, fra and French to `fr`.

    The code has no script and no region. Codes win over names; what is neither stays as written, in
    lower case (`is_known` tells).
    """
    return _resolve(language) or _plain(language).partition("-")[0]


def is_known(language: str) -> bool:
    """Check for a code of ISO 639, a tag of BCP 47, or a name of a language."""
    return _resolve(language) is not None


def unknown_languages(counts: Mapping[str | None, int]) -> list[str]:
    """Name, in at most one note, the languages among those of utterances that nothing is known of.

    counts: utterances by language as the corpus has it; None: none named.
    """
    unknown = Counter({n: c for n, c in counts.items() if n and not is_known(n)})
    if not unknown:
        return []
    listed = [f"{name!r} ({counted(count, 'utterance')})" for name, count in unknown.most_common(5)]
    rest = [f"{len(unknown) - 5} more"] if len(unknown) > 5 else []
    return [
        f"not a language that is known: {', '.join(listed + rest)}: scored by words; expected a "
        "code such as zh or fr-CA, or an English name"
    ]


def _plain(language: str) -> str:
    return language.strip().lower().replace("_", "-").partition(".")[0].partition("@")[0]


@functools.lru_cache(maxsize=4096)
def _resolve(language: str) -> str | None:
    # Its names take a moment to load, and most runs have no use for them.
    import langcodes

    code = _plain(language)
    first = code.partition("-")[0]
    if first in _COUNTRIES:
        return _COUNTRIES[first]
    if first == "und":
        return None
    if langcodes.tag_is_valid(code):
        found = langcodes.Language.get(code)
    else:
        try:
            found = langcodes.find(language.strip())
        except LookupError:
            return None
        first = ""
    name = found.extlangs[0] if found.extlangs else found.language or first
    if name == "cmn":
        return "zh"
    # Codes of two letters stay as written: Whisper says tl and jw, where others say fil and jv.
    return first if len(first) == 2 and name not in UNSPACED else name
