"""Text <-> ids: a SentencePiece model, which can be trained here, or a fixed alphabet with one id per character."""

import codecs
import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from shortcut_cli.errors import CheckFailed, Rejected, UsageError
from shortcut_cli.tokenizers.base import TextStream

SPACE = "\u2581"  # SentencePiece's own sign for a space
LONGEST_PENDING = 3  # bytes of a character of UTF-8 whose last one is still to come
TRAINING_LINE_BYTES = 4096  # SentencePiece drops longer lines (its max_sentence_length is 4192)


class Characters:
    """One id per character of a fixed alphabet, in its order, and EOS."""

    lossless = True
    adds_eos = True

    def __init__(self, alphabet: str) -> None:
        self.alphabet = alphabet
        self.eos_id = len(alphabet)
        self.size = len(alphabet) + 1
        codes = [ord(character) for character in alphabet]
        # Ids by code point, -1 if there is none; the last entry stands for all higher code points.
        self.table = np.full(max(codes) + 2, -1, np.int64)
        self.table[codes] = np.arange(len(codes))
        self.anything = np.ones(self.size, bool)
        self.beginning = np.arange(self.size) != self.eos_id

    def _ids(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
        found: np.ndarray = self.table[np.minimum(codes, len(self.table) - 1)]
        return found

    def check(self, text: str, before: int) -> None:
        """Raises Rejected if the text, which starts `before` bytes into its file, has a character without an id."""
        unknown = self._ids(text) < 0
        if unknown.any():
            place = int(unknown.argmax())
            offset = before + len(text[:place].encode())
            raise Rejected(f"has the character {text[place]!r} at byte {offset}, which is not in tokenizer.alphabet")

    def encode(self, texts: list[str], threads: int) -> list[np.ndarray]:
        """Ids of each text, int64."""
        del threads
        ids = [self._ids(text) for text in texts]
        assert all((found >= 0).all() for found in ids), "the scan checks the alphabet"
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The characters of the ids."""
        return "".join(self.alphabet[i] for i in ids)

    def stream(self) -> TextStream:
        """The characters of ids, one by one."""
        return _CharacterStream(self)

    def spelling(self, token: int) -> str | None:
        """The character of an id."""
        return self.alphabet[token]

    def shown(self, token: int) -> str:
        """The character of an id."""
        return self.alphabet[token]


class Pieces:
    """A SentencePiece model. Raises CheckFailed if its bytes are not one."""

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise CheckFailed(f"the SentencePiece model can't be loaded: {error}") from error
        self.adds_eos = self.processor.eos_id() < 0
        self.size = self.processor.vocab_size()
        self.eos_id = self.size if self.adds_eos else self.processor.eos_id()
        self.escaped = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self.lossless = self._lossless()
        width = self.size + self.adds_eos
        control = [self.processor.is_control(i) or self.processor.is_unknown(i) for i in range(self.size)]
        self.anything = np.array([*(not c for c in control), True][:width])
        self.anything[self.eos_id] = True
        self.beginning = self.anything & (np.arange(width) != self.eos_id)

    def _lossless(self) -> bool:
        """Whether the model preserves any text: it has byte pieces and leaves spaces and characters unchanged."""
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
        """The ids of a text from those of its parts between U+2581."""
        if len(parts) == 1:
            return parts[0]
        between = np.array(self.escaped, np.int32)
        return np.concatenate([parts[0], *(ids for part in parts[1:] for ids in (between, part))])

    def spelling(self, token: int) -> str | None:
        """The text of an id, spaces included; None if it is a byte or no text."""
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

    def stream(self) -> TextStream:
        """The text of ids, bit by bit."""
        return _PieceStream(self)

    def byte(self, token: int) -> int | None:
        """The byte that an id stands for; None if it is no byte piece."""
        return int(str(self.processor.id_to_piece(token))[1:-1], 16) if self.processor.is_byte(token) else None


class _CharacterStream(TextStream):
    """Every id is a character."""

    def __init__(self, characters: Characters) -> None:
        self.characters = characters

    def push(self, token: int) -> str:
        """The character."""
        return self.characters.decode([token])


class _PieceStream(TextStream):
    """SentencePiece's own decoding of the last few ids, of which the text of the first ones is known already.

    Byte pieces wait until they make a character, or can't any more. The first ids stay in the window as long as
    decoding depends on them: a model can drop the space before the first word.
    """

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces
        self.window: list[int] = []
        self.shown = 0  # characters of the window's text that were given out

    def push(self, token: int) -> str:
        """The text that is certain by now, and was not before."""
        self.window.append(token)
        certain = self.window[: len(self.window) - self._pending()]
        found = self._next(certain)
        if found and len(certain) == len(self.window):
            self._shorten()
        return found

    def end(self) -> str:
        """What is left of a character that did not become whole."""
        return self._next(self.window)

    def _next(self, ids: list[int]) -> str:
        text = self.pieces.decode(ids)
        found, self.shown = text[self.shown :], max(self.shown, len(text))
        return found

    def _pending(self) -> int:
        """How many of the last ids are bytes that begin a character which the next byte may complete."""
        tail: list[int] = []
        for token in reversed(self.window[-LONGEST_PENDING:]):
            byte = self.pieces.byte(token)
            if byte is None:
                break
            tail.insert(0, byte)
        return next((size for size in range(len(tail), 0, -1) if _begins_character(bytes(tail[-size:]))), 0)

    def _shorten(self) -> None:
        """Keep only the last id, or the bytes of the last character."""
        for count in range(1, LONGEST_PENDING + 2):
            last = self.pieces.decode(self.window[-count:])
            if last and "\ufffd" not in last:
                self.window, self.shown = self.window[-count:], len(last)
                return


def _begins_character(content: bytes) -> bool:
    """Whether bytes are the first ones of a character of UTF-8, and not all of it."""
    try:
        decoder = codecs.getincrementaldecoder("utf-8")()
        return not decoder.decode(content) and len(decoder.getstate()[0]) == len(content)
    except UnicodeDecodeError:
        return False


class VocabularyTooLarge(Exception):
    """The text does not fill the vocabulary; `largest` is the largest that it does fill."""

    def __init__(self, largest: int) -> None:
        super().__init__(largest)
        self.largest = largest


def train(
    lines: Iterator[str], algorithm: str, vocabulary: int, *, character_coverage: float, normalization: str
) -> bytes:
    """Train SentencePiece and return the model. On one thread: its unigram model varies with the number of threads.

    Raises VocabularyTooLarge if the text is too short for the vocabulary, Rejected as `lines` does, UsageError if
    training fails otherwise.
    """
    import sentencepiece

    rejected: list[Rejected] = []  # SentencePiece would replace it with a RuntimeError

    def remembered() -> Iterator[str]:
        try:
            yield from lines
        except Rejected as reason:
            rejected.append(reason)
            raise

    # Lines are cut where SentencePiece would drop them.
    cleaned = (
        line[start : start + TRAINING_LINE_BYTES // 4].replace(SPACE, "")
        for line in remembered()
        for start in range(0, len(line), TRAINING_LINE_BYTES // 4)
    )
    model = io.BytesIO()
    trainer: Callable[..., Any] = sentencepiece.SentencePieceTrainer.train
    try:
        trainer(
            sentence_iterator=cleaned,
            model_writer=model,
            model_type=algorithm,
            vocab_size=vocabulary,
            character_coverage=character_coverage,
            normalization_rule_name=normalization,
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
        if rejected:
            raise rejected[0] from error
        largest = re.search(r"value <= (\d+)", str(error))
        if largest and int(largest.group(1)) < vocabulary:
            raise VocabularyTooLarge(int(largest.group(1))) from error
        raise _training_error(str(error), vocabulary) from error
    return model.getvalue()


def _training_error(message: str, vocabulary: int) -> UsageError:
    fewest = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if fewest:
        limit = fewest.group(1)
        return UsageError(
            f"tokenizer.vocabulary {vocabulary} is smaller than the number of single characters and bytes ({limit})",
            f"--set tokenizer.vocabulary={limit}, or more",
        )
    return UsageError(f"SentencePiece training failed: {message}", "give more text, or another tokenizer.vocabulary")
