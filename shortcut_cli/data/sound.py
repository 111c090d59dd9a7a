"""Reading sound files to their real end: any rate, width and number of channels that libsndfile supports, in blocks.

A decoder's end is not always the file's end, so every file is also counted independently of it, by its frames, pages
or bytes (`sound_wav`, `sound_flac`, `sound_ogg`, `sound_mpeg`). One policy holds for all formats:

- Where a header says less than is there, or nothing (data of size 0 or 0xFFFFFFFF in WAV, no samples in FLAC, a missing
  or false Xing header in MP3, a second link in Ogg), everything that is there is read.
- Where a file has more than TOLERANCE_S less than it says of itself, it is truncated; also where it does not say how
  long it is, and ends in the middle of a frame or page, or (Ogg) without the mark of its end. Where parts are missing
  in its middle, or more than TOLERANCE_S can't be decoded, it is damaged. Where libsndfile decodes more
  than is there by the header, it contradicts itself. All are rejected, or, with damaged = "keep", read as far as they
  go and accounted for.
"""

import errno
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from shortcut_cli import files
from shortcut_cli.data import sound_flac, sound_mpeg, sound_ogg, sound_wav
from shortcut_cli.data.documents import check_unchanged
from shortcut_cli.data.packed import unpacked
from shortcut_cli.data.sound_stream import TOLERANCE_S, Blocks, Spliced, Stream, begin
from shortcut_cli.errors import Rejected, unreadable
from shortcut_cli.formatting import shown

READER_VERSION = 2  # of everything here that changes the samples of a file, or whether it is accepted
READ_FRAMES = 1 << 16
SUFFIXES = tuple(suffix + packed for packed in ("", ".gz") for suffix in (".wav", ".flac", ".ogg", ".mp3"))
KEPT_FREE_BYTES = 1 << 30  # in the temporary folder, or a twentieth of it, whatever a file unpacks to
ABOVE_FULL_SCALE = 2.0  # a peak from here on is noted: 6 dB above full scale, which no decoder of clipped music reaches
CANCELLED_DB = 30  # a mix this much below its channels is noted as cancelled,
AUDIBLE_DB = -60  # if they are louder than this, below full scale
KINDS = {".wav": "WAV", ".flac": "FLAC", ".ogg": "Ogg", ".mp3": "MP3"}
MESSAGE = re.compile(rb"(\[[^]]*\] )?(note|warning|error): |.*mpg123", re.IGNORECASE)

Damaged = Literal["reject", "keep"]


class SoundReader:
    """Reads a sound file once: iterating yields its samples, float32 blocks, mono (N,) or stereo (N, 2).

    After the last block, `seconds` is the length of what was decoded, and `account` has what a user should know:
    "files_damaged" and "seconds_missing" of files kept in spite of damage, "files_above_full_scale" and "peak_max",
    "files_cancelled" (channels whose mean is silence), "decoder_messages" (of libmpg123, for faults in frames).

    scale: size of the blocks, relative to READ_FRAMES; the samples do not depend on it. sha256: of the file when its
    content was decided upon; empty: not checked. damaged: what to do with files that are not whole.

    Iterating raises Rejected if the file can't be read or is not sound, if it is not whole, if it has no samples or
    resamples to none, if one is not finite, or if it has changed.
    """

    def __init__(
        self,
        path: Path,
        scale: float = 1.0,
        *,
        rate_hz: int = 24_000,
        channels: int = 1,
        sha256: str = "",
        damaged: Damaged = "reject",
    ) -> None:
        self.path = path
        self.block_frames = round(READ_FRAMES * scale)
        self.rate_hz = rate_hz
        self.channels = channels
        self.sha256 = sha256
        self.damaged = damaged
        self.seconds = 0.0
        self.account: dict[str, float] = {}

    def __iter__(self) -> Iterator[np.ndarray]:
        try:
            with _unpacked(self.path) as path, files.regular(path) as stream:
                yield from self._read(path, stream)
            check_unchanged(self.path, self.sha256)
        except Rejected:
            check_unchanged(self.path, self.sha256)
            raise
        except OSError as error:
            scratch = tempfile.gettempdir()
            where = f" in {scratch} (TMPDIR)" if str(error.filename).startswith(scratch) or _is_full(error) else ""
            found = unreadable(error)
            passing = found.passing or _is_full(error) or bool(self.sha256)  # it could be read when it was hashed
            raise Rejected(f"{found}{where}", passing=passing) from error

    def _read(self, path: Path, file: BinaryIO) -> Iterator[np.ndarray]:
        found = streams(file, path)
        reason = _not_whole(found)
        if reason and self.damaged == "reject":
            raise Rejected(reason)
        levels, decoded = _Levels(), [_Decoding(one, path, file, self.block_frames) for one in found]
        given = 0
        for one in decoded:
            for block in self._resampled(one, levels):
                given += len(block)
                yield block
        self.seconds = sum(one.seconds for one in decoded)
        reason = reason or _not_decoded(decoded)
        count = sum(one.count for one in decoded)
        if reason and (self.damaged == "reject" or not count):
            raise Rejected(reason)
        if not count:
            raise Rejected("has no samples")
        if not given:
            own = f"{count:,} sample{'s' * (count > 1)} at {decoded[0].rate_hz:,} Hz"
            raise Rejected(f"has {own}, which is none at {self.rate_hz:,} Hz")
        self.account = levels.account()
        if reason:
            missing = sum(one.missing_s for one in decoded)
            self.account |= {"files_damaged": 1, "seconds_missing": missing}
        if messages := sum(one.messages for one in decoded):
            self.account["decoder_messages"] = messages

    def _resampled(self, decoding: "_Decoding", levels: "_Levels") -> Iterator[np.ndarray]:
        import soxr

        resampler = None
        for block in decoding:
            mixed = block.mean(axis=1) if self.channels == 1 else _stereo(block)
            finite = np.isfinite(mixed) if self.channels == 1 else np.isfinite(mixed).all(axis=1)
            if not finite.all():
                place = decoding.count - len(block) + int(finite.argmin())
                raise Rejected(f"has a sample that is not a finite number, at {place}")
            levels.add(block, mixed)
            if decoding.rate_hz == self.rate_hz:
                yield mixed
                continue
            if resampler is None:
                resampler = soxr.ResampleStream(decoding.rate_hz, self.rate_hz, self.channels, dtype="float32")
            yield resampler.resample_chunk(mixed)
        if resampler is not None:
            yield resampler.resample_chunk(mixed[:0], last=True)


def _is_full(error: OSError) -> bool:
    """Whether a disk is full, which can only be that of the temporary folder: nothing else is written here."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _stereo(block: np.ndarray) -> np.ndarray:
    """Two channels unchanged; one channel, or the mean of more than two, twice."""
    if block.shape[1] == 2:
        return block
    return np.repeat(block.mean(axis=1, keepdims=True), 2, axis=1)


class _Levels:
    """The loudness of a file's channels, and of their mean."""

    def __init__(self) -> None:
        self.peak = 0.0
        self.channels = self.mix = 0.0  # sums of squares, of the average channel and of the mean of all channels
        self.count = 0

    def add(self, block: np.ndarray, mixed: np.ndarray) -> None:
        """A block (N, channels) and what it is mixed to, (N,) or (N, 2)."""
        self.peak = max(self.peak, float(block.max()), -float(block.min()))
        if block.shape[1] > mixed[0].size:
            mono = np.ascontiguousarray(mixed.reshape(len(mixed), -1)[:, 0])
            self.count += len(block)
            self.channels += float(np.vdot(block, block)) / block.shape[1]
            self.mix += float(np.vdot(mono, mono))

    def account(self) -> dict[str, float]:
        """What is worth a note."""
        found: dict[str, float] = {}
        if self.peak > ABOVE_FULL_SCALE:
            found |= {"files_above_full_scale": 1, "peak_max": self.peak}
        audible = self.channels > self.count * 10 ** (AUDIBLE_DB / 10)
        if audible and self.mix < self.channels * 10 ** (-CANCELLED_DB / 10):
            found["files_cancelled"] = 1
        return found


class _Decoding:
    """What libsndfile reads of a stream: iterating yields samples (N, channels), up to the end or an error."""

    def __init__(self, stream: Stream, path: Path, file: BinaryIO, block_frames: int) -> None:
        self.stream, self.path, self.file = stream, path, file
        self.block_frames = block_frames
        self.rate_hz = self.count = self.messages = 0
        self.error = ""

    @property
    def seconds(self) -> float:
        """Length of what has been decoded."""
        return self.count / self.rate_hz if self.rate_hz else 0.0

    @property
    def undecoded_s(self) -> float:
        """Length of what is there and could not be decoded."""
        return max(0.0, self.stream.present_s - self.seconds)

    @property
    def missing_s(self) -> float:
        """Length of what the file speaks of and was not decoded. A decoder that stopped at a gap has not filled it."""
        true_s = max(self.stream.present_s, self.seconds - self.stream.added_s)
        return max(0.0, self.stream.promised_s - min(self.seconds, true_s))

    def __iter__(self) -> Iterator[np.ndarray]:
        import soundfile

        with tempfile.TemporaryFile() if self.stream.loud else nullcontext() as heard:
            try:
                with files.regular(self.path) as own:
                    with _stderr_to(heard):
                        sound = soundfile.SoundFile(self._source(own), closefd=False)
                    with sound:
                        self.rate_hz = sound.samplerate
                        yield from self._blocks(sound, heard)
            except soundfile.LibsndfileError as error:
                # What libsndfile says if libmpg123 can't open a file, which has been opened here long ago.
                wrong = "File does not exist" in error.error_string
                self.error = (
                    "no frame can be decoded" if wrong else error.error_string.removeprefix("Error : ").rstrip(".")
                )
            if heard is not None:
                self._count_messages(heard)

    def _source(self, own: BinaryIO) -> Spliced | int:
        """What libsndfile reads. own: the whole file, with a position of its own.

        Never a path: libsndfile would wait for a pipe, and take a '._NAME', which macOS left beside it, for its sound.
        """
        return Spliced(self.file, self.stream.parts) if self.stream.parts else own.fileno()

    def _blocks(self, sound: Any, heard: BinaryIO | None) -> Iterator[np.ndarray]:
        import soundfile

        error = None
        while error is None and (frames := min(self.block_frames, sound.frames - self.count)) > 0:
            block = np.zeros((frames, sound.channels), np.float32)
            try:
                with _stderr_to(heard):
                    block = sound.read(out=block)
            except soundfile.LibsndfileError as found:
                error = found
                block = block[: sound.tell() - self.count if sound.seekable() else 0]  # what comes before the error
            if not len(block):
                break
            self.count += len(block)
            yield block
        if error is not None:
            raise error

    def _count_messages(self, heard: BinaryIO) -> None:
        """Count the messages of libmpg123; what others wrote to stderr in the meantime is passed on."""
        heard.seek(0)
        for line in heard:
            if MESSAGE.match(line):
                self.messages += 1
            elif line.strip() and sys.stderr is not None:
                sys.stderr.write(shown(line.decode(errors="replace")))


def _stderr_to(target: BinaryIO | None) -> AbstractContextManager[None]:
    """What C libraries write to stderr goes to a file; None: to stderr."""
    return nullcontext() if target is None else files.diverted(2, target)


def streams(stream: BinaryIO, path: Path) -> list[Stream]:
    """The streams of sound in an open file. Raises Rejected if it is not a sound file; `path` is for the reason."""
    file = Blocks(stream)
    if not file.size:
        raise Rejected("is empty (0 bytes)")
    start = begin(file)
    head = file.at(start, 12)
    if head[:4] in sound_wav.RIFFS and head[8:] == b"WAVE":
        return sound_wav.streams(file, start)
    if head[:4] == b"FORM" and head[8:11] == b"AIF":
        return sound_wav.aiff(file, start)
    if head[:7] == b"NIST_1A":
        return sound_wav.sphere(file)
    if head[:4] == b"fLaC":
        return sound_flac.streams(file)
    if head[:4] == b"OggS":
        return sound_ogg.streams(file)
    found = sound_mpeg.streams(file)
    if not found and sound_mpeg.frame(head[:4]):
        raise Rejected("is not MPEG audio: the first frame is not followed by another")
    if not found:
        raise Rejected(f"is not {KINDS.get(path.suffix.lower(), 'sound')}: it begins with {_shown(head)}")
    return found


def _shown(head: bytes) -> str:
    """The first bytes of a file, as text if they are."""
    if not any(head):
        return "zeros"
    text = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in head[:9])
    return f"'{text}'" if text.count(".") < 6 else f"the bytes {head[:8].hex(' ')}"


def _not_whole(found: list[Stream]) -> str:
    """Why a file is not whole, by its own account; empty if it is."""
    promised, present = sum(one.promised_s for one in found), sum(one.present_s for one in found)
    mark = next((one.mark for one in found if one.mark), "")
    if sum(one.missing_s for one in found) > TOLERANCE_S:
        return f"{f'{mark};' if mark else 'is truncated:'} it promises {promised:.3f} s, {present:.3f} s are there"
    return f"{mark}; {present:.3f} s are there" if mark else ""


def _not_decoded(decoded: list[_Decoding]) -> str:
    """Why a file could not be decoded to its end; empty if it could."""
    wrong = next((one for one in decoded if one.error), None)
    seconds, present = sum(one.seconds for one in decoded), sum(one.stream.present_s for one in decoded)
    if wrong and not wrong.seconds:
        form = wrong.stream.form
        return f"can't be read by libsndfile{f', {form}' if form else ''}: {wrong.error}"
    if wrong or sum(one.undecoded_s for one in decoded) > TOLERANCE_S:
        says = f" ({wrong.error})" if wrong else ""
        return f"is damaged: {present:.3f} s are there, {seconds:.3f} s can be decoded{says}"
    if seconds > TOLERANCE_S + present + sum(one.stream.added_s for one in decoded):
        return f"contradicts itself: by its header {present:.3f} s are there, libsndfile decodes {seconds:.3f} s"
    return ""


@contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """The file itself, or, since libsndfile reads no gzip, an unpacked copy in a temporary folder."""
    if path.suffix.lower() != ".gz":
        yield path
        return
    with files.temporary_folder() as folder:
        copy = folder / path.stem
        with unpacked(path) as packed, open(copy, "wb") as stream:
            while block := packed.read(files.BLOCK_BYTES):
                room = shutil.disk_usage(folder)
                if room.free - len(block) < min(KEPT_FREE_BYTES, room.total // 20):
                    where = f"{tempfile.gettempdir()} (TMPDIR)"
                    raise Rejected(f"unpacks to more than there is room for in {where}", passing=True)
                stream.write(block)
        yield copy
