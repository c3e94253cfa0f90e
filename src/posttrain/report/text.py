"""How values are written: numbers for reading, and text in which nothing is invisible."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from typing import Any, TypeGuard

from jinja2 import Undefined
from markupsafe import Markup

ABSENT = "–"
"""Stands where a record holds no value: never a silent zero."""

# Controls (but tab and newline), invisible and bidi formatting, lone surrogates, tag characters. The two joiners
# U+200C and U+200D stay: scripts and emoji need them.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """Control and bidi characters as control pictures or ⟨U+202E⟩, so that text cannot hide or reorder itself."""
    return _HIDDEN.sub(lambda m: chr(0x2400 + ord(m[0])) if m[0] < " " else f"⟨U+{ord(m[0]):04X}⟩", text)


def shown(value: Any) -> str:
    """What the template prints for any value (Jinja's `finalize`); escaping follows it."""
    if isinstance(value, Markup):
        return value
    return ABSENT if value is None or isinstance(value, Undefined) else visible(str(value))


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 3) -> str:
    """To so many significant digits, whole numbers in full; a true minus sign."""
    if not is_number(value):
        return shown(value)
    if value == int(value) and abs(value) < 1e15:
        text = f"{int(value):,}"
    elif 1e-4 <= abs(value) < 1e6:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{decimals}f}"
    else:
        text = f"{value:.{digits - 1}e}"
    return text.replace("-", "−")


def plain(value: Any) -> str:
    """A number that someone chose (an axis tick, a limit): no more digits than it needs."""
    return f"{value:.6g}".replace("-", "−") if is_number(value) else shown(value)


def percent(share: Any) -> str:
    return bare_percent(share) + "\u00a0%" if is_number(share) else shown(share)


def bare_percent(share: Any) -> str:
    """Where the column or the axis already says %."""
    return f"{100 * share:.1f}".replace("-", "−") if is_number(share) else shown(share)


def points(diff: Any) -> str:
    """A difference of shares, in percentage points, always signed."""
    return f"{100 * diff:+.1f}".replace("-", "−") if is_number(diff) else shown(diff)


def p_value(p: Any) -> str:
    return shown(p) if not is_number(p) else "<\u00a00.001" if p < 0.001 else f"{p:.3f}"


def span(interval: Any, write: Any = number) -> str:
    """An interval, its ends written by `write`: `+52.1 to +66.0`."""
    if isinstance(interval, list | tuple) and len(interval) == 2 and all(map(is_number, interval)):
        return f"{write(interval[0])} to {write(interval[1])}"
    return ABSENT


def scaled(value: Any, unit: str) -> str:
    """With an SI prefix: `3.21 PFLOP`."""
    if not is_number(value):
        return shown(value)
    power = min(6, max(0, int(math.log10(abs(value)) // 3))) if value else 0
    return f"{number(value / 1000**power)}\u00a0{' kMGTPE'[power].strip()}{unit}"


def duration(seconds: Any) -> str:
    if not is_number(seconds):
        return shown(seconds)
    if seconds < 60:
        return f"{number(seconds, 2)}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}\u00a0h {minutes:02d}\u00a0min" if hours else f"{minutes}\u00a0min {rest:02d}\u00a0s"


def moment(value: Any) -> str:
    """An ISO time or seconds since the epoch, to the minute."""
    if is_number(value):
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return shown(value)[:16].replace("T", " ")
