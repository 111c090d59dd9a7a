"""What a run has sampled, to hear and see, beside held-out documents; and documents of shards in the same form."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from shortcut_cli import files
from shortcut_cli.config import reading
from shortcut_cli.data.sound import SoundReader
from shortcut_cli.errors import CheckFailed, Rejected, ShortcutError
from shortcut_cli.kept import names
from shortcut_cli.kept.inputs import is_finite, read
from shortcut_cli.report import media, music, synth, tracks
from shortcut_cli.report.axis import Axis
from shortcut_cli.report.documents import Documents
from shortcut_cli.report.page import Section, cell, template
from shortcut_cli.report.run_data import shards_of
from shortcut_cli.training import tensor_file

MOST_SAMPLES = 8  # of a page
MOST_DAMAGED = 8  # that are named
CODEC_HZ = 24_000  # that `codec eval` measures at
MOST_S = 60.0  # of a sample that are shown
MOST_NOTES = 20_000
LOUDEST = 1000.0  # of a float sample: more is damage
MOST_VALUES = 1 << 26  # of sound, in all channels
MOST_CHARACTERS = 20_000
EXCERPT_TOKENS = 1500  # of a document of shards
BARS = 8  # that are numbered, about


@dataclass(frozen=True)
class Given:
    """Where the prompt of a sample ends, in what is known of it; `tokens` = 0: there is none."""

    tokens: int = 0
    share: float | None = None  # of all tokens
    second: float | None = None
    characters: int | None = None
    words: str | None = None  # the prompt itself, if it is a text that can be read


def sections(run_folder: Path) -> list[Section]:
    """A section of the samples in RUN/samples; none if there are none."""
    found, damaged = _samples(run_folder / "samples")
    if not found and not damaged:
        return []
    beside, missing = _held_out(run_folder)
    pairs = []
    for number, (path, sidecar) in enumerate(found[:MOST_SAMPLES]):
        mine = _sample(run_folder, path, sidecar)
        pairs.append((mine, _other(beside, sidecar, number, f"beside {_called(run_folder, path)}")))
    kinds = {path.suffix for path, _ in found[:MOST_SAMPLES]}
    body = template(
        "samples.html",
        pairs=pairs,
        missing=missing if found else "",
        damaged=[*damaged[:MOST_DAMAGED], *([f"{len(damaged) - MOST_DAMAGED:,} more"] * (len(damaged) > MOST_DAMAGED))],
        left_out=len(found) - len(pairs),
        scale=tracks.scale() if ".wav" in kinds else "",
        midi=".mid" in kinds,
    )
    return [Section("samples", "Samples", body)]


def figures(run_folder: Path, most: int) -> list[Markup]:
    """The first samples in RUN/samples, without documents beside them: a comparison sets them beside other runs'."""
    found = _samples(run_folder / "samples")[0][:most]
    return [_sample(run_folder, path, sidecar) for path, sidecar in found]


def reconstructed(folder: Path, entry: Mapping[str, Any]) -> list[Markup]:
    """A file that a codec was measured with, and its reconstructions in `folder`: an entry of the result's `sounds`."""
    source = entry["path"]
    original = _shaped(lambda: _original(folder, entry), "original", source)
    made = [
        _figure(folder / name, label, source, Given(), f"{source} at {label} in {names.of_folder(folder)}")
        for label, name in entry["reconstructions"].items()
    ]
    return [original, *made]


def _original(folder: Path, entry: Mapping[str, Any]) -> Markup:
    """The beginning of the sound that the codec got."""
    path = folder / entry["original"]
    if files.sha256(path) != entry["sha256"]:
        raise ValueError("the file has changed since")
    wanted, parts = round(MOST_S * CODEC_HZ), []
    for block in SoundReader(path, rate_hz=CODEC_HZ):
        parts.append(block)
        if sum(map(len, parts)) >= wanted:
            break
    return _heard(
        np.concatenate(parts)[:wanted], CODEC_HZ, entry["seconds"], f"the original of {entry['path']}", Given()
    )


def _sample(run_folder: Path, path: Path, sidecar: dict[str, Any]) -> Markup:
    caption = _caption(path, sidecar)
    return _figure(path, path.name, caption, _given(path, sidecar), _called(run_folder, path))


def _called(run_folder: Path, path: Path) -> str:
    """A sample's name that no sample of another run in the page has: who can't see them tells them apart by it."""
    return f"{path.name} of {names.of_folder(run_folder)}"


def excerpts(shards_folder: Path, how_many: int, split: str = "train") -> Markup:
    """The first EXCERPT_TOKENS of some documents of a split, spread evenly. Raises what opening the shards does."""
    documents = Documents(shards_folder, split)
    count = min(how_many, len(documents.lengths))
    figures = []
    for number in range(count):
        index = number * len(documents.lengths) // count
        tokens = min(EXCERPT_TOKENS, max(1, documents.lengths[index] - 1))
        words = f"of {len(documents.lengths):,} in {split}, decoded from {_first(tokens, documents.lengths[index])}"
        where = f"of {names.of_folder(shards_folder)}"
        figures.append(_document(documents, index, tokens, f"document {index + 1}", words, where))
    kinds = {"audio": ".wav", "midi": ".mid"}
    return template(
        "samples.html",
        pairs=[(figure, None) for figure in figures],
        missing="",
        damaged=[],
        left_out=0,
        scale=tracks.scale() if documents.domain == "audio" else "",
        midi=kinds.get(documents.domain) == ".mid",
    )


def _first(tokens: int, length: int) -> str:
    return f"its {tokens:,} tokens" if tokens >= length - 1 else f"the first {tokens:,} of its {length - 1:,} tokens"


def _samples(folder: Path) -> tuple[list[tuple[Path, dict[str, Any]]], list[str]]:
    """The samples in a folder with their .json, by name; and of every other .json why there is no sample, in words.

    Files without a .json are nobody's sample.
    """
    found, damaged = [], []
    for place in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        path = place.with_suffix("")
        try:
            content = read(place)
            if content is None or not content.keys() >= {"checkpoint_sha256", "sampler", "number"}:
                damaged.append(f"{place.name} describes no sample")
            elif not path.is_file():
                damaged.append(f"{path.name} is gone, or no file")
            else:
                found.append((path, content))
        except CheckFailed as error:
            damaged.append(error.message.replace(f"{folder}{os.sep}", ""))
        except OSError as error:  # a link to itself
            damaged.append(f"{path.name} can't be read: {error.strerror}")
    return found, damaged


def _whole(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 2**53 else 0


def _given(path: Path, sidecar: dict[str, Any]) -> Given:
    """What the .json says of the prompt: of later versions where the new part begins, of all how many tokens it has."""
    tokens, new = _whole(sidecar.get("prompt_tokens")), _whole(sidecar.get("tokens"))
    if not tokens:
        return Given()
    begins, share = _begins(sidecar), tokens / (tokens + new) if new else None
    return Given(tokens, share, begins.get("second"), begins.get("character"), _prompt(path, sidecar))


def _begins(sidecar: dict[str, Any]) -> dict[str, Any]:
    """Where the new part begins, in seconds, characters and tokens, as far as the .json says it."""
    found = sidecar.get("new_begins")
    found = found if isinstance(found, dict) else {}
    known = {key: value for key, value in found.items() if is_finite(value) and value >= 0}
    return known | {key: _whole(known[key]) for key in ("character", "token") if key in known}


def _prompt(path: Path, sidecar: dict[str, Any]) -> str | None:
    """The text of the prompt's file, if it is there unaltered."""
    named = sidecar.get("prompt")
    if path.suffix != ".txt" or not isinstance(named, str):
        return None
    place = path.parent / named
    try:
        if not place.is_file() or files.sha256(place) != sidecar.get("prompt_sha256"):
            return None
        return files.content(place).decode()
    except (OSError, ValueError):
        return None


def _caption(path: Path, sidecar: dict[str, Any]) -> str:
    """How a sample was made, in words."""
    sampler = sidecar.get("sampler")
    sampler = sampler if isinstance(sampler, dict) else {}
    parts = [f"{_whole(sidecar.get('tokens')):,} tokens"]
    if prompt := _whole(sidecar.get("prompt_tokens")):
        parts.append(f"after a prompt of {prompt:,}")
    keys = {"temperature": "temperature", "top_k": "top-k", "top_p": "top-p", "min_p": "min-p", "seed": "seed"}
    parts += [
        f"{name} {cell(sampler[key])}" for key, name in keys.items() if is_finite(sampler.get(key)) and sampler[key]
    ]
    if sidecar.get("ended") is True:
        parts.append("ended by itself")
    words = ", ".join(parts)
    if sidecar.get("sha256") != files.sha256(path):
        words += "; the file has changed since it was sampled"
    return words


def _held_out(run_folder: Path) -> tuple[Documents | None, str]:
    """The documents of the test split that a run was trained beside, or why they are not shown."""
    try:
        content = tensor_file.describe(run_folder / "run.pt", "run.pt")
        named = reading.validate(content["recipe"], str(run_folder)).data.shards
        folder = shards_of(run_folder, content)
        if folder is None:
            return None, f"No held-out documents are shown: the shards of the run are not at {named}, or have changed."
        found = Documents(folder, "test")
    except (ShortcutError, OSError, KeyError, TypeError) as error:
        return None, f"No held-out documents are shown: {getattr(error, 'message', error)}."
    return (found, "") if found.lengths else (None, "No held-out documents are shown: the test split is empty.")


def _other(beside: Documents | None, sidecar: dict[str, Any], number: int, where: str) -> Markup | None:
    """A held-out document beside a sample, of as many tokens. where: beside which."""
    if beside is None:
        return None
    tokens = max(1, _begins(sidecar).get("token", _whole(sidecar.get("prompt_tokens"))) + _whole(sidecar.get("tokens")))
    index = beside.like(tokens, number)
    if index is None:
        return None
    tokens = min(tokens, max(1, beside.lengths[index] - 1))
    start = beside.start(index, tokens, number // max(1, sum(length > tokens for length in beside.lengths)))
    part = _first(tokens, beside.lengths[index])
    if start:
        part = f"tokens {start + 1:,} to {start + tokens:,} of its {beside.lengths[index] - 1:,}"
    name = f"held-out document {index + 1}" + (f" from token {start + 1:,} on" if start else "")
    return _document(beside, index, tokens, name, f"of the test split, decoded from {part}", where, start)


def _document(
    documents: Documents, index: int, tokens: int, name: str, caption: str, where: str, start: int = 0
) -> Markup:
    try:
        return _figure(documents.file(index, tokens, start), name, caption, Given(), f"{name} {where}")
    except (ShortcutError, OSError) as error:
        return template("sample.html", called=name, caption=caption, body="", warning=f"It can't be decoded: {error}")


def _figure(path: Path, name: str, caption: str, given: Given, label: str) -> Markup:
    """A file with a player and pictures, or as text; a warning if it can't be read.

    label: its name for a screen reader, unique in the page.
    """
    if path.suffix not in FORMS:
        return template(
            "sample.html", called=name, caption=caption, body="", warning=f"A {path.suffix} file is not shown."
        )
    return _shaped(lambda: FORMS[path.suffix](path, label, given), name, caption)


def _shaped(make: Callable[[], Markup], name: str, caption: str) -> Markup:
    """What `make` makes under its name; a warning if it can't be read."""
    body, warning = Markup(), ""
    try:
        body = make()
    except (Rejected, OSError, RuntimeError, ValueError) as error:
        warning = f"It can't be read: {error}"
    return template("sample.html", called=name, caption=caption, body=body, warning=warning)


def _sound(path: Path, name: str, given: Given) -> Markup:
    import soundfile

    # libmpg123 writes to stderr what it thinks of a damaged file.
    with files.regular(path) as stream, files.diverted(2), soundfile.SoundFile(stream) as sound:
        rate_hz, total = sound.samplerate, sound.frames / sound.samplerate
        frames = min(round(MOST_S * rate_hz), MOST_VALUES // sound.channels)
        samples = np.nan_to_num(sound.read(frames, dtype="float32"))
    return _heard(samples, rate_hz, total, name, given)


def _heard(samples: media.Samples, rate_hz: int, total: float, name: str, given: Given) -> Markup:
    """A player and pictures of the beginning of a sound of `total` seconds."""
    if not len(samples):
        raise ValueError("it has no samples")
    if np.abs(samples).max() > LOUDEST:
        raise ValueError(f"its samples are over {LOUDEST:,.0f} times full scale")
    samples = samples[:, :2] if samples.ndim > 1 and samples.shape[1] > 1 else samples.reshape(-1)
    mono = samples if samples.ndim == 1 else samples.mean(1)
    axis = Axis(_cut("seconds", total), 0.0, len(mono) / rate_hz)
    panels = [tracks.wave(mono), tracks.mel(mono, rate_hz)]
    shaded = given.second if given.second is not None else given.share and given.share * total
    return tracks.stack(panels, axis, sound=media.mp3(samples, rate_hz), name=f"play {name}", shaded=shaded)


def _cut(unit: str, total: float) -> str:
    return f"{unit}, the first {MOST_S:.0f} of {total:,.1f}" if total > MOST_S else unit


def _music(path: Path, name: str, given: Given) -> Markup:
    found = music.read(path, most_s=MOST_S)
    if not 0 < len(found.notes) <= MOST_NOTES:
        raise ValueError(f"it has {len(found.notes):,} notes in its first minute; 1 to {MOST_NOTES:,} are played")
    sound = synth.render(found.notes, found.seconds)
    axis = Axis("seconds", 0.0, len(sound) / synth.RATE_HZ)
    every = max(1, math.ceil(len(found.bars) / BARS))
    tops = [(second, str(number + 1)) for number, second in list(enumerate(found.bars))[::every]]
    return tracks.stack(
        _rolls(found, axis),
        axis,
        sound=media.mp3(sound, synth.RATE_HZ),
        name=f"play {name}",
        tops=tops,
        shaded=given.second,
    )


def _rolls(found: music.Music, axis: Axis) -> list[tracks.Panel]:
    """A roll of what has a pitch, and one of the drums."""
    parts = [[note for note in found.notes if note.drum is drum] for drum in (False, True)]
    return [tracks.roll(part, axis, bars=found.bars) for part in parts if part]


def _text(path: Path, name: str, given: Given) -> Markup:
    words = files.content(path).decode(errors="replace")
    known = given.characters
    if known is None and given.words is not None and words.startswith(given.words):
        known = len(given.words)
    begins = min(known or 0, len(words))
    shown = words[:MOST_CHARACTERS]
    return template(
        "text.html",
        called=name,
        prompt=shown[:begins],
        new=shown[begins:],
        unknown=bool(given.tokens) and known is None,
        left=len(words) - len(shown),
    )


FORMS: dict[str, Callable[[Path, str, Given], Markup]] = {".wav": _sound, ".mid": _music, ".txt": _text}
