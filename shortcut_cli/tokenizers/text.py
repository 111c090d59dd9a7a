"""Text: SentencePiece pieces, or one id a character from a fixed alphabet; the natural unit is the byte.

Nothing is lost: with `normalization = "identity"` decode(encode(x)) == x for any valid UTF-8. Characters that are no
piece become their bytes, a newline is a piece of its own, and the one character that SentencePiece uses for itself,
U+2581, is encoded as its three bytes by hand.

A document is encoded segment by segment, so that memory stays flat and ids do not depend on how a file is read.
"""

import codecs
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from shortcut_cli import files
from shortcut_cli.errors import CheckFailed, Rejected, ShortcutError, UsageError
from shortcut_cli.recipe import Keys
from shortcut_cli.tokenizers.base import Assign, Document, Piece, Source, Tokenizer

FORMAT = 1
BLOCK_BYTES = 1 << 20
SEGMENT_CHARS = 1000  # a segment ends with the first newline from here on
LONGEST_CHARS = 4096  # or is cut here, after the last space in it
BATCH_SEGMENTS = 2048
SPACE = "\u2581"
TRAINING_LINE_BYTES = 4096  # SentencePiece leaves out longer lines (its max_sentence_length is 4192)


class TextOptions(Keys):
    """[tokenizer] of text."""

    name: Literal["text"] = Field(description="the domain")
    algorithm: Literal["unigram", "bpe", "char", "chars"] = Field(
        "unigram", description="of SentencePiece; or chars: one id a character of `alphabet`, no training (text8)"
    )
    vocabulary: int = Field(8000, description="pieces, those for single bytes included; not for chars", ge=260)
    model: str = Field("", description="an existing SentencePiece .model, instead of training one")
    documents: Literal["file", "line", "paragraph"] = Field(
        "file", description="what a document is; paragraphs end with blank lines; each record of a .jsonl is one"
    )
    normalization: Literal["identity", "nfkc"] = Field("identity", description="identity loses nothing")
    character_coverage: float = Field(
        0.9995, description="share of the training characters that get pieces", gt=0, le=1
    )
    sample_mb: int = Field(64, description="text that SentencePiece is trained on, at most, in MB", ge=1)
    alphabet: str = Field(" abcdefghijklmnopqrstuvwxyz", description="the characters of chars", min_length=1)


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
        if options.algorithm != "chars" and options.model and not model:
            self.model = _read_model(Path(options.model))

    def __getstate__(self) -> dict[str, Any]:
        # The processor is rebuilt where it is used; it can't cross a process boundary.
        return {name: value for name, value in self.__dict__.items() if name != "pieces"}

    @cached_property
    def pieces(self) -> "Pieces | Characters":
        """The mapping between text and ids."""
        if self.options.algorithm == "chars":
            return Characters(self.options.alphabet)
        assert self.model, "fit comes before encode"
        return Pieces(self.model)

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
        chars = self.options.algorithm == "chars"
        check = Characters(self.options.alphabet).check if chars else None
        for chunks in read_documents(source.path, source.relative, self.options.documents):
            digest, size = hashlib.sha256(), 0
            for chunk in chunks:
                if check:
                    check(chunk, offset + size)
                content = chunk.encode()
                digest.update(content)
                size += len(content)
            yield Document(digest.hexdigest(), source.start + offset, size, {"byte": size})
            offset += size
        if not offset:
            raise Rejected("is empty")

    def fit(self, sources: Sequence[Source], assign: Assign) -> None:
        """Train SentencePiece on lines of the training split, spread evenly over it, `sample_mb` at most."""
        available = sum(size for d in self._documents(sources) for split, size in assign(d) if split == "train")
        budget = self.options.sample_mb * 1_000_000
        self.trained_on = {"trained_on_bytes": 0, "training_split_bytes": available}

        def lines() -> Iterator[str]:
            seen = used = 0
            for line in self._training_lines(sources, assign):
                seen += len(line.encode())
                # Take a line whenever the share taken so far is behind.
                if used * max(available, budget) <= seen * budget and used < budget:
                    used += len(line.encode())
                    yield line
            self.trained_on["trained_on_bytes"] = used

        self.model = _train(lines(), self.options)

    def _documents(self, sources: Sequence[Source]) -> Iterator[Document]:
        for source in sources:
            yield from self.survey(source)

    def _training_lines(self, sources: Sequence[Source], assign: Assign) -> Iterator[str]:
        for source in sources:
            for piece, chunks in self._pieces(source, assign):
                if piece.split == "train":
                    for segment in segments(chunks):
                        yield from (line for line in segment.split("\n") if line)
                else:
                    _exhaust(chunks)

    def encode(self, source: Source, assign: Assign, threads: int) -> Iterator[Piece]:
        """Pieces with their ids; raises ShortcutError where the file changed since the survey."""
        size = 0
        for piece, chunks in self._pieces(source, assign):
            yield Piece(piece.document, piece.split, piece.units, self.pieces.encode(segments(chunks), threads))
            size += int(piece.units["byte"])
        if size != source.size:
            raise ShortcutError(f"{source.path} changed while it was being prepared", "run the same command again")

    def _pieces(self, source: Source, assign: Assign) -> Iterator[tuple[Piece, Iterator[str]]]:
        """Each piece with its text; its units are complete when the text is exhausted."""
        texts = read_documents(source.path, source.relative, self.options.documents)
        for document, chunks in zip(self.survey(source), texts, strict=True):
            cutter = Cutter(chunks)
            parts = assign(document)
            for number, (split, size) in enumerate(parts):
                units: dict[str, float] = {"byte": 0}
                last = number == len(parts) - 1
                yield Piece(document, split, units, iter(())), cutter.take(None if last else size, units)

    def prompt(self, path: Path) -> np.ndarray:
        """The ids of one file."""
        whole = TextOptions.model_copy(self.options, update={"documents": "file"})
        source = Source(path, path.name, "", path)
        found = [
            ids
            for chunks in read_documents(path, source.relative, whole.documents)
            for ids in self.pieces.encode(segments(chunks), 1)
        ]
        return np.concatenate(found).astype(np.int64) if found else np.zeros(0, np.int64)

    def decode(self, ids: Sequence[int], path: Path) -> dict[str, float]:
        """Write the text; byte pieces that are no UTF-8 together become U+FFFD."""
        content = self.pieces.decode(until(ids, self.end)).encode()
        files.write(path, content)
        return {"byte": len(content)}

    def allowed(self, ids: Sequence[int]) -> np.ndarray | None:
        """No control pieces, and no end before anything is there."""
        return self.pieces.anything if len(ids) else self.pieces.beginning

    def save(self, folder: Path) -> None:
        """tokenizer.json, and the SentencePiece model where there is one."""
        content = {"format": FORMAT, "options": self.options.model_dump(), "trained_on": self.trained_on}
        files.write(folder / "tokenizer.json", json.dumps(content, indent=1, sort_keys=True) + "\n")
        if self.options.algorithm != "chars":
            files.write(folder / "sentencepiece.model", self.model)

    @classmethod
    def load(cls, options: Keys, folder: Path) -> "TextTokenizer":
        """Raises CheckFailed where the files are not a text tokenizer's."""
        assert isinstance(options, TextOptions), options
        try:
            content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            trained_on = content["trained_on"]
            model = b"" if options.algorithm == "chars" else (folder / "sentencepiece.model").read_bytes()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckFailed(f"{folder} does not hold a text tokenizer: {error!r}") from error
        loaded = cls(options, model, trained_on)
        if model:
            _ = loaded.pieces
        return loaded


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


def read_lines(path: Path) -> Iterator[str]:
    """Lines with their newlines; only "\\n" ends a line."""
    rest = ""
    for block in read_blocks(path):
        lines = (rest + block).split("\n")
        rest = lines.pop()
        yield from (line + "\n" for line in lines)
    if rest:
        yield rest


def read_documents(path: Path, name: str, kind: str) -> Iterator[Iterator[str]]:
    """The documents of a file, each as an iterator of chunks that is to be exhausted before the next; none is empty."""
    if name.lower().removesuffix(".gz").endswith(".jsonl"):
        return (iter([text]) for text in _records(path))
    if kind == "line":
        return (iter([line]) for line in read_lines(path))
    if kind == "paragraph":
        return (iter(lines) for lines in _paragraphs(path))
    return iter([read_blocks(path)])


def _paragraphs(path: Path) -> Iterator[list[str]]:
    """Lines up to and including the blank ones that follow them."""
    lines: list[str] = []
    for line in read_lines(path):
        if lines and not lines[-1].strip() and line.strip():
            yield lines
            lines = []
        lines.append(line)
    if lines:
        yield lines


def _records(path: Path) -> Iterator[str]:
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            text = record["text"]
            text.encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Rejected(f"line {number} is no JSON object with a text in `text`: {error!r}") from error
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

    def take(self, size: int | None, units: dict[str, float]) -> Iterator[str]:
        """The next `size` bytes, or all; units["byte"] counts what was taken."""
        while size is None or size > units["byte"]:
            content = self.rest or next((chunk for chunk in self.chunks if chunk), "").encode()
            if not content:
                return
            cut = len(content) if size is None else min(len(content), size - int(units["byte"]))
            while cut < len(content) and content[cut] & 0xC0 == 0x80:
                cut += 1
            taken, self.rest = content[:cut], content[cut:]
            units["byte"] += len(taken)
            yield taken.decode()


NEWLINE = re.compile("\n")


def segments(chunks: Iterable[str]) -> Iterator[str]:
    """Cut a stream of text where a segment ends; depends on the text alone, not on the chunks it comes in."""
    rest = ""
    for chunk in chunks:
        rest += chunk
        start = 0
        while len(rest) - start >= LONGEST_CHARS:
            end = _segment_end(rest, start)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    while rest:
        end = _segment_end(rest, 0)
        yield rest[:end]
        rest = rest[end:]


def _segment_end(text: str, start: int) -> int:
    """End of the segment that begins at `start` of a text that goes on for LONGEST_CHARS, or ends before."""
    limit = start + LONGEST_CHARS
    newline = NEWLINE.search(text, min(start + SEGMENT_CHARS, limit), limit)
    if newline:
        return newline.end()
    if len(text) < limit:
        return len(text)
    return text.rfind(" ", start, limit) + 1 or limit


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
        if len(set(alphabet)) != len(alphabet):
            raise UsageError(f"tokenizer.alphabet {alphabet!r} names a character twice")
        self.codes = np.array(sorted(map(ord, alphabet)), np.uint32)
        self.ids = np.array([alphabet.index(chr(code)) for code in self.codes], np.int64)
        self.anything = np.ones(self.size, bool)
        self.beginning = np.arange(self.size) != self.end_id

    def _find(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        places = np.searchsorted(self.codes, codes).clip(max=len(self.codes) - 1)
        return places, self.codes[places] == codes

    def check(self, text: str, before: int) -> None:
        """Raises Rejected where the text, `before` bytes into its file, has a character outside the alphabet."""
        _, known = self._find(text)
        if not known.all():
            place = int(known.argmin())
            offset = before + len(text[:place].encode())
            raise Rejected(f"has the character {text[place]!r} at byte {offset}, which is not in tokenizer.alphabet")

    def encode(self, texts: Iterable[str], threads: int) -> Iterator[np.ndarray]:
        """Ids of each text, int64."""
        del threads
        for text in texts:
            places, known = self._find(text)
            assert known.all(), "the survey checks the alphabet"
            yield self.ids[places]

    def decode(self, ids: Sequence[int]) -> str:
        """The characters of the ids."""
        return "".join(self.alphabet[i] for i in ids)


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
        return all(self.processor.is_byte(i) for i in self.escaped) and self.decode(self._one(probe).tolist()) == probe

    def _one(self, text: str) -> np.ndarray:
        """The ids of a text, with U+2581 as bytes."""
        parts = [np.array(self.processor.encode(part), np.int64) for part in text.split(SPACE)]
        between = np.array(self.escaped, np.int64)
        joined = [parts[0]]
        for part in parts[1:]:
            joined += [between, part]
        return np.concatenate(joined)

    def encode(self, texts: Iterable[str], threads: int) -> Iterator[np.ndarray]:
        """Ids of all texts in batches, integers."""
        batch: list[str] = []
        for text in texts:
            batch.append(text)
            if len(batch) == BATCH_SEGMENTS:
                yield self._batch(batch, threads)
                batch = []
        if batch:
            yield self._batch(batch, threads)

    def _batch(self, texts: list[str], threads: int) -> np.ndarray:
        if any(SPACE in text for text in texts):
            return np.concatenate([self._one(text) for text in texts])
        return np.concatenate(self.processor.encode_as_numpy(texts, num_threads=threads))

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


def _train(lines: Iterator[str], options: TextOptions) -> bytes:
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
            vocab_size=options.vocabulary,
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
        raise _training_error(str(error), options) from error
    return model.getvalue()


def _training_error(message: str, options: TextOptions) -> UsageError:
    largest = re.search(r"value <= (\d+)", message)
    if largest:
        limit = largest.group(1)
        return UsageError(
            f"tokenizer.vocabulary {options.vocabulary} is more than the training split can fill (at most {limit})",
            f"--set tokenizer.vocabulary={limit}",
        )
    fewest = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if fewest:
        limit = fewest.group(1)
        return UsageError(
            f"tokenizer.vocabulary {options.vocabulary} is less than the single characters and bytes need ({limit})",
            f"--set tokenizer.vocabulary={limit}, or more",
        )
    return UsageError(f"SentencePiece could not be trained: {message}", "more text, or another tokenizer.vocabulary")
