"""Reading MIDI files: checked, and parsed by symusic."""

import gzip
import hashlib
import io
import zlib
from pathlib import Path
from typing import Any

from shortcut_cli import files
from shortcut_cli.data.documents import check_unchanged
from shortcut_cli.errors import Rejected, unreadable
from shortcut_cli.tokenizers.midi_bytes import adopt, plain, unwrap
from shortcut_cli.tokenizers.midi_repair import rewrite

MAX_BYTES = 1 << 26  # unpacked; the largest of 900 recitals and transcriptions has 0.3 MB
MAX_NOTES = 1_000_000  # MidiTok holds about 1.3 kB for each while it works


def read_score(path: Path, sha256: str = "") -> tuple[Any, dict[str, float]]:
    """Parse a MIDI file into a symusic score that has all its notes.

    Also returns, for the account, what had to be mended, and what it has that tokens do not carry.

    Raises Rejected with the reason if that fails, or if the file's bytes do not have the hash that is given.
    """
    content = unwrap(_content(path, sha256))
    if not content:
        raise Rejected("is empty")
    if not content.startswith(b"MThd"):
        raise Rejected(f"is not a MIDI file: it begins with {content[:8]!r}")
    found = plain(content)
    score = _parse(content, found.orphans) if found else None
    # symusic drops notes without an end, stops at the first End of Track, and trusts sizes in the file.
    if score is None or found is None or score.note_num() != found.notes:
        content, found = rewrite(content, MAX_NOTES)
        score = _parse(content, found.orphans)
    if score.note_num() != found.notes:
        raise Rejected(f"can't be parsed: {score.note_num():,} of its {found.notes:,} notes were found")
    return score, {name: count for name, count in sorted(found.account.items()) if name and count}


def _content(path: Path, sha256: str) -> bytes:
    """The bytes of a file, unpacked."""
    try:
        with files.regular(path) as stream:
            content = stream.read(MAX_BYTES + 1)
        if sha256 and len(content) <= MAX_BYTES and hashlib.sha256(content).hexdigest() != sha256:
            raise Rejected("changed while it was being prepared", passing=True)
        if path.suffix.lower() == ".gz":
            with gzip.open(io.BytesIO(content)) as stream:
                content = stream.read(MAX_BYTES + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise Rejected(f"is not a whole gzip file: {error}") from error
    except OSError as error:
        check_unchanged(path, sha256)
        raise unreadable(error) from error
    if len(content) > MAX_BYTES:
        check_unchanged(path, sha256)
        raise Rejected(f"is larger than {MAX_BYTES >> 20} MiB")
    return content


def _parse(content: bytes, orphans: list[tuple[int, int, int]]) -> Any:
    """The score, in which tracks that have only controllers are tracks without notes."""
    import symusic

    try:
        score: Any = symusic.Score.from_midi(adopt(content, orphans) if orphans else content)
    except (RuntimeError, ValueError) as error:
        raise Rejected(f"can't be parsed: {error}") from error
    for track in score.tracks if orphans else []:
        if [(n.time, n.duration, n.pitch, n.velocity) for n in track.notes[:2]] == [(0, 0, 0, 1)]:
            track.notes.clear()
    return score
