"""Reading text files in bounded memory: blocks, lines, documents, their units; segments of text to encode."""

import codecs
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Literal

import numpy as np

from shortcut_cli import files
from shortcut_cli.data.documents import RejectedRecord
from shortcut_cli.data.packed import unpacked
from shortcut_cli.errors import Rejected, unreadable

BLOCK_BYTES = 1 << 20
RECORD_BYTES = 320 << 20  # of memory that one line of a .jsonl may take, at 1 byte a character, 4 if not ASCII
BOM = "\ufeff"  # the byte order mark
SPACES = [chr(code) for code in range(0x3001) if chr(code).isspace()]  # all of Unicode's; a test compares
WIDE_SPACES = [(space, space.encode()[:1]) for space in SPACES if not space.isascii()]  # each with its first byte
TAB, FS = np.uint8(9), np.uint8(28)  # ASCII's spaces are five from each of these: tab to CR, FS to the space itself
SHORT_CHARS = 1000  # below this, `split` is faster than numpy
MIN_SEGMENT_CHARS = 1000  # a segment ends at the first newline after this many
MAX_SEGMENT_CHARS = 4096  # or else after its last space
# Empty lines behind a newline, of which a small file can hold very many; a line with its newline, or part of a longer
# one. Later text does not change how a line is divided.
LINE_PART = re.compile(
    f"(?<=\n)\n{{1,{MAX_SEGMENT_CHARS - 1}}}|[^\n]{{0,{MAX_SEGMENT_CHARS - 1}}}\n|[^\n]{{1,{MAX_SEGMENT_CHARS}}}"
)


def read_blocks(path: Path, errors: Literal["strict", "surrogateescape"] = "strict") -> Iterator[str]:
    """The text of a file in blocks, with its byte order mark if it has one.

    Raises Rejected with the byte offset of the first invalid UTF-8, unless `errors` turns it into lone surrogates.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    done = 0
    try:
        with unpacked(path) if path.name.lower().endswith(".gz") else files.regular(path) as stream:
            while block := stream.read(BLOCK_BYTES):
                pending = len(decoder.getstate()[0])
                try:
                    yield decoder.decode(block)
                except UnicodeDecodeError as error:
                    raise Rejected(_not_utf8(error, done - pending)) from error
                done += len(block)
            try:
                yield decoder.decode(b"", final=True)
            except UnicodeDecodeError as error:
                raise Rejected(_not_utf8(error, done - len(decoder.getstate()[0]))) from error
    except OSError as error:
        raise unreadable(error) from error


def _not_utf8(error: UnicodeDecodeError, before: int) -> str:
    return f"is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {before + error.start} ({error.reason})"


def without_bom(blocks: Iterable[str], account: dict[str, float]) -> Iterator[str]:
    """The blocks without a byte order mark at their start, which account["byte_order_marks_dropped"] counts."""
    begun = False
    for block in blocks:
        if not begun and block.startswith(BOM):
            account["byte_order_marks_dropped"] = 1
        yield block if begun else block.removeprefix(BOM)
        begun = begun or bool(block)


def read_lines(blocks: Iterable[str]) -> Iterator[str]:
    """Lines with their newlines, long ones in parts of MAX_SEGMENT_CHARS; only "\\n" ends a line.

    Empty lines can come several at once, but not with the newline that ends another line.
    """
    rest = ""
    for block in blocks:
        parts = LINE_PART.findall(rest + block)
        rest = parts.pop() if parts and not parts[-1].endswith("\n") else ""
        yield from parts
    if rest:
        yield rest


def is_jsonl(path: Path) -> bool:
    """Whether a file holds one JSON object per line."""
    return path.name.lower().removesuffix(".gz").endswith(".jsonl")


@dataclass(frozen=True, eq=False, slots=True)
class Text:
    """The text of one document; `chunks` is to be exhausted before the next document is asked for."""

    chunks: Iterable[str]  # of a record a list, which can be read again
    line: int = 0  # of a record, from 1


def read_documents(
    path: Path,
    kind: str,
    *,
    field: str = "text",
    check: Callable[[str, int], None] | None = None,
    account: dict[str, float] | None = None,
) -> Iterator[Text | RejectedRecord]:
    """The documents of a file, empty ones only if a record or the file is empty.

    kind: "file", "line" or "paragraph"; in a .jsonl file, each record is a document whatever the kind, and `field`
    names its text, dotted. check: called with every text and the byte of the file (of the record) at which it begins;
    may raise Rejected. account: counts what was left out so far.

    Raises Rejected if the file can't be read or decoded, or fails the check; a record that fails costs only itself.
    """
    account = {} if account is None else account
    if is_jsonl(path):  # invalid UTF-8 costs the record that has it
        return _records(read_lines(without_bom(read_blocks(path, "surrogateescape"), account)), field, check)
    blocks = without_bom(read_blocks(path), account)
    if check:
        blocks = _checked(blocks, check, account)
    if kind == "file":
        return iter([Text(blocks)])
    numbered = _by_text(read_lines(blocks), lines=kind == "line")
    return (Text(part for _, part in run) for _, run in groupby(numbered, itemgetter(0)))


def _checked(blocks: Iterable[str], check: Callable[[str, int], None], account: dict[str, float]) -> Iterator[str]:
    """The blocks of a file, once they have passed the check."""
    offset = 0
    for block in blocks:
        check(block, offset + len(BOM.encode()) * bool(account))
        offset += len(block.encode())
        yield block


def _by_line(parts: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Parts of lines, each with the number of its line."""
    number = 0
    for part in parts:
        yield number, part
        number += part.count("\n")


def _by_text(parts: Iterable[str], *, lines: bool) -> Iterator[tuple[int, str]]:
    """Parts of lines, each with the number of its document: a paragraph, or a line that is not blank.

    A document includes the blank lines after it, the first one also those before it.
    """
    number = 0
    # The document has text; it may end here (a paragraph: a blank line followed that text); within a long line.
    full = ended = inside = False
    for part in parts:
        blank = not inside and len(part) < MAX_SEGMENT_CHARS and part.isspace()
        if ended and not blank and not inside:
            number += 1
        full |= not blank
        ended = full and (lines or blank)
        inside = not part.endswith("\n")
        yield number, part


def _records(
    lines: Iterable[str], field: str, check: Callable[[str, int], None] | None
) -> Iterator[Text | RejectedRecord]:
    """The texts of a .jsonl file; lines that are blank are none."""
    names = field.split(".")
    for number, run in groupby(_by_line(lines), itemgetter(0)):
        try:
            line = _joined(part for _, part in run)
            if line.isspace():
                continue
            text = _record_text(line, names)
            del line
            if check:
                _check(text, check)
        except Rejected as reason:
            yield RejectedRecord(number + 1, str(reason))
        else:
            yield Text(_Chunks(text), number + 1)
            del text


def _check(text: str, check: Callable[[str, int], None]) -> None:
    """Check a record in chunks."""
    offset = 0
    for chunk in _Chunks(text):
        check(chunk, offset)
        offset += len(chunk.encode())


def _joined(parts: Iterator[str]) -> str:
    """A line from its parts, which are all read. Raises Rejected if it takes more than RECORD_BYTES of memory."""
    first = next(parts)
    if first.endswith("\n"):
        return first
    whole, size, width = io.StringIO(), 0, 1  # written from its start, it takes no 4 bytes a character
    for part in chain([first], parts):
        size, width = size + len(part), width if part.isascii() else 4
        if size * width > RECORD_BYTES:
            whole = io.StringIO()
        else:
            whole.write(part)
    if size * width > RECORD_BYTES:
        most = RECORD_BYTES // width
        raise Rejected(f"is longer than {most:,} {'' if width == 1 else 'non-ASCII '}characters; use a .txt file")
    return whole.getvalue()


class _Chunks:
    """A text in chunks, as often as wanted, so that nothing is made of all of it at once."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __iter__(self) -> Iterator[str]:
        return (self.text[first : first + BLOCK_BYTES] for first in range(0, len(self.text), BLOCK_BYTES))


def _record_text(line: str, names: list[str]) -> str:
    """The text of a record, in the field that the names lead to. Raises Rejected if it has none.

    line: invalid UTF-8 is in it as lone surrogates, as "surrogateescape" makes them.
    """
    try:
        line.encode()
    except UnicodeEncodeError as error:
        first, before = ord(line[error.start]) & 0xFF, len(line[: error.start].encode())
        raise Rejected(f"is not UTF-8: byte 0x{first:02x} at offset {before} of the line") from None
    try:
        found = json.loads(line.rstrip() if len(line) < BLOCK_BYTES else line)  # no copy of a large one
    except RecursionError:
        raise Rejected("is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise Rejected(f"is not JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}") from None
    except ValueError as error:  # a number of very many digits
        raise Rejected(f"is not JSON: {error}") from None
    for depth, name in enumerate(names):
        if not isinstance(found, dict):
            what = f"the field {'.'.join(names[:depth])!r}" if depth else "it"
            raise Rejected(f"{what} is {_kind(found)}, not an object")
        if name not in found:
            raise Rejected(f"has no field {'.'.join(names[: depth + 1])!r}")
        found = found[name]
    if not isinstance(found, str):
        raise Rejected(f"the field {'.'.join(names)!r} is {_kind(found)}, not a string")
    for chunk in _Chunks(found):
        try:
            chunk.encode()
        except UnicodeEncodeError as error:
            raise Rejected(f"has a lone surrogate, U+{ord(chunk[error.start]):04X}, which is no character") from None
    return found


def _kind(value: object) -> str:
    """What a JSON value is."""
    kinds = {type(None): "null", bool: "a boolean", str: "a string", list: "an array", dict: "an object"}
    return kinds.get(type(value), "a number")


class UnitCounter:
    """Counts a text that comes in chunks: UTF-8 bytes, characters (code points), and words.

    Words are counted as WikiText's perplexities count them: runs of non-blank characters, and every newline is one
    more. A word belongs to the call in which it begins.
    """

    def __init__(self) -> None:
        self.inside = False  # the last character was part of a word

    def add(self, text: str, content: bytes, units: dict[str, float]) -> None:
        """Add a text and its UTF-8 bytes to the units."""
        if text:
            units["byte"] = units.get("byte", 0) + len(content)
            units["character"] = units.get("character", 0) + len(text)
            units["word"] = units.get("word", 0) + self._words(text, content)

    def _words(self, text: str, content: bytes) -> int:
        if len(text) < SHORT_CHARS:
            words = len(text.split()) - (self.inside and not text[0].isspace())
            self.inside = not text[-1].isspace()
            return words + text.count("\n")
        if not text.isascii():
            wide = [space for space, first in WIDE_SPACES if first in content and space in text]
            for space in wide:
                text = text.replace(space, " ")
            content = text.encode() if wide else content
        # Comparing neighbouring bytes takes a tenth of the time that `split` does.
        codes = np.frombuffer(content, np.uint8)
        blank = (codes - TAB < 5) | (codes - FS < 5)  # the other bytes wrap around to larger numbers
        begins = int(np.count_nonzero(blank[:-1] > blank[1:])) + int(not self.inside and not blank[0])
        self.inside = not blank[-1]
        return begins + int(np.count_nonzero(codes == ord("\n")))


class Cutter:
    """Cuts a stream of text at byte counts, each cut moved forward to the next character boundary."""

    def __init__(self, chunks: Iterator[str]) -> None:
        self.chunks = chunks
        self.rest = b""  # of the last chunk
        self.taken = self.end = 0  # bytes taken so far, and bytes up to the next cut
        self.counter = UnitCounter()

    def take(self, size: int, units: dict[str, float]) -> Iterator[str]:
        """The text up to a cut `size` bytes after the previous one; its bytes, characters, words are added to units."""
        self.end += size
        while self.taken < self.end:
            chunk = "" if self.rest else next((chunk for chunk in self.chunks if chunk), "")
            content = self.rest or chunk.encode()
            if not content:
                return
            cut = min(len(content), self.end - self.taken)
            while cut < len(content) and content[cut] & 0xC0 == 0x80:
                cut += 1
            self.rest = content[cut:]
            self.taken += cut
            text = chunk if chunk and not self.rest else content[:cut].decode()
            self.counter.add(text, content[:cut], units)
            yield text


def segments(
    chunks: Iterable[str], shortest: int = MIN_SEGMENT_CHARS, longest: int = MAX_SEGMENT_CHARS
) -> Iterator[str]:
    """Cut a stream of text into segments, which depend only on the text, not on the chunks it comes in.

    A segment ends at the first newline after `shortest` characters; if there is none within `longest`, it ends after
    the last space; if there is no space either, at `longest`.
    """
    rest = ""
    for chunk in chunks:
        rest += chunk
        start = 0
        while len(rest) - start >= longest:
            end = _segment_end(rest, start, shortest, longest)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    while rest:
        end = _segment_end(rest, 0, shortest, longest)
        yield rest[:end]
        rest = rest[end:]


def _segment_end(text: str, start: int, shortest: int, longest: int) -> int:
    """End of the segment that begins at `start`; the text continues for `longest` characters, or ends before that."""
    limit = start + longest
    newline = text.find("\n", start + shortest, limit) + 1
    if newline:
        return newline
    if len(text) < limit:
        return len(text)
    return text.rfind(" ", start, limit) + 1 or limit
