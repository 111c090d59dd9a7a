"""Values as text: for people, on the screen and on HTML pages, and as JSON."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

# What a terminal obeys instead of showing: control characters but tab and newline, of both sets, and those that change
# the direction of text or end a line.
OBEYED = (
    *(*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F),
    *(*range(0x2028, 0x202F), *range(0x2066, 0x206A)),
)
ESCAPES = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in OBEYED if chr(code) not in "\t\n"}

# What no font draws. Joiners and selectors are needed between the letters of some scripts and in emoji, but a name that
# begins or ends with one, or has it among ASCII, looks like another name.
UNSEEN = re.compile(
    "[\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u2060-\u206f\u2800\u3164\ufeff\uffa0\ufff9-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e00ff]"
    "|(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])"
    "|(?<![^\x00-\x7f])(?<![#*0-9])[\ufe00-\ufe0f\U000e0100-\U000e01ef]"
)

DIGITS = 4  # of a float
MOST_PLACES = 4  # decimals of numbers of which some are 1 or more
TINY_PLACES = 6  # decimals of numbers below 1, as long as each has two digits there; beyond, all have a power of ten
MOST_DIGITS = 17  # that tell any two floats apart
PREFIXES = " KMBT"  # thousands, millions, 1e9, 1e12: of large numbers in terminals and on pages, bytes excepted


def shown(words: str) -> str:
    """Text as it may reach a terminal: each character that a terminal obeys, except tab and newline, as an escape.

    A file's name can hold the sequence that clears the screen; it is shown as "\\x1b[2J", with a backslash.
    """
    return words.translate(ESCAPES)


def visible(name: str) -> str:
    """A name, or the text of a token: as `shown`, and what has no picture too. Names that differ look different."""
    return shown(name) if name.isascii() else UNSEEN.sub(_escaped, shown(name))


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def to_json(value: Any, indent: int | None = None) -> str:
    """A value as JSON that every parser reads: NaN and the infinities, which JSON does not have, become null.

    It is ASCII without control characters but newlines, so that it can be printed.
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False).replace("\x7f", "\\u007f")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def cell(value: Any) -> str:
    """Thousands separators, four significant digits; lists in brackets; an empty string for None.

    The numbers of a list that has floats alone have equally many decimals.
    """
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:z,.{DIGITS}g}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(cell, alike(value) if all(isinstance(one, float) for one in value) else value))}]"
    return str(value)


def counted(count: int, what: str) -> str:
    """A number of things: 1 document, 2,000 documents."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def alike(values: Sequence[Any]) -> list[Any]:
    """Values as `cell` has them, but with one number of decimals: the most that any of them has there.

    If `cell` would give one of them a power of ten, all have one, or none: those below 1 have TINY_PLACES decimals
    then, if that is enough. As they are if they are not all numbers or lists of numbers, or are too far apart for one
    number of decimals.
    """
    numbers = [number for value in values for number in (value if isinstance(value, (list, tuple)) else [value])]
    numbers = [number for number in numbers if number is not None]
    known = all(isinstance(one, int | float) and not isinstance(one, bool) for one in numbers)
    if not known or not any(isinstance(one, float) and math.isfinite(one) for one in numbers):
        return [*values]
    finite = [one for one in numbers if math.isfinite(one)]
    written, largest = [cell(one) for one in finite], max(map(abs, finite))
    if any("e" in one for one in written):
        smallest = min(abs(one) for one in finite if one)
        if largest < 1 and smallest >= 10 ** (1 - TINY_PLACES):
            return [_formed(value, f"z.{TINY_PLACES}f") for value in values]
        powers = [f"{one:.{DIGITS - 1}e}".partition("e")[0].rstrip("0") for one in finite]
        return [_formed(value, f"z.{max(len(one.partition('.')[2]) for one in powers)}e") for value in values]
    places = max(len(one.partition(".")[2]) for one in written)
    if largest >= 9999.5 or (largest >= 1 and places > MOST_PLACES):
        return [*values]
    return [_formed(value, f"z,.{places}f") for value in values]


def _formed(value: Any, form: str) -> Any:
    """A number, or the numbers of a list, in one form."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(str(_formed(one, form)) for one in value)}]"
    return value if value is None else format(float(value), form)


def apart(first: Any, second: Any) -> tuple[Any, Any]:
    """Two values as `alike` has them; if they differ and would look the same, with the fewest digits that show it."""
    one, other = alike([first, second])
    if first == second or cell(one) != cell(other):
        return one, other
    for digits in range(DIGITS + 1, MOST_DIGITS + 1):
        one, other = (_digits(value, digits) for value in (first, second))
        if one != other:
            return one, other
    return repr(first), repr(second)


def _digits(value: Any, digits: int) -> str:
    """A value with this many significant digits of each number."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_digits(one, digits) for one in value)}]"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:z#,.{digits}g}" if number else cell(value)


def rounded(value: float) -> str:
    """A number as `cell` has it, but from 10,000 on with three digits and K, M, B (1e9) or T (1e12): 3.01M.

    Floats beyond have a power of ten: 1.5e18.
    """
    if not 10_000 <= abs(value) < 999.5e12:
        beyond = isinstance(value, float) and abs(value) >= 999.5e12
        return f"{value:.3g}".replace("e+", "e") if beyond else cell(value)
    digits, power = f"{value:.2e}".split("e")  # rounded first, so that 999,999 is 1M
    group = int(power) // 3
    return f"{float(digits) * 10 ** (int(power) - 3 * group):.3g}{PREFIXES[group].strip()}"
