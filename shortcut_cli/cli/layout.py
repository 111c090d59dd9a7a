"""How a table fits into a number of columns of the screen: no number, name or interval is ever broken.

First counts are rounded to thousands and millions, then the columns that matter least are left out, and if even the
rest is too wide, the rows are laid out as records, one value on a line.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from shortcut_cli.formatting import cell, rounded, shown, visible

MOST_ROWS = 2000  # of a table that are shown; --json has all
MOST_CHARACTERS = 1000  # of a value in a table that are shown
MOST_LINES = 20  # of a value in a table that are shown
NARROWEST = 16  # columns of the screen for a text of several words, if it has as many
TAB = 8  # columns of the screen
BELOW = 4  # columns by which a value is indented below its heading
FRAME = 3  # columns of the screen between two columns: a line and the spaces beside it
# Words, each with the spaces before it; what is in brackets, an interval say, is one word.
# So is the sign that a value was cut, with what it stands behind.
WORD = re.compile(r" *(?:\[[^\[\]\n]{0,60}\]\S*|\S+)(?: \.\.\.(?=\n|$))?")
Measure = Callable[[str], int]  # the width of a text on the screen


@dataclass(frozen=True)
class Column:
    """A column of a table. rank: those with the highest leave first if there is too little room; 0 never leaves.

    Of equal ranks the rightmost leaves first.
    """

    heading: str
    rank: int = 1


@dataclass(frozen=True)
class Fitted:
    """A table as it fits: the numbers of its columns that are shown, their widths, and the lines of their cells."""

    kept: list[int]
    widths: list[int]
    headings: list[str]
    rows: list[list[str]]


def fit(columns: Sequence[Column], rows: Sequence[Sequence[Any]], room: int, measure: Measure) -> Fitted | None:
    """The table in `room` columns of the screen; None if not even the columns that never leave fit."""
    exact = [[written(value) for value in row] for row in rows]
    short = [[written(value, short=True) for value in row] for row in rows]
    for kept in _choices(columns):
        for texts in (exact, short):
            if widths := _widths(columns, texts, kept, room, measure):
                return Fitted(
                    kept,
                    widths,
                    [wrapped(columns[one].heading, width, measure) for one, width in zip(kept, widths, strict=True)],
                    [
                        [wrapped(row[one], width, measure) for one, width in zip(kept, widths, strict=True)]
                        for row in texts
                    ],
                )
    return None


def records(columns: Sequence[Column], rows: Sequence[Sequence[Any]], room: int, measure: Measure) -> Iterator[str]:
    """The lines, if there is no room for a table: the first value of each row, then the others with their headings.

    Of a table of two columns the first value is the heading. A value stands beside its heading if it fits there, else
    below it. Only a word that is longer than the screen is wide goes beyond it.
    """
    two = len(columns) == 2
    heads = [written(row[0]) for row in rows] if two else [f"  {column.heading}" for column in columns[1:]]
    side = min(max(map(measure, heads), default=0) + 2, max(room // 2, 4))
    for row in rows:
        if not two:
            yield wrapped(written(row[0]), room, measure)
        for head, value in zip([written(row[0])] if two else heads, row[1:], strict=True):
            text = written(value)
            if measure(head) <= side - 2 and "\n" not in head and _least(text, NARROWEST, measure) <= room - side:
                lines = wrapped(text, room - side, measure).replace("\n", "\n" + " " * side)
                yield f"{head}{' ' * (side - measure(head))}{lines}".rstrip(" ")
            else:
                indent = 0 if _least(text, 0, measure) > room - BELOW else BELOW
                yield wrapped(head, room, measure).rstrip(" ")
                yield " " * indent + wrapped(text, room - indent, measure).replace("\n", "\n" + " " * indent)


def written(value: Any, *, short: bool = False) -> str:
    """As much of a value as a table shows. short: large numbers as thousands and millions."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    text = visible(rounded(value) if short and number else cell(value)).replace("\t", "    ")
    kept = "\n".join(text[:MOST_CHARACTERS].split("\n")[:MOST_LINES])
    return kept if kept == text else f"{kept} ..."


def wrapped(text: str, width: int, measure: Measure) -> str:
    """A text in lines of at most `width`, broken at spaces only: a word that is longer stays whole."""
    return "\n".join(line for whole in text.split("\n") for line in _lines(whole, width, measure))


def shortened(text: str, width: int, measure: Measure) -> str:
    """A text in at most `width` columns: what is too much goes from its middle, and of the rest most is its end.

    So the names of a file and of its folder stay in a path, and the seed in the name of a run.
    """
    if measure(text) <= width:
        return text
    head, tail = "", ""
    for letter in text:
        if measure(head + letter) > (width - 1) // 3:
            break
        head += letter
    for letter in reversed(text):
        if measure(letter + tail) > width - 1 - measure(head):
            break
        tail = letter + tail
    return f"{head}\N{HORIZONTAL ELLIPSIS}{tail}"


class Typed:
    """A text that comes bit by bit, in lines of at most `width` that are broken at spaces: a word waits for its end.

    CR and CRLF, which files of other systems have, end a line as LF does. A word as long as a line does not wait.
    """

    def __init__(self, width: int, measure: Measure) -> None:
        self.width, self.measure = width, measure
        self.column, self.word, self.returned = 0, "", False

    def push(self, text: str) -> str:
        """What is to be printed now."""
        return "".join(map(self._letter, text))

    def end(self) -> str:
        """The rest."""
        return self._placed()

    def _letter(self, letter: str) -> str:
        after, self.returned = self.returned, letter == "\r"
        if letter == "\n" and after:
            return ""  # its CR has ended the line
        if letter in "\r\n":
            found, self.column = self._placed() + "\n", 0
            return found
        if letter in " \t":
            found = self._placed()
            if self.column >= self.width:
                self.column = 0
                return found + "\n"
            self.column += 1 if letter == " " else TAB - self.column % TAB
            return found + letter
        self.word += shown(letter)
        return self._placed() if self.measure(self.word) >= self.width else ""

    def _placed(self) -> str:
        """The word, on a line of its own if the present one has no room for it."""
        length, word = self.measure(self.word), self.word
        before = "\n" if self.column and self.column + length > self.width else ""
        self.column, self.word = (0 if before else self.column) + length, ""
        return before + word


def _lines(text: str, width: int, measure: Measure) -> Iterator[str]:
    line = ""
    for word in WORD.findall(text):
        if line and measure(line + word) > width:
            yield line
            line = word.lstrip(" ")
        else:
            line += word
    yield line


def _choices(columns: Sequence[Column]) -> Iterator[list[int]]:
    """The numbers of the columns that are shown: all, then ever fewer; at least two, as long as there are."""
    kept = [*range(len(columns))]
    yield kept
    while len(kept) > 2 and (last := max(kept, key=lambda one: (columns[one].rank, one))) and columns[last].rank:
        kept = [one for one in kept if one != last]
        yield kept


def _widths(
    columns: Sequence[Column], texts: Sequence[Sequence[str]], kept: Sequence[int], room: int, measure: Measure
) -> list[int] | None:
    """The widths of the columns: what they need, and what is left for those that would be wider; None: no room."""
    cells = [[columns[one].heading, *(row[one] for row in texts)] for one in kept]
    usual = [
        room // min(3, len(kept)),
        *([NARROWEST] * (len(kept) - 1)),
    ]  # the first has names, which stay on a line if they can
    least = [
        max(_least(text, most if number else 0, measure) for number, text in enumerate(each))
        for each, most in zip(cells, usual, strict=True)
    ]
    whole = [max(measure(line) for text in each for line in text.split("\n")) for each in cells]
    spare = room - 1 - sum(width + FRAME for width in least)
    if spare < 0:
        return None
    for _ in range(spare):
        wanting = max(range(len(kept)), key=lambda one: whole[one] - least[one])
        if whole[wanting] <= least[wanting]:
            break
        least[wanting] += 1
    return least


def _least(text: str, most: int, measure: Measure) -> int:
    """The least width of a text: its longest word; if it is longer and has several, as much of it as `most`."""
    lines = text.split("\n")
    words = max((measure(word) for line in lines for word in map(str.lstrip, WORD.findall(line))), default=0)
    return max(words + len(text) - len(text.lstrip(" ")), min(max(map(measure, lines)), most))
