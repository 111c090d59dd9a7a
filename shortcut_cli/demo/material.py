"""The demo's files, generated offline: Python's own documentation, and composed piano pieces as MIDI and as sound."""

import wave
from pathlib import Path
from random import Random

from shortcut_cli.demo.composer import compose
from shortcut_cli.demo.render import midi_bytes, render


def write_text(folder: Path) -> int:
    """Write the documentation that ships with Python, one UTF-8 .txt file per topic; returns the number of files."""
    from pydoc_data.topics import topics

    folder.mkdir(parents=True, exist_ok=True)
    for topic, text in topics.items():
        (folder / f"{topic}.txt").write_text(text, encoding="utf-8", newline="\n")
    return len(topics)


def write_midi(folder: Path, *, pieces: int, seed: int) -> int:
    """Write pieces of 15 to 30 s as .mid files; returns their number."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, piece_seed in enumerate(_seeds(seed, pieces)):
        (folder / f"{number:04d}.mid").write_bytes(midi_bytes(compose(piece_seed)))
    return pieces


def write_audio(folder: Path, *, pieces: int, seed: int, sample_rate_hz: int = 24000) -> int:
    """Write pieces of 7 to 12 s as .wav files, 16-bit mono; returns their number."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, piece_seed in enumerate(_seeds(seed, pieces)):
        samples = render(compose(piece_seed, seconds=(7, 12)), sample_rate_hz)
        with wave.open(str(folder / f"{number:04d}.wav"), "wb") as sound:
            sound.setparams((1, 2, sample_rate_hz, len(samples), "NONE", "not compressed"))
            sound.writeframes(samples.tobytes())
    return pieces


def _seeds(seed: int, pieces: int) -> list[int]:
    rng = Random(seed)  # noqa: S311
    return [int(rng.random() * 2**53) for _ in range(pieces)]
