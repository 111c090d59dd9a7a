"""Text: SentencePiece pieces, or one id per character of a fixed alphabet; the natural unit is the byte.

Nothing is lost: with `normalization = "identity"`, decode(encode(x)) == x for any valid UTF-8. Characters without a
piece become their bytes, a newline is a piece of its own, and U+2581, which SentencePiece reserves for itself, is
encoded explicitly as its three bytes.

A document is encoded segment by segment, so that memory stays flat and ids do not depend on how a file is read;
segments of many small documents are passed to SentencePiece together.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
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
from shortcut_cli.data.documents import Assign, Chunk, Document, Source
from shortcut_cli.errors import CheckFailed, Rejected, ShortcutError, UsageError
from shortcut_cli.tokenizers.base import Classes, Constraint, Excerpt, Tokenizer, before_eos
from shortcut_cli.tokenizers.text_reading import (
    MAX_SEGMENT_CHARS,
    MIN_SEGMENT_CHARS,
    Cutter,
    read_documents,
    segments,
)
from shortcut_cli.tokenizers.text_vocabulary import Characters, Pieces, VocabularyTooLarge, train

FORMAT = 1
IDENTITY = {"algorithm", "alphabet", "documents", "normalization"}  # options that a saved tokenizer must match
BATCH_CHARS = 1 << 21  # passed to SentencePiece at once
CHARACTER_CLASSES = ("letter", "digit", "space", "punctuation", "byte or control", "end")


class TextOptions(Config):
    """[tokenizer] of text."""

    name: Literal["text"] = Field(description="the domain")
    algorithm: Literal["unigram", "bpe", "char", "chars"] = Field(
        "unigram", description="of SentencePiece; or chars: one id per character of `alphabet`, no training (text8)"
    )
    vocabulary: int = Field(8000, description="maximum pieces, including those for single bytes; not for chars", ge=260)
    model: str = Field("", description="an existing SentencePiece .model, instead of training one")
    documents: Literal["file", "line", "paragraph"] = Field(
        "file", description="what a document is; paragraphs end with blank lines; each record of a .jsonl is one"
    )
    normalization: Literal["identity", "nfkc"] = Field("identity", description="identity loses nothing")
    character_coverage: float = Field(
        0.9995, description="share of the training characters that get pieces", gt=0, le=1
    )
    sample_mb: int = Field(32, description="maximum text that SentencePiece is trained on, in MB", ge=1)
    alphabet: str = Field(" abcdefghijklmnopqrstuvwxyz", description="the characters of chars", min_length=1)

    @model_validator(mode="after")
    def _check_chars(self) -> "TextOptions":
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
    suffixes: ClassVar[tuple[str, ...]] = (".txt", ".md", ".jsonl", ".txt.gz", ".md.gz", ".jsonl.gz")
    extension: ClassVar[str] = ".txt"

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
            "documents": self.options.documents,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def description(self) -> dict[str, str | int | float]:
        """Library version, how much text it was trained on, and whether it is lossless."""
        if self.options.algorithm == "chars":
            return {"library": "none", "lossless": True}
        lossless = {} if self.needs_fit else {"lossless": self.pieces.lossless}
        return {"library": f"sentencepiece {version('sentencepiece')}", **self.trained_on, **lossless}

    def scan(self, source: Source) -> Iterator[Document]:
        """Documents with the hash and size of their text. Raises Rejected if it is empty or not valid UTF-8."""
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
        """The chunks, which begin `offset` bytes into their file. Raises Rejected at a character without an id."""
        for chunk in chunks:
            if self.characters:
                self.characters.check(chunk, offset)
                offset += len(chunk.encode())
            yield chunk

    def fit(self, sources: Sequence[Source], assign: Assign) -> str | None:
        """Train SentencePiece on at most `sample_mb` of lines, spread evenly over the training split.

        If the text is too short for `vocabulary` pieces, the vocabulary is the largest that it fills.
        """
        wanted = self.options.vocabulary
        try:
            self.model = self._trained(sources, assign, wanted)
        except VocabularyTooLarge as error:
            self.model = self._trained(sources, assign, error.largest)
            return f"the training split fills only {error.largest} of the {wanted} pieces of tokenizer.vocabulary"
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

    def encode(self, source: Source, assign: Assign, threads: int) -> Iterator[Chunk]:
        """The ids of every part of every document. Raises ShortcutError if the file changed since the scan."""
        changed = ShortcutError(f"{source.path} changed while it was being prepared", "run the same command again")
        if files.sha256(source.path) != source.sha256:
            raise changed
        size = 0
        for part, run in groupby(self._encoded(source, assign, threads), itemgetter(0)):
            yield Chunk(part.document, part.split, part.units, (ids for _, ids in run))
            size += int(part.units["byte"])
        if size != source.size:
            raise changed

    def _encoded(self, source: Source, assign: Assign, threads: int) -> Iterator[tuple[Part, np.ndarray]]:
        """Ids in order, each block with its part; a batch that is encoded at once can hold many parts."""
        tagged = ((part, segment) for part in self._parts(source, assign) for segment in segments(part.chunks))
        for batch in _batches(tagged, round(BATCH_CHARS * self.block_scale)):
            ids = self.pieces.encode([segment for _, segment in batch], threads)
            parts = (part for part, _ in batch)
            for part, run in groupby(zip(parts, ids, strict=True), itemgetter(0)):
                yield part, np.concatenate([block for _, block in run])

    def _parts(self, source: Source, assign: Assign) -> Iterator[Part]:
        texts = read_documents(source.path, self.options.documents)
        # Not strict: `encode` notices a file that grows meanwhile by its size.
        for document, chunks in zip(self.scan(source), texts, strict=False):
            cutter = Cutter(chunks)
            for split, size in assign(document):
                units: dict[str, float] = {"byte": 0}
                yield Part(document, split, units, cutter.take(size, units))

    def prompt(self, path: Path) -> np.ndarray:
        """The ids of one file, taken as a single document."""
        chunks = (chunk for document in read_documents(path, "file") for chunk in document)
        ids = self.pieces.encode(list(segments(self._checked(chunks, 0))), 1)
        return np.concatenate([np.zeros(0, np.int64), *ids])

    def decode(self, ids: Sequence[int], path: Path) -> dict[str, float]:
        """Write the text; byte pieces that do not form valid UTF-8 become U+FFFD."""
        content = self.pieces.decode(before_eos(ids, self.eos)).encode()
        files.write(path, content)
        return {"byte": len(content)}

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
        model = path.read_bytes()
    except OSError as error:
        raise UsageError(f"tokenizer.model {path} can't be read: {error.strerror}") from error
    try:
        Pieces(model)
    except CheckFailed as error:
        raise UsageError(f"tokenizer.model {path} is not a SentencePiece model: {error.message}") from error
    return model
