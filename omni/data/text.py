"""Languages by their codes."""

from __future__ import annotations

# ISO 639-3 codes and names of the languages whose text is treated in a way of its own.
_ALIASES = {
    **dict.fromkeys(("eng", "english"), "en"),
    **dict.fromkeys(("cmn", "zho", "chi", "chinese", "mandarin"), "zh"),
    **dict.fromkeys(("jpn", "japanese"), "ja"),
    **dict.fromkeys(("tha", "thai"), "th"),
    **dict.fromkeys(("lao",), "lo"),
    **dict.fromkeys(("mya", "bur", "burmese"), "my"),
    **dict.fromkeys(("khm", "khmer"), "km"),
    **dict.fromkeys(("cantonese",), "yue"),
    **dict.fromkeys(("rus", "russian"), "ru"),
    **dict.fromkeys(("ukr", "ukrainian"), "uk"),
    **dict.fromkeys(("bel", "belarusian"), "be"),
    **dict.fromkeys(("bul", "bulgarian"), "bg"),
    **dict.fromkeys(("tur", "turkish"), "tr"),
    **dict.fromkeys(("aze", "azerbaijani"), "az"),
}


def language_code(language: str) -> str:
    """`fr` of fr, FR, fr-CA and fr_FR.UTF-8; the language alone, without script and region."""
    name = language.strip().lower().replace("_", "-").partition("-")[0].partition(".")[0]
    return _ALIASES.get(name, name)
