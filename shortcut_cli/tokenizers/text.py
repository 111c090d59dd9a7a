"""Text: SentencePiece pieces, or one id a character from a fixed alphabet; the natural unit is the byte.

Nothing is lost: with `normalization = "identity"` decode(encode(x)) == x for any valid UTF-8. Characters that are no
piece become their bytes, a newline is a piece of its own, and the one character that SentencePiece uses for itself,
U+2581, is encoded as its three bytes by hand.

A document is encoded segment by segment, so that memory stays flat and ids do not depend on how a file is read;
segments of many small documents go to SentencePiece together.
"""

import codecs
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from pydantic import Field, model_validator

from shortcut_cli import files
from shortcut_cli.errors import CheckFailed, Rejected, ShortcutError, UsageError
from shortcut_cli.recipe import Keys
from shortcut_cli.tokenizers.base import Assign, Classes, Document, Excerpt, Guide, Piece, Source, Tokenizer

FORMAT = 1
IDENTITY = {"algorithm", "alphabet", "documents", "normalization"}  # what counts beside the SentencePiece model
BLOCK_BYTES = 1 << 20
SEGMENT_CHARS = 1000  # a segment ends with the first newline from here on
LONGEST_CHARS = 4096  # or is cut here, after the last space in it
BATCH_CHARS = 1 << 21  # handed to SentencePiece at once
SPACE = "\u2581"
CHARACTER_CLASSES = ("letter", "digit", "space", "punctuation", "byte or control", "end")
TRAINING_LINE_BYTES = 4096  # SentencePiece leaves out longer lines (its max_sentence_length is 4192)


class TextOptions(Keys):
    """[tokenizer] of text."""

    name: Literal["text"] = Field(description="the domain")
    algorithm: Literal["unigram", "bpe", "char", "chars"] = Field(
        "unigram", description="of SentencePiece; or chars: one id a character of `alphabet`, no training (text8)"
    )
    vocabulary: int = Field(8000, description="pieces at most, those for single bytes included; not for chars", ge=260)
    model: str = Field("", description="an existing SentencePiece .model, instead of training one")
    documents: Literal["file", "line", "paragraph"] = Field(
        "file", description="what a document is; paragraphs end with blank lines; each record of a .jsonl is one"
    )
    normalization: Literal["identity", "nfkc"] = Field("identity", description="identity loses nothing")
    character_coverage: float = Field(
        0.9995, description="share of the training characters that get pieces", gt=0, le=1
    )
    sample_mb: int = Field(32, description="text that SentencePiece is trained on, at most, in MB", ge=1)
    alphabet: str = Field(" abcdefghijklmnopqrstuvwxyz", description="the characters of chars", min_length=1)

    @model_validator(mode="after")
    def _chars_have_an_alphabet_and_no_model(self) -> "TextOptions":
        if len(set(self.alphabet)) < len(self.alphabet):
            raise ValueError(f"alphabet {self.alphabet!r} names a character twice")
        if self.algorithm == "chars" and self.model:
            raise ValueError(f"algorithm chars takes no model, and model is {self.model!r}")
        return self


@dataclass(frozen=True, eq=False, slots=True)
class Part:
    """What one split gets of a document, as text; `units` is complete when `chunks` is exhausted."""

    document: Document
    split: str
    units: dict[str, float]
    chunks: Iterator[str]


class TextTokenizer(Tokenizer):
    """Text files <-> ids."""

    Options = TextOptions
    unit: ClassVar[str] = "byte"
    suffixes: ClassVar[tuple[str, ...]] = (".txt", ".md", ".jsonl", ".txt.gz", ".md.gz", ".jsonl.gz")
    extension: ClassVar[str] = ".txt"

    def __init__(self, options: TextOptions, model: bytes = b"", trained_on: dict[str, int] | None = None) -> None:
        self.options = options
        self.model = model
        self.trained_on = trained_on or {}
        if options.model and not model:
            self.model = _read_model(Path(options.model))

    def __getstate__(self) -> dict[str, Any]:
        # The processor is rebuilt where it is used; it can't cross a process boundary.
        return {name: value for name, value in self.__dict__.items() if name != "pieces"}

    @cached_property
    def characters(self) -> "Characters | None":
        """The alphabet of `chars`."""
        return Characters(self.options.alphabet) if self.options.algorithm == "chars" else None

    @cached_property
    def pieces(self) -> "Pieces | Characters":
        """The mapping between text and ids."""
        assert not self.needs_fit, "fit comes before encode"
        return self.characters or Pieces(self.model)

    @property
    def vocabulary(self) -> int:
        """Pieces or characters, and the end id."""
        return self.pieces.end_id + 1 if self.pieces.adds_end else self.pieces.size

    @property
    def end(self) -> int:
        """SentencePiece's </s>, or an id of its own."""
        return self.pieces.end_id

    @property
    def needs_fit(self) -> bool:
        """Whether SentencePiece has to be trained."""
        return self.options.algorithm != "chars" and not self.model

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the model or alphabet, and of how text is divided."""
        assert not self.needs_fit, "fit comes before fingerprint"
        chars = self.options.algorithm == "chars"
        parts = {
            "format": FORMAT,
            "model": self.options.alphabet if chars else hashlib.sha256(self.model).hexdigest(),
            "segments": [SEGMENT_CHARS, LONGEST_CHARS],
            "documents": self.options.documents,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def description(self) -> dict[str, str | int | float]:
        """Library version, what it was trained on, and whether text survives to the byte."""
        if self.options.algorithm == "chars":
            return {"library": "none", "lossless": True}
        lossless = {} if self.needs_fit else {"lossless": self.pieces.lossless}
        return {"library": f"sentencepiece {version('sentencepiece')}", **self.trained_on, **lossless}

    def survey(self, source: Source) -> Iterator[Document]:
        """Documents with the hash and size of their text. Raises Rejected where it is not valid UTF-8, or empty."""
        offset = 0
        for chunks in read_documents(source.path, self.options.documents):
            digest, size = hashlib.sha256(), 0
            for chunk in self._checked(chunks, offset):
                content = chunk.encode()
                digest.update(content)
                size += len(content)
            yield Document(digest.hexdigest(), source.start + offset, size, {"byte": size})
            offset += size
        if not offset:
            raise Rejected("is empty")

    def _checked(self, chunks: Iterable[str], offset: int) -> Iterator[str]:
        """The chunks, which begin `offset` bytes into their file, as long as all their characters have ids."""
        for chunk in chunks:
            if self.characters:
                self.characters.check(chunk, offset)
                offset += len(chunk.encode())
            yield chunk

    def fit(self, sources: Sequence[Source], assign: Assign) -> str | None:
        """Train SentencePiece on lines of the training split, spread evenly over it, `sample_mb` at most.

        Text too short for `vocabulary` pieces gets as many as it fills.
        """
        wanted = self.options.vocabulary
        try:
            self.model = _train(self._sample(sources, assign), self.options, wanted)
        except _TooMany as error:
            self.model = _train(self._sample(sources, assign), self.options, error.largest)
            return f"the training split fills {error.largest} pieces, not the {wanted} of tokenizer.vocabulary"
        return None

    def _sample(self, sources: Sequence[Source], assign: Assign) -> Iterator[str]:
        """Lines of the training split: a line is taken whenever the share of all text is behind `sample_mb`."""
        budget, total = self.options.sample_mb * 1_000_000, sum(source.size for source in sources)
        used = available = 0
        for segment in self._training_segments(sources, assign):
            available += len(segment.encode())
            for line in segment.split("\n"):
                if line and used * total <= available * budget:
                    used += len(line.encode())
                    yield line
        self.trained_on = {"trained_on_bytes": used, "training_split_bytes": available}

    def _training_segments(self, sources: Sequence[Source], assign: Assign) -> Iterator[str]:
        for source in sources:
            for part in self._parts(source, assign):
                if part.split == "train":
                    yield from segments(part.chunks)
                else:
                    _exhaust(part.chunks)

    def encode(self, source: Source, assign: Assign, threads: int) -> Iterator[Piece]:
        """Pieces with their ids; raises ShortcutError where the file changed since the survey."""
        changed = ShortcutError(f"{source.path} changed while it was being prepared", "run the same command again")
        if files.sha256(source.path) != source.sha256:
            raise changed
        size = 0
        for part, run in groupby(self._encoded(source, assign, threads), itemgetter(0)):
            yield Piece(part.document, part.split, part.units, (ids for _, ids in run))
            size += int(part.units["byte"])
        if size != source.size:
            raise changed

    def _encoded(self, source: Source, assign: Assign, threads: int) -> Iterator[tuple[Part, np.ndarray]]:
        """Ids in order, each block with its part; what is encoded at once can be of many parts."""
        every = ((part, segment) for part in self._parts(source, assign) for segment in segments(part.chunks))
        for batch in _batches(every, round(BATCH_CHARS * self.block_scale)):
            ids = self.pieces.encode([segment for _, segment in batch], threads)
            parts = (part for part, _ in batch)
            for part, run in groupby(zip(parts, ids, strict=True), itemgetter(0)):
                yield part, np.concatenate([block for _, block in run])

    def _parts(self, source: Source, assign: Assign) -> Iterator[Part]:
        texts = read_documents(source.path, self.options.documents)
        # Not strict: a file that grows in between shows in the sizes.
        for document, chunks in zip(self.survey(source), texts, strict=False):
            cutter = Cutter(chunks)
            for split, size in assign(document):
                units: dict[str, float] = {"byte": 0}
                yield Part(document, split, units, cutter.take(size, units))

    def prompt(self, path: Path) -> np.ndarray:
        """The ids of one file, whatever its documents."""
        chunks = (chunk for document in read_documents(path, "file") for chunk in document)
        ids = self.pieces.encode(list(segments(self._checked(chunks, 0))), 1)
        return np.concatenate([np.zeros(0, np.int64), *ids])

    def decode(self, ids: Sequence[int], path: Path) -> dict[str, float]:
        """Write the text; byte pieces that are no UTF-8 together become U+FFFD."""
        content = self.pieces.decode(until(ids, self.end)).encode()
        files.write(path, content)
        return {"byte": len(content)}

    def classes(self, ids: np.ndarray) -> dict[str, Classes]:
        """By the first character of a piece, the space before it apart."""
        return {"character": Classes([*CHARACTER_CLASSES], self._classes[ids])}

    @cached_property
    def _classes(self) -> np.ndarray:
        return np.array([CHARACTER_CLASSES.index(self._class(i)) for i in range(self.vocabulary)])

    def _class(self, token: int) -> str:
        if token == self.end:
            return "end"
        text = self.pieces.spelling(token)
        if text is None:
            return "byte or control"
        first = text.lstrip(" ")[:1]
        if not first or first.isspace():
            return "space"
        return "letter" if first.isalpha() else "digit" if first.isdigit() else "punctuation"

    def excerpt(self, ids: np.ndarray) -> Excerpt:
        """The text of each piece; a byte of a longer character as its number."""
        return Excerpt(texts=["<end>" if i == self.end else self.pieces.shown(int(i)) for i in ids])

    def guide(self) -> Guide:
        """No control pieces, and no end before anything is there."""
        return Letters(self.pieces.beginning, self.pieces.anything)

    def save(self, folder: Path) -> None:
        """tokenizer.json, and the SentencePiece model where there is one."""
        identity = self.options.model_dump(include=IDENTITY)
        content = {"format": FORMAT, "options": identity, "trained_on": self.trained_on}
        files.write(folder / "tokenizer.json", json.dumps(content, indent=1, sort_keys=True) + "\n")
        if self.options.algorithm != "chars":
            files.write(folder / "sentencepiece.model", self.model)

    @classmethod
    def load(cls, options: Keys, folder: Path) -> "TextTokenizer":
        """Raises CheckFailed where the files are not a text tokenizer's."""
        assert isinstance(options, TextOptions), options
        try:
            content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            trained_on, identity = content["trained_on"], content["options"]
            model = b"" if options.algorithm == "chars" else (folder / "sentencepiece.model").read_bytes()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckFailed(f"{folder} does not hold a text tokenizer: {error!r}") from error
        if identity != options.model_dump(include=IDENTITY):
            raise CheckFailed(f"{folder} holds a text tokenizer of another configuration than the recipe's")
        if options.algorithm != "chars":
            Pieces(model)
        return cls(options, model, trained_on)


class Letters(Guide):
    """Follows a sampled text."""

    def __init__(self, beginning: np.ndarray, anything: np.ndarray) -> None:
        self.beginning, self.anything = beginning, anything
        self.least = 1

    def allowed(self, left: int) -> np.ndarray:
        """What can be text."""
        del left
        return self.beginning if self.least else self.anything

    def push(self, token: int) -> None:
        """One more piece."""
        del token
        self.least = 0


# Text in, text out ----------------------------------------------------------------------------------------------------


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def read_blocks(path: Path) -> Iterator[str]:
    """The text of a file in blocks. Raises Rejected with the byte offset of what is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    try:
        with _open(path) as stream:
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


# A line with its newline, or a part of one that is longer; what follows does not change how a line is divided.
LINE_PART = re.compile(f"[^\n]{{0,{LONGEST_CHARS - 1}}}\n|[^\n]{{1,{LONGEST_CHARS}}}")


def read_lines(path: Path) -> Iterator[str]:
    """Lines with their newlines, longer ones in parts of LONGEST_CHARS; only "\\n" ends a line."""
    rest = ""
    for block in read_blocks(path):
        parts = LINE_PART.findall(rest + block)
        rest = parts.pop() if parts and not parts[-1].endswith("\n") else ""
        yield from parts
    if rest:
        yield rest


def read_documents(path: Path, kind: str) -> Iterator[Iterator[str]]:
    """The documents of a file, each as an iterator of chunks that is to be exhausted before the next; none is empty."""
    if path.name.lower().removesuffix(".gz").endswith(".jsonl"):
        return (iter([text]) for text in _records(path))
    if kind == "file":
        return iter([read_blocks(path)])
    numbered = (_by_line if kind == "line" else _by_paragraph)(read_lines(path))
    return ((chunk for _, chunk in run) for _, run in groupby(numbered, itemgetter(0)))


def _by_line(parts: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Parts of lines, each with the number of its line."""
    number = 0
    for part in parts:
        yield number, part
        number += part.endswith("\n")


def _by_paragraph(parts: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Parts of lines, each with the number of its paragraph, to which the blank lines behind it belong."""
    number = 0
    full = gap = inside = False  # text in the paragraph; a blank line behind that text; within a long line
    for part in parts:
        blank = not inside and len(part) < LONGEST_CHARS and part.isspace()
        if gap and not blank:
            number += 1
        full |= not blank
        gap = full and blank
        inside = not part.endswith("\n")
        yield number, part


def _records(path: Path) -> Iterator[str]:
    for number, run in groupby(_by_line(read_lines(path)), itemgetter(0)):
        line = "".join(part for _, part in run)
        if line.isspace():
            continue
        try:
            text = json.loads(line)["text"]
            text.encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Rejected(f"line {number + 1} is no JSON object with a text in `text`: {error!r}") from error
        if text:
            yield text


def _exhaust(chunks: Iterable[str]) -> None:
    for _ in chunks:
        pass


class Cutter:
    """Takes a stream of text apart at byte counts, each cut moved on to the next character."""

    def __init__(self, chunks: Iterator[str]) -> None:
        self.chunks = chunks
        self.rest = b""
        self.taken = self.end = 0

    def take(self, size: int, units: dict[str, float]) -> Iterator[str]:
        """Up to `size` bytes behind the cut before; units["byte"] counts what was taken."""
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


def segments(chunks: Iterable[str], shortest: int = SEGMENT_CHARS, longest: int = LONGEST_CHARS) -> Iterator[str]:
    """Cut a stream of text where a segment ends; depends on the text alone, not on the chunks it comes in.

    A segment ends with the first newline from `shortest` characters on; where there is none within `longest`, it ends
    after the last space, or there.
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
    """End of the segment that begins at `start` of a text that goes on for `longest`, or ends before."""
    limit = start + longest
    newline = text.find("\n", start + shortest, limit) + 1
    if newline:
        return newline
    if len(text) < limit:
        return len(text)
    return text.rfind(" ", start, limit) + 1 or limit


Tag = TypeVar("Tag")


def _batches(items: Iterable[tuple[Tag, str]], chars: int) -> Iterator[list[tuple[Tag, str]]]:
    """Lists of tagged texts with `chars` characters in all, or little more."""
    batch: list[tuple[Tag, str]] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(item[1])
        if size >= chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def until(ids: Sequence[int], end: int) -> list[int]:
    """The ids before the first end id."""
    found = list(ids)
    return found[: found.index(end)] if end in found else found


# Ids ------------------------------------------------------------------------------------------------------------------


class Characters:
    """One id a character of a fixed alphabet, in its order, and the end id."""

    lossless = True
    adds_end = True

    def __init__(self, alphabet: str) -> None:
        self.alphabet = alphabet
        self.end_id = len(alphabet)
        self.size = len(alphabet) + 1
        codes = [ord(character) for character in alphabet]
        # Ids by code point, -1 where there is none; the last place stands for all that lies behind.
        self.table = np.full(max(codes) + 2, -1, np.int64)
        self.table[codes] = np.arange(len(codes))
        self.anything = np.ones(self.size, bool)
        self.beginning = np.arange(self.size) != self.end_id

    def _ids(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
        return self.table[np.minimum(codes, len(self.table) - 1)]

    def check(self, text: str, before: int) -> None:
        """Raises Rejected where the text, `before` bytes into its file, has a character outside the alphabet."""
        unknown = self._ids(text) < 0
        if unknown.any():
            place = int(unknown.argmax())
            offset = before + len(text[:place].encode())
            raise Rejected(f"has the character {text[place]!r} at byte {offset}, which is not in tokenizer.alphabet")

    def encode(self, texts: list[str], threads: int) -> list[np.ndarray]:
        """Ids of each text, int64."""
        del threads
        ids = [self._ids(text) for text in texts]
        assert all((found >= 0).all() for found in ids), "the survey checks the alphabet"
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The characters of the ids."""
        return "".join(self.alphabet[i] for i in ids)

    def spelling(self, token: int) -> str | None:
        """The character of an id."""
        return self.alphabet[token]

    def shown(self, token: int) -> str:
        """The character of an id."""
        return self.alphabet[token]


class Pieces:
    """A SentencePiece model."""

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise CheckFailed(f"the SentencePiece model can't be loaded: {error}") from error
        self.adds_end = self.processor.eos_id() < 0
        self.size = self.processor.vocab_size()
        self.end_id = self.size if self.adds_end else self.processor.eos_id()
        self.escaped = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self.lossless = self._lossless()
        width = self.size + self.adds_end
        control = [self.processor.is_control(i) or self.processor.is_unknown(i) for i in range(self.size)]
        self.anything = np.array([*(not c for c in control), True][:width])
        self.anything[self.end_id] = True
        self.beginning = self.anything & (np.arange(width) != self.end_id)

    def _lossless(self) -> bool:
        """Whether the model has what keeps text whole: bytes for the unknown, no change of spaces or characters."""
        probe = "  two \t spaces\n\u212b\ufb01\u4e00"
        (ids,) = self.encode([probe], 1)
        return all(self.processor.is_byte(i) for i in self.escaped) and self.decode(ids.tolist()) == probe

    def encode(self, texts: list[str], threads: int) -> list[np.ndarray]:
        """Ids of each text, int32; U+2581 as bytes."""
        split = [text.split(SPACE) for text in texts]
        parts = [part for parts in split for part in parts]
        ids = iter(self.processor.encode_as_numpy(parts, num_threads=threads))
        return [self._joined([next(ids) for _ in parts]) for parts in split]

    def _joined(self, parts: list[np.ndarray]) -> np.ndarray:
        """The ids of a text from those between its U+2581."""
        if len(parts) == 1:
            return parts[0]
        between = np.array(self.escaped, np.int32)
        return np.concatenate([parts[0], *(ids for part in parts[1:] for ids in (between, part))])

    def spelling(self, token: int) -> str | None:
        """The text of an id, its space included; None where it is a byte or no text."""
        if self.processor.is_byte(token) or self.processor.is_control(token) or self.processor.is_unknown(token):
            return None
        return str(self.processor.id_to_piece(token)).replace(SPACE, " ")

    def shown(self, token: int) -> str:
        """The text of an id, or its name."""
        text = self.spelling(token)
        return str(self.processor.id_to_piece(token)) if text is None else text

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids. Escaped U+2581 comes back as itself, since its bytes are decoded as UTF-8."""
        return str(self.processor.decode([int(i) for i in ids]))


def _read_model(path: Path) -> bytes:
    try:
        model = path.read_bytes()
    except OSError as error:
        raise UsageError(f"tokenizer.model {path} can't be read: {error.strerror}") from error
    try:
        Pieces(model)
    except CheckFailed as error:
        raise UsageError(f"tokenizer.model {path} is no SentencePiece model: {error.message}") from error
    return model


class _TooMany(Exception):
    """The text does not fill the vocabulary."""

    def __init__(self, largest: int) -> None:
        super().__init__(largest)
        self.largest = largest


def _train(lines: Iterator[str], options: TextOptions, vocabulary: int) -> bytes:
    """Train SentencePiece; one thread, since its unigram model differs with their number (measured)."""
    import sentencepiece

    # U+2581 is SentencePiece's own sign for a space; lines are cut where its limit would drop them.
    cleaned = (
        line[start : start + TRAINING_LINE_BYTES // 4].replace(SPACE, "")
        for line in lines
        for start in range(0, len(line), TRAINING_LINE_BYTES // 4)
    )
    model = io.BytesIO()
    train: Callable[..., None] = sentencepiece.SentencePieceTrainer.train
    try:
        train(
            sentence_iterator=cleaned,
            model_writer=model,
            model_type=options.algorithm,
            vocab_size=vocabulary,
            character_coverage=options.character_coverage,
            normalization_rule_name="identity" if options.normalization == "identity" else "nfkc",
            byte_fallback=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            user_defined_symbols=["\n"],
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        largest = re.search(r"value <= (\d+)", str(error))
        if largest and int(largest.group(1)) < vocabulary:
            raise _TooMany(int(largest.group(1))) from error
        raise _training_error(str(error), options) from error
    return model.getvalue()


def _training_error(message: str, options: TextOptions) -> UsageError:
    fewest = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if fewest:
        limit = fewest.group(1)
        return UsageError(
            f"tokenizer.vocabulary {options.vocabulary} is less than the single characters and bytes need ({limit})",
            f"--set tokenizer.vocabulary={limit}, or more",
        )
    return UsageError(f"SentencePiece could not be trained: {message}", "more text, or another tokenizer.vocabulary")
