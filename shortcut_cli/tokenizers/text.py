"""Text: SentencePiece pieces, or one id per character of a fixed alphabet; the natural unit is the byte.

Nothing is lost: with `normalization = "identity"`, decode(encode(x)) == x for any valid UTF-8, but for a byte order
mark at the start of a file, which is dropped. Characters without a piece become their bytes, a newline is a piece of
its own, and U+2581, which SentencePiece reserves for itself, is encoded explicitly as its three bytes.

A document is encoded segment by segment, so that memory stays flat and ids do not depend on how a file is read;
segments of many small documents are passed to SentencePiece together.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from shortcut_cli.config.schema import Config
from shortcut_cli.data.documents import Assign, Chunk, Document, RejectedRecord, Source, check_unchanged
from shortcut_cli.errors import CheckFailed, Rejected, UsageError, in_short
from shortcut_cli.tokenizers.base import (
    NO_LIMIT,
    Classes,
    Constraint,
    Excerpt,
    TextStream,
    Tokenizer,
    Written,
    before_eos,
    shared,
)
from shortcut_cli.tokenizers.text_reading import (
    MAX_SEGMENT_CHARS,
    MIN_SEGMENT_CHARS,
    Cutter,
    Text,
    is_jsonl,
    read_documents,
    segments,
)
from shortcut_cli.tokenizers.text_vocabulary import Characters, Pieces, VocabularyTooLarge, train

FORMAT = 1
IDENTITY = {"algorithm", "alphabet", "documents", "field", "normalization"}  # that a saved tokenizer must match
MOST_BAD_FIRST = 10**6  # records that can't be used before the first that can: a small .gz can hold 10**8, all listed
BATCH_CHARS = 1 << 21  # passed to SentencePiece at once
CHARACTER_CLASSES = ("letter", "digit", "space", "punctuation", "byte or control", "end")


class TextOptions(Config):
    """[tokenizer] of text."""

    name: Literal["text"] = Field(description="the domain")
    algorithm: Literal["unigram", "bpe", "char", "chars"] = Field(
        "unigram", description="of SentencePiece; or chars: one id per character of `alphabet`, no training (text8)"
    )
    vocabulary: int = Field(
        8000, description="maximum pieces, including those for single bytes; not for chars", ge=260, le=10**6
    )
    model: str = Field("", description="an existing SentencePiece .model, instead of training one")
    documents: Literal["file", "line", "paragraph"] = Field(
        "file",
        description="what a document is; blank lines belong to the line or paragraph before them; each record of a "
        ".jsonl is one",
    )
    field: str = Field("text", description="field of a .jsonl record that holds the text; dotted: data.body")
    normalization: Literal["identity", "nfkc"] = Field("identity", description="identity loses nothing")
    character_coverage: float = Field(
        0.9995, description="share of the training characters that get pieces", gt=0, le=1
    )
    sample_mb: int = Field(32, description="maximum text that SentencePiece is trained on, in MB", ge=1, le=10**6)
    alphabet: str = Field(" abcdefghijklmnopqrstuvwxyz", description="the characters of chars", min_length=1)

    @model_validator(mode="after")
    def _check_chars(self) -> "TextOptions":
        if not all(self.field.split(".")):
            raise ValueError(f"field {self.field!r} is not a dotted name")
        if len(set(self.alphabet)) < len(self.alphabet):
            raise ValueError(f"alphabet {self.alphabet!r} contains a character twice")
        if self.algorithm == "chars" and self.model:
            raise ValueError(f"algorithm chars takes no model, but model is {self.model!r}")
        return self


@dataclass(frozen=True, eq=False, slots=True)
class Part:
    """The text of the part of a document that one split gets; `units` is complete once `chunks` is exhausted."""

    document: Document
    split: str
    units: dict[str, float]
    chunks: Iterator[str]


class TextTokenizer(Tokenizer):
    """Text files <-> ids."""

    Options = TextOptions
    unit: ClassVar[str] = "byte"
    suffixes: ClassVar[tuple[str, ...]] = tuple(
        f"{name}{packed}" for packed in ("", ".gz") for name in (".txt", ".md", ".jsonl", ".tokens")
    )
    extension: ClassVar[str] = ".txt"
    is_text: ClassVar[bool] = True

    def __init__(self, options: TextOptions, model: bytes = b"", trained_on: dict[str, int] | None = None) -> None:
        self.options = options
        self.model = model
        self.trained_on = trained_on or {}
        if options.model and not model:
            self.model = _read_model(Path(options.model))

    def __getstate__(self) -> dict[str, Any]:
        # The processor can't be pickled; each process builds its own.
        return {name: value for name, value in self.__dict__.items() if name != "pieces"}

    @cached_property
    def characters(self) -> Characters | None:
        """The alphabet of `chars`; None for SentencePiece."""
        return Characters(self.options.alphabet) if self.options.algorithm == "chars" else None

    @cached_property
    def pieces(self) -> Pieces | Characters:
        """The mapping between text and ids."""
        assert not self.needs_fit, "fit comes before encode"
        return self.characters or Pieces(self.model)

    @property
    def vocabulary(self) -> int:
        """Pieces or characters, and EOS."""
        return self.pieces.eos_id + 1 if self.pieces.adds_eos else self.pieces.size

    @property
    def eos(self) -> int:
        """SentencePiece's </s>, or an id of its own."""
        return self.pieces.eos_id

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
            "segments": [MIN_SEGMENT_CHARS, MAX_SEGMENT_CHARS],
            # Lines had no blank lines behind them once; the other kinds are what they always were.
            "documents": "line with blank lines" if self.options.documents == "line" else self.options.documents,
        }
        if self.options.field != "text":
            parts["field"] = self.options.field
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def description(self) -> dict[str, str | int | float]:
        """Library version, how much text it was trained on, and whether it is lossless."""
        lossless = {} if self.needs_fit else {"lossless": self.pieces.lossless}
        return {"library": self._library, **self.trained_on, **lossless}

    @property
    def _library(self) -> str:
        return "none" if self.options.algorithm == "chars" else f"sentencepiece {version('sentencepiece')}"

    @property
    def depends_on(self) -> dict[str, str | int]:
        """The format, the library's version, and the model that the options name."""
        found: dict[str, str | int] = {"format": FORMAT, "library": self._library}
        return found | ({"model": hashlib.sha256(self.model).hexdigest()} if self.options.model else {})

    def scan(self, source: Source) -> Iterator[Document | RejectedRecord]:
        """Documents with the hash and size of their text, and records of a .jsonl that can't be used.

        An empty record is a document of size 0. Raises Rejected if the file has no text or is not valid UTF-8.
        """
        try:
            for found in self._scanned(source):
                yield found if isinstance(found, RejectedRecord) else found[0]
        except Rejected:
            check_unchanged(source.path, source.sha256)
            raise

    def _scanned(self, source: Source) -> Iterator[tuple[Document, Text] | RejectedRecord]:
        """What `scan` yields, each document with its text, whose chunks are exhausted unless it is a record."""
        offset = empty = bad = 0
        first: RejectedRecord | None = None
        account: dict[str, float] = {}
        for text in self._read(source.path, account):
            if isinstance(text, RejectedRecord):
                first, bad = first or text, bad + 1
                if bad >= MOST_BAD_FIRST and not offset:
                    raise Rejected(f"begins with {bad:,} records that can't be used; line {first.line} {first.reason}")
                yield text
                continue
            document = self._document(text, source.start + offset, {} if offset else account)
            yield document, text
            offset += document.size
            empty += not document.size
        if first and not offset:
            raise Rejected(f"has no record that can be used; line {first.line} {first.reason}")
        if not offset:
            raise Rejected(f"has only empty records ({empty})" if empty and is_jsonl(source.path) else "is empty")

    def _read(self, path: Path, account: dict[str, float] | None = None) -> Iterator[Text | RejectedRecord]:
        check = self.characters.check if self.characters else None
        kind, field = self.options.documents, self.options.field
        return read_documents(path, kind, field=field, check=check, account=account)

    def _document(self, text: Text, offset: int, found: dict[str, float]) -> Document:
        """The document of a text. found: what was left out before it."""
        digest, size = hashlib.sha256(), 0
        account: dict[str, float] = {}
        for chunk in self._observed(text.chunks, account):
            content = chunk.encode()
            digest.update(content)
            size += len(content)
        return Document(digest.hexdigest(), offset, size, {"byte": size}, account | found, text.line)

    def _observed(self, chunks: Iterable[str], account: dict[str, float]) -> Iterator[str]:
        """The chunks, or the segments as they are encoded if the model changes characters, which is then noted."""
        options = self.options
        if options.normalization == "identity" or options.algorithm == "chars" or options.model:
            yield from chunks
            return
        for segment in segments(chunks):
            if not unicodedata.is_normalized("NFKC", segment):
                account["documents_normalized"] = 1
            yield segment

    def fit(self, sources: Sequence[Source], assign: Assign) -> str | None:
        """Train SentencePiece on at most `sample_mb` of lines, spread evenly over the training split.

        If the text is too short for `vocabulary` pieces, the vocabulary is the largest that it fills.
        """
        wanted = self.options.vocabulary
        try:
            self.model = self._trained(sources, assign, wanted)
        except VocabularyTooLarge as error:
            self.model = self._trained(sources, assign, error.largest)
            return f"the training split fills only {error.largest:,} of the {wanted:,} pieces of tokenizer.vocabulary"
        return None

    def _trained(self, sources: Sequence[Source], assign: Assign, vocabulary: int) -> bytes:
        return train(
            self._sample(sources, assign),
            self.options.algorithm,
            vocabulary,
            character_coverage=self.options.character_coverage,
            normalization=self.options.normalization,
        )

    def _sample(self, sources: Sequence[Source], assign: Assign) -> Iterator[str]:
        """Lines of the training split: one is taken whenever the sample has fallen behind its share of the text."""
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
                    for _ in part.chunks:  # to get to the next part
                        pass
            check_unchanged(source.path, source.sha256)

    def encode(self, source: Source, assign: Assign, threads: int) -> Iterator[Chunk]:
        """The ids of every part of every document. Raises Rejected if the file changed since the scan."""
        check_unchanged(source.path, source.sha256)
        size = 0

        def noted(document: Document) -> list[tuple[str, int]]:
            nonlocal size
            parts = assign(document)
            size += 0 if parts else document.size
            return parts

        for part, run in groupby(self._encoded(source, noted, threads), itemgetter(0)):
            yield Chunk(part.document, part.split, part.units, (ids for _, ids in run))
            size += int(part.units["byte"])
        check_unchanged(source.path, source.sha256)
        if size != source.size:  # it has its old bytes again
            raise Rejected("changed while it was being prepared", passing=True)

    def _encoded(self, source: Source, assign: Assign, threads: int) -> Iterator[tuple[Part, np.ndarray]]:
        """Ids in order, each block with its part; a batch that is encoded at once can hold many parts."""
        tagged = ((part, segment) for part in self._parts(source, assign) for segment in segments(part.chunks))
        for batch in _batches(tagged, round(BATCH_CHARS * self.block_scale)):
            ids = self.pieces.encode([segment for _, segment in batch], threads)
            parts = (part for part, _ in batch)
            for part, run in groupby(zip(parts, ids, strict=True), itemgetter(0)):
                yield part, np.concatenate([block for _, block in run])

    def _parts(self, source: Source, assign: Assign) -> Iterator[Part]:
        pairs = (found for found in self._scanned(source) if not isinstance(found, RejectedRecord))
        if not is_jsonl(source.path):  # the hash comes first, then the text is read again
            texts = (text for text in self._read(source.path) if isinstance(text, Text))
            # Not strict: `encode` notices a file that grows meanwhile by its size.
            pairs = ((document, text) for (document, _), text in zip(pairs, texts, strict=False))
        for document, text in pairs:
            cutter = Cutter(iter(text.chunks))
            for split, size in assign(document):
                units: dict[str, float] = {"byte": 0, "character": 0, "word": 0}
                yield Part(document, split, units, cutter.take(size, units))

    def prompt(self, path: Path, limit: Mapping[str, float] = NO_LIMIT) -> np.ndarray:
        """The ids of one file, taken as a single document; the records of a .jsonl are joined.

        Raises Rejected if the file, or one of its records, can't be used.
        """
        del limit
        ids = self.pieces.encode(list(segments(self._prompt_chunks(path))), 1)
        return np.concatenate([np.zeros(0, np.int64), *ids])

    def _prompt_chunks(self, path: Path) -> Iterator[str]:
        check = self.characters.check if self.characters else None
        for text in read_documents(path, "file", field=self.options.field, check=check):
            if isinstance(text, RejectedRecord):
                raise Rejected(f"line {text.line} {text.reason}")
            yield from text.chunks

    def decode(self, ids: Sequence[int], path: Path) -> dict[str, float]:
        """Write the text; byte pieces that do not form valid UTF-8 become U+FFFD."""
        content = self.pieces.decode(before_eos(ids, self.eos)).encode()
        files.write(path, content)
        return {"byte": len(content)}

    def decode_after(
        self, ids: Sequence[int], path: Path, count: int, *, recorded: Path | None = None, only_new: bool = False
    ) -> Written:
        """The new part begins at the first character that is not the prompt's alone.

        It can be one whose first bytes the prompt ends with.
        """
        del recorded
        whole = self.pieces.decode(before_eos(ids, self.eos))
        old = self.pieces.decode(list(ids[:count]))
        place = shared(old, whole)
        before: dict[str, float] = {"byte": len(whole[:place].encode()), "character": place}
        nothing: dict[str, float] = dict.fromkeys(before, 0)
        content = (whole[place:] if only_new else whole).encode()
        files.write(path, content)
        return Written({"byte": len(content)}, *((nothing, before) if only_new else (before, nothing)))

    def stream(self) -> TextStream:
        """The text of ids, bit by bit."""
        return self.pieces.stream()

    def classes(self, ids: np.ndarray) -> dict[str, Classes]:
        """By the first character of a piece, not counting leading spaces."""
        return {"character": Classes([*CHARACTER_CLASSES], self._classes[ids])}

    @cached_property
    def _classes(self) -> np.ndarray:
        return np.array([CHARACTER_CLASSES.index(self._class(i)) for i in range(self.vocabulary)])

    def _class(self, token: int) -> str:
        if token == self.eos:
            return "end"
        text = self.pieces.spelling(token)
        if text is None:
            return "byte or control"
        first = text.lstrip(" ")[:1]
        if not first or first.isspace():
            return "space"
        return "letter" if first.isalpha() else "digit" if first.isdigit() else "punctuation"

    def excerpt(self, ids: np.ndarray) -> Excerpt:
        """The text of each piece; byte pieces are shown by name, as <0xE2>."""
        return Excerpt(texts=["<end>" if i == self.eos else self.pieces.shown(int(i)) for i in ids])

    def constraint(self) -> Constraint:
        """No control pieces, and no EOS at the start."""
        return TextConstraint(self.pieces.beginning, self.pieces.anything)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and, unless the algorithm is chars, the SentencePiece model."""
        identity = self.options.model_dump(include=IDENTITY)
        content = {"format": FORMAT, "options": identity, "trained_on": self.trained_on}
        files.write(folder / "tokenizer.json", json.dumps(content, indent=1, sort_keys=True) + "\n")
        if self.options.algorithm != "chars":
            files.write(folder / "sentencepiece.model", self.model)

    @classmethod
    def load(cls, options: Config, folder: Path) -> "TextTokenizer":
        """Raises CheckFailed if the files are not a text tokenizer's or do not match the options."""
        assert isinstance(options, TextOptions), options
        try:
            content = json.loads(files.content(folder / "tokenizer.json"))
            trained_on, identity = content["trained_on"], {"field": "text"} | content["options"]
            model = b"" if options.algorithm == "chars" else files.content(folder / "sentencepiece.model")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckFailed(f"{folder} does not hold a text tokenizer: {in_short(error)}") from error
        if identity != options.model_dump(include=IDENTITY):
            raise CheckFailed(f"{folder} holds a text tokenizer of another configuration than the recipe's")
        if options.algorithm != "chars":
            Pieces(model)
        return cls(options, model, trained_on)


class TextConstraint(Constraint):
    """Only pieces that are text, and at least one of them before EOS."""

    def __init__(self, beginning: np.ndarray, anything: np.ndarray) -> None:
        self.beginning, self.anything = beginning, anything  # bool (V,): for the first id, and for all others
        self.needed = 1

    def allowed(self, left: int) -> np.ndarray:
        """Text, and EOS unless the sample is empty."""
        del left
        return self.beginning if self.needed else self.anything

    def push(self, token: int) -> None:
        """Advance by one id."""
        del token
        self.needed = 0


Tag = TypeVar("Tag")


def _batches(items: Iterable[tuple[Tag, str]], chars: int) -> Iterator[list[tuple[Tag, str]]]:
    """Lists of tagged texts of just over `chars` characters each, except for the last."""
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


def _read_model(path: Path) -> bytes:
    try:
        with files.regular(path) as stream:
            model = stream.read()
    except OSError as error:
        raise UsageError(f"tokenizer.model {path} can't be read: {error.strerror}") from error
    try:
        Pieces(model)
    except CheckFailed as error:
        raise UsageError(f"tokenizer.model {path} is not a SentencePiece model: {error.message}") from error
    return model
