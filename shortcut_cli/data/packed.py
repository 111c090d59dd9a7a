"""Reading .gz files as streams, with a limit on what a small file can unpack to."""

import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from shortcut_cli import files
from shortcut_cli.errors import Rejected

ALWAYS_BYTES = 1 << 28  # any file may unpack to this much,
MOST_RATIO = 32  # and to this many times its own size; text reaches 3 to 10, sound 1 to 3, logs 20, zeros 1030


class Unpacked:
    """The unpacked content of a .gz file, to be read once."""

    def __init__(self, stream: BinaryIO, packed_bytes: int) -> None:
        self.stream, self.left = stream, max(ALWAYS_BYTES, MOST_RATIO * packed_bytes)

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size`. Raises Rejected if there are more than such a file may have."""
        block = self.stream.read(size)
        self.left -= len(block)
        if self.left < 0:
            raise Rejected(
                f"unpacks to more than {ALWAYS_BYTES >> 20} MiB and {MOST_RATIO} times its size; unpack it yourself "
                "if that is right"
            )
        return block


@contextmanager
def unpacked(path: Path) -> Iterator[Unpacked]:
    """A .gz file, open for reading. Raises Rejected if it is not whole, OSError if it can't be read."""
    try:
        with files.regular(path) as packed, gzip.open(packed) as stream:
            yield Unpacked(stream, os.fstat(packed.fileno()).st_size)  # type: ignore[arg-type]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise Rejected(f"is not a whole gzip file: {error}") from error
