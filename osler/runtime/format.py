"""One way to write each kind of number, so that page and terminal agree to the digit; and tables of text.

The browser's read-outs are nearly the same: they round to significant figures (`report/script.js`, function `show`).
"""

import math
from collections.abc import Callable, Sequence

MISSING = "–"
MINUS = "\u2212"
UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def percent(fraction: float, digits: int = 1) -> str:
    """Write a fraction: 0.6133 -> `61.3%`."""
    return f"{_fixed(100 * fraction, digits)}%" if math.isfinite(fraction) else MISSING


def points(fraction: float, digits: int = 1) -> str:
    """Write a difference of two fractions in percentage points with its sign: 0.041 -> `+4.1`."""
    if not math.isfinite(fraction):
        return MISSING
    return ("+" if round(100 * fraction, digits) > 0 else "") + _fixed(100 * fraction, digits)


def count(value: float) -> str:
    """Write a count: 1234 -> `1,234`; from 99,950 on `123k`, `1.23M`, `4.56B`, `7.89T`; from 1e15 on `9.1e+29`."""
    if not math.isfinite(value):
        return MISSING
    if abs(value) >= 1e15:
        return f"{value:.1e}".replace("-", MINUS)
    return "".join(_in_units(value)) if abs(value) >= 99_950 else _fixed(value, 0)


def size(value: float) -> str:
    """Write bytes in powers of ten: `512 kB`, `1.23 GB`."""
    if not math.isfinite(value):
        return MISSING
    text, letter = _in_units(value)
    return f"{text} {letter.replace('B', 'G')}B"


def number(value: float) -> str:
    """Write a measurement: `3.00e-4`, `0.0213`, `0.213`, `2.134`, `21.34`, `213.4`, `2,134`; from 99,950 on like a count."""
    if not math.isfinite(value):
        return MISSING
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3:
        mantissa, exponent = f"{size:.2e}".split("e")
        return f"{MINUS if value < 0 else ''}{mantissa}e{MINUS}{abs(int(exponent))}"
    if size >= 99_950:
        return count(value)
    return _fixed(value, 4 if size < 0.1 else 3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0)


def duration(seconds: float) -> str:
    """Write a duration: `0.8 s`, `41 s`, `4 min 12 s`, `2 h 05 min`, `3 d 4 h`."""
    if not math.isfinite(seconds) or seconds < 0:
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h"


def tick(value: float, kind: str = "number") -> str:
    """Write an axis label, which is a round number: `0.25`, `20`, `40k`, `2.5M`, `25%`."""
    if kind == "percent":
        return f"{_round(100 * value)}%"
    for unit, letter in UNITS:
        if abs(value) >= max(unit, 10_000):
            return _round(value / unit) + (letter.replace("B", "G") if kind == "bytes" else letter)
    return _round(value)


def value(value_: float, kind: str) -> str:
    """Write a value as its chart's kind asks: `percent`, `count`, `bytes` or `number`."""
    writers: dict[str, Callable[[float], str]] = {"percent": percent, "count": count, "bytes": size}
    return writers.get(kind, number)(value_)


def plural(n: float, word: str) -> str:
    """Write a count of things: `1 question`, `1,273 questions`."""
    return f"{count(n)} {word}{'' if n == 1 else 's'}"


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Write rows of texts as lines of aligned columns, the first ``left`` of them to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<"] * left + [">"] * (len(widths) - left)
    lines = ("  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def next_steps(run: object, steps: Sequence[tuple[str, str]]) -> str:
    """Write that the run in a folder is done, and below it commands that go on from there, each with what it does."""
    return f"Done: {run}\n" + table([(f"  {command}", f" {what}") for command, what in steps], left=2)


def _round(value_: float) -> str:
    return f"{value_:.6g}".replace("-", MINUS)


def _in_units(value_: float) -> tuple[str, str]:
    """Return a number to three figures in the largest of `UNITS` that it reaches, and the letter; below 999.5 whole, without."""
    for unit, letter in UNITS:
        scaled = abs(value_) / unit
        if scaled >= 0.9995:
            return _fixed(value_ / unit, 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0), letter
    return _fixed(value_, 0), ""


def _fixed(value_: float, digits: int) -> str:
    """Return a number with this many decimals, with commas, a true minus sign, and no sign before a zero."""
    text = f"{value_:,.{digits}f}"
    if text.startswith("-"):
        text = text[1:] if float(text.replace(",", "")) == 0 else MINUS + text[1:]
    return text
