"""What a run has sampled, to hear and see, beside held-out documents; and documents of shards in the same form."""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
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
from shortcut_cli.report import media, music, page, synth, tracks
from shortcut_cli.report.axis import Axis
from shortcut_cli.report.documents import Documents
from shortcut_cli.report.page import Section, cell, template
from shortcut_cli.report.run_data import shards_of
from shortcut_cli.training import tensor_file

MOST_SAMPLES = 8  # of a page
SIDECAR_KEYS = {"checkpoint_sha256", "sampler", "number"}
MOST_DAMAGED = 8  # that are named
CODEC_HZ = 24_000  # that `codec eval` measures at
MOST_S = 60.0  # of a sample that are shown
MOST_NOTES = 20_000
LOUDEST = 1000.0  # of a float sample: more is damage
MOST_VALUES = 1 << 26  # of sound, in all channels
MOST_CHARACTERS = 20_000
MOST_PROMPT = 300  # characters of it in a caption
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
    beside, missing = _held_out(run_folder / "run.pt") if found else (None, "")
    return [Section("samples", "Samples", _beside(run_folder, found, damaged, lambda _: beside, [missing]))]


def is_folder(folder: Path) -> bool:
    """Whether there is a sample in a folder, or the .json of one."""
    return any(map(_describes, folder.glob("*.json")))


def _describes(place: Path) -> bool:
    try:
        return (read(place) or {}).keys() >= SIDECAR_KEYS
    except (CheckFailed, OSError):
        return False


def of_folder(folder: Path) -> list[Section]:
    """The samples in a folder of their own, beside documents that the checkpoints that made them have not seen."""
    found, damaged = _samples(folder)
    known: dict[str, tuple[Documents | None, str]] = {}
    for _, sidecar in found[:MOST_SAMPLES]:
        if (key := _source(folder, sidecar)) not in known:
            known[key] = _of_sample(folder, sidecar)
    missing = list(dict.fromkeys(words for _, words in known.values()))
    models = dict.fromkeys(str(one["model"]) for _, one in found if isinstance(one.get("model"), str))
    about = page.facts(
        {
            "samples": len(found),
            "model": ", ".join(models),
            "checkpoint": ", ".join(key.partition(" ")[2] for key in known),
            "checkpoint, SHA-256 begins with": ", ".join(key.partition(" ")[0][:16] for key in known),
            "folder": str(folder),
        }
    )
    body = _beside(folder, found, damaged, lambda sidecar: known[_source(folder, sidecar)][0], missing)
    return [Section("samples", "Samples", about + body)]


def _source(folder: Path, sidecar: Mapping[str, Any]) -> str:
    """The checkpoint of a sample: its hash and its path."""
    return f"{sidecar['checkpoint_sha256']} {os.path.normpath(folder / str(sidecar.get('checkpoint', '')))}"


def _of_sample(folder: Path, sidecar: Mapping[str, Any]) -> tuple[Documents | None, str]:
    """As `_held_out`, of the checkpoint that made a sample, if it is where the .json says, and unaltered."""
    sha256, _, named = _source(folder, sidecar).partition(" ")
    try:
        same = Path(named).is_file() and files.sha256(Path(named)) == sha256
    except (OSError, ValueError):
        same = False
    if not same:
        return None, f"No held-out documents are shown: the checkpoint is not at {named}, or has changed."
    return _held_out(Path(named))


def _beside(
    folder: Path,
    found: Sequence[tuple[Path, dict[str, Any]]],
    damaged: Sequence[str],
    documents: Callable[[dict[str, Any]], Documents | None],
    missing: Sequence[str],
) -> Markup:
    """Samples, each with a held-out document. folder: that names them; missing: why there are none of these."""
    pairs, used = [], defaultdict[int, Counter[int]](Counter)
    for path, sidecar in found[:MOST_SAMPLES]:
        mine, beside = _sample(folder, path, sidecar), documents(sidecar)
        pairs.append((mine, _other(beside, sidecar, used[id(beside)], f"beside {_called(folder, path)}")))
    kinds = {path.suffix for path, _ in found[:MOST_SAMPLES]}
    return template(
        "samples.html",
        pairs=pairs,
        missing=[words for words in missing if words],
        damaged=[*damaged[:MOST_DAMAGED], *([f"{len(damaged) - MOST_DAMAGED:,} more"] * (len(damaged) > MOST_DAMAGED))],
        left_out=len(found) - len(pairs),
        scale=tracks.scale() if ".wav" in kinds else "",
        midi=".mid" in kinds,
    )


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
        part, where = _first(tokens, documents.lengths[index]), f"of {names.of_folder(shards_folder)}"
        figures.append(_document(documents, index, tokens, f"document {index + 1}", part, where))
    kinds = {"audio": ".wav", "midi": ".mid"}
    return template(
        "samples.html",
        pairs=[(figure, None) for figure in figures],
        missing=[],
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
            if content is None or not content.keys() >= SIDECAR_KEYS:
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
        parts.append(f"after a prompt of {prompt:,} tokens{_only_new(sidecar)}")
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


def _only_new(sidecar: Mapping[str, Any]) -> str:
    """The words of a prompt that is in no file: what was asked to continue, if only the new part was kept."""
    words = sidecar.get("prompt_text")
    if sidecar.get("only_new") is not True or not isinstance(words, str):
        return ""
    return f" (\u201c{words[:MOST_PROMPT]}{'...' * (len(words) > MOST_PROMPT)}\u201d)"


def _held_out(checkpoint: Path) -> tuple[Documents | None, str]:
    """The documents of the test split that a run was trained beside, or why they are not shown."""
    try:
        content = tensor_file.describe(checkpoint, "run.pt")
        named = reading.validate(content["recipe"], str(checkpoint)).data.shards
        folder = shards_of(checkpoint.parent, content)
        if folder is None:
            return None, f"No held-out documents are shown: the shards of the run are not at {named}, or have changed."
        found = Documents(folder, "test")
    except (ShortcutError, OSError, KeyError, TypeError) as error:
        return None, f"No held-out documents are shown: {getattr(error, 'message', error)}."
    return (found, "") if found.lengths else (None, "No held-out documents are shown: the test split is empty.")


def _other(beside: Documents | None, sidecar: dict[str, Any], used: Counter[int], where: str) -> Markup | None:
    """A held-out document beside a sample, of as many tokens. where: beside which; used: counts each document."""
    if beside is None:
        return None
    tokens = max(1, _begins(sidecar).get("token", _whole(sidecar.get("prompt_tokens"))) + _whole(sidecar.get("tokens")))
    index = beside.like(tokens, used)
    if index is None:
        return None
    tokens = min(tokens, max(1, beside.lengths[index] - 1))
    start = beside.start(index, tokens, used[index])
    used[index] += 1
    part = _first(tokens, beside.lengths[index])
    if start:
        part = f"tokens {start + 1:,} to {start + tokens:,} of its {beside.lengths[index] - 1:,}"
    name = f"held-out document {index + 1}" + (f" from token {start + 1:,} on" if start else "")
    return _document(beside, index, tokens, name, part, where, start)


def _document(
    documents: Documents, index: int, tokens: int, name: str, part: str, where: str, start: int = 0
) -> Markup:
    """A document under its name and that of its file. part: which of its tokens are shown."""
    try:
        source = documents.called(index)
    except (CheckFailed, OSError) as error:
        source = f"from a file that is not known ({getattr(error, 'message', error)})"
    count = len(documents.lengths)
    which = f"one of {count:,}" if count > 1 else "the only one"
    caption = f"{source}; {which} in the {documents.name} split, decoded from {part}"
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
