"""Reading text files in bounded memory, as blocks, lines or documents, and cutting text into segments to encode."""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from shortcut_cli.errors import Rejected

BLOCK_BYTES = 1 << 20
MIN_SEGMENT_CHARS = 1000  # a segment ends at the first newline after this many
MAX_SEGMENT_CHARS = 4096  # or else after its last space
# A line with its newline, or part of a longer one; later text does not change how a line is divided.
LINE_PART = re.compile(f"[^\n]{{0,{MAX_SEGMENT_CHARS - 1}}}\n|[^\n]{{1,{MAX_SEGMENT_CHARS}}}")


def read_blocks(path: Path) -> Iterator[str]:
    """The text of a file in blocks. Raises Rejected with the byte offset of the first invalid UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                pending = len(decoder.getstate()[0])
                try:
                    yield decoder.decode(block)
                except UnicodeDecodeError as error:
                    raise Rejected(_not_utf8(error, done - pending)) from error
                done += len(block)
            try:
                decoder.decode(b"", final=True)
            except UnicodeDecodeError as error:
                raise Rejected(_not_utf8(error, done - len(decoder.getstate()[0]))) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise Rejected(f"is not a whole gzip file: {error}") from error
    except OSError as error:
        raise Rejected(f"can't be read: {error.strerror}") from error


def _not_utf8(error: UnicodeDecodeError, before: int) -> str:
    return f"is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {before + error.start} ({error.reason})"


def read_lines(path: Path) -> Iterator[str]:
    """Lines with their newlines, long ones in parts of MAX_SEGMENT_CHARS; only "\\n" ends a line."""
    rest = ""
    for block in read_blocks(path):
        parts = LINE_PART.findall(rest + block)
        rest = parts.pop() if parts and not parts[-1].endswith("\n") else ""
        yield from parts
    if rest:
        yield rest


def read_documents(path: Path, kind: str) -> Iterator[Iterator[str]]:
    """The documents of a file, none empty unless the file is, each an iterator to be exhausted before the next.

    kind: "file", "line" or "paragraph"; in a .jsonl file, each record is a document whatever the kind.

    Raises Rejected if the file can't be read or decoded.
    """
    if path.name.lower().removesuffix(".gz").endswith(".jsonl"):
        return (iter([text]) for text in _records(path))
    if kind == "file":
        return iter([read_blocks(path)])
    numbered = (_by_line if kind == "line" else _by_paragraph)(read_lines(path))
    return ((part for _, part in run) for _, run in groupby(numbered, itemgetter(0)))


def _by_line(parts: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Parts of lines, each with the number of its line."""
    number = 0
    for part in parts:
        yield number, part
        number += part.endswith("\n")


def _by_paragraph(parts: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Parts of lines, each with the number of its paragraph, which includes the blank lines after it."""
    number = 0
    full = gap = inside = False  # the paragraph has text; a blank line followed that text; within a long line
    for part in parts:
        blank = not inside and len(part) < MAX_SEGMENT_CHARS and part.isspace()
        if gap and not blank:
            number += 1
        full |= not blank
        gap = full and blank
        inside = not part.endswith("\n")
        yield number, part


def _records(path: Path) -> Iterator[str]:
    """The texts of a .jsonl file."""
    for number, run in groupby(_by_line(read_lines(path)), itemgetter(0)):
        line = "".join(part for _, part in run)
        if line.isspace():
            continue
        try:
            text = json.loads(line)["text"]
            text.encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Rejected(f"line {number + 1} is not a JSON object with a string in `text`: {error!r}") from error
        if text:
            yield text


class Cutter:
    """Cuts a stream of text at byte counts, each cut moved forward to the next character boundary."""

    def __init__(self, chunks: Iterator[str]) -> None:
        self.chunks = chunks
        self.rest = b""  # of the last chunk
        self.taken = self.end = 0  # bytes taken so far, and bytes up to the next cut

    def take(self, size: int, units: dict[str, float]) -> Iterator[str]:
        """The text up to a cut `size` bytes after the previous one; units["byte"] counts the bytes that were taken."""
        self.end += size
        while self.taken < self.end:
            content = self.rest or next((chunk for chunk in self.chunks if chunk), "").encode()
            if not content:
                return
            cut = min(len(content), self.end - self.taken)
            while cut < len(content) and content[cut] & 0xC0 == 0x80:
                cut += 1
            self.rest = content[cut:]
            self.taken += cut
            units["byte"] += cut
            yield content[:cut].decode()


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
