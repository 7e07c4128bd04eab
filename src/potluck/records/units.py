"""Figures as people read them: three digits and a unit."""

from __future__ import annotations


def count_text(number: float) -> str:
    """A count, e.g. ``812``, ``12.1k`` or ``1.64M``."""
    return _three_digits(number, ("", "k", "M", "G", "T"))


def bytes_text(number: float) -> str:
    """Bytes in powers of 1000, e.g. ``812 B`` or ``34.2 MB``."""
    return _three_digits(number, (" B", " kB", " MB", " GB", " TB"))


def duration_text(seconds: float) -> str:
    """A time span, e.g. ``0.8s``, ``45s``, ``1m20s`` or ``2h05m``."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def one_line(text: str, length: int = 200) -> str:
    """Free text from outside without line breaks or terminal control characters, cut to ``length``."""
    printable = "".join(letter if letter.isprintable() else " " for letter in text[: 4 * length])
    words = " ".join(printable.split())
    return words if len(words) <= length else words[: length - 1] + "…"


def _three_digits(number: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}{units[-1]}" if abs(number) < 999.5 else f"{number:.0f}{units[-1]}"
