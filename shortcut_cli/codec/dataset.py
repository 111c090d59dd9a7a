"""Training data of codecs: sound files -> 24 kHz clips in one memory-mapped file per split, and windows of them."""

import math
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shortcut_cli import accounts, files
from shortcut_cli.codec.layout import RATE_HZ
from shortcut_cli.config.schema import CodecDataConfig
from shortcut_cli.data import inputs, windows, workers
from shortcut_cli.data.documents import add_account
from shortcut_cli.data.shards import is_list_of_rejects
from shortcut_cli.data.sound import READER_VERSION, SUFFIXES, SoundReader
from shortcut_cli.errors import CheckFailed, Rejected, Unfinished, UsageError, in_short, unreadable
from shortcut_cli.events import Note, Progress, Report
from shortcut_cli.formatting import cell, to_json
from shortcut_cli.kept.inputs import differences, read

FORMAT = 2
UNIT, MADE = "clips", ("train.s16", "val.s16", "clips.json")  # files that are made together, the last one last
REJECT_KEYS = {"path", "reason"}  # of each line of rejects.jsonl
FULL_SCALE = 32767
Samples = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Clip:
    """One file in clips.json."""

    path: str  # relative to the folder that was given
    sha256: str
    split: str
    start: int  # first sample within the split
    samples: int


@dataclass(frozen=True)
class Clips:
    """A folder that `stage` wrote."""

    folder: Path
    clips: list[Clip]
    rejected: int

    @property
    def fingerprint(self) -> list[tuple[str, str]]:
        """The split and the SHA-256 of each clip."""
        return [(clip.split, clip.sha256) for clip in self.clips]

    def seconds(self, split: str) -> float:
        """Duration of a split."""
        return sum(clip.samples for clip in self.clips if clip.split == split) / RATE_HZ


def stage(paths: Sequence[str], folder: Path, config: CodecDataConfig, *, n_workers: int, report: Report) -> Clips:
    """Convert sound files to train.s16, val.s16, clips.json and rejects.jsonl in `folder`, unless that is done already.

    Of identical files only one is kept. Files that are not whole are rejected. Raises UsageError if there are too few
    files for two splits, if `folder` was made from other files or names, with other settings, or by another version
    of the reader, or if it holds files of the user, CheckFailed if it is damaged, Unfinished if a file was rejected for
    a reason that may pass.
    """
    _check_free(folder)
    found = inputs.find(paths, SUFFIXES, out=folder)
    rejects = [_reject(path, Rejected(reason, passing=path in found.passing)) for path, reason in found.rejects]
    unique: dict[str, tuple[str, Path]] = {}
    for relative, path in found.files:
        try:
            unique.setdefault(files.sha256(path), (relative, path))
        except OSError as error:
            rejects.append(_reject(relative, unreadable(error)))
    _check_finished(folder, rejects)
    if not unique:
        if rejects:
            _write_rejects(folder, rejects)
        if not found.files:
            raise found.none(SUFFIXES, paths, folder)
        raise UsageError(f"no readable {' '.join(SUFFIXES)} files in {' '.join(paths)}")
    # Paths count if they say which files belong together.
    paths_of = {sha256: relative for sha256, (relative, _) in unique.items()} if config.speaker else {}
    speaker = [config.speaker, paths_of] if config.speaker else config.speaker
    request = {
        "format": FORMAT,
        "files": sorted(unique),
        "speaker": speaker,
        "val": config.val,
        "reader": READER_VERSION,
    }
    parts = folder / ".staging"  # with what workers leave there that are killed
    if (folder / "clips.json").exists():
        shutil.rmtree(parts, ignore_errors=True)
        return _load(folder, request)
    try:
        _convert(unique, rejects, request, folder, parts, config, n_workers=n_workers, report=report)
    finally:  # it may be a link to another disk
        shutil.rmtree(parts, ignore_errors=True)
    return _load(folder, request)


def _convert(
    unique: dict[str, tuple[str, Path]],
    rejects: list[dict[str, Any]],
    request: dict[str, Any],
    folder: Path,
    parts: Path,
    config: CodecDataConfig,
    *,
    n_workers: int,
    report: Report,
) -> None:
    """Write what `stage` does. unique: path below its root and path of each file, by SHA-256; parts: a folder."""
    files.make_folder(parts)
    names = {sha256: relative for sha256, (relative, _) in unique.items()}
    jobs = [(path, sha256, parts / f"{sha256}.s16") for sha256, (_, path) in unique.items()]
    lengths: dict[str, int] = {}  # samples of each file that could be read, by SHA-256
    account: dict[str, float] = {}
    results = workers.in_order(
        _read, jobs, (), workers=n_workers, timeout_s=config.file_timeout_s, memory_mb=config.file_memory_mb
    )
    for done, ((_, sha256, _), result) in enumerate(results, 1):
        if isinstance(result, Rejected):
            rejects.append(_reject(names[sha256], result, sha256))
        else:
            lengths[sha256], noticed = result
            add_account(account, noticed)
        report(Progress(task="read", done=done, total=len(jobs), unit="files"))
    if account:
        noted = ", ".join(f"{cell(amount)} {label.strip()}" for label, amount, _ in accounts.rows(account))
        report(Note(text=f"of the files read: {noted}"))
    _check_finished(folder, rejects)
    _write_rejects(folder, rejects)
    splits = divide({sha256: names[sha256] for sha256 in lengths}, config.speaker, config.val)
    with files.together(folder, UNIT, MADE):
        clips = []
        for split in ("train", "val"):
            start = 0
            with files.writing(folder / f"{split}.s16") as stream:
                for sha256 in sorted(lengths, key=lambda sha256: names[sha256]):
                    if splits[sha256] == split:
                        with open(parts / f"{sha256}.s16", "rb") as part:
                            shutil.copyfileobj(part, stream)
                        clips.append(Clip(names[sha256], sha256, split, start, lengths[sha256]))
                        start += lengths[sha256]
        content = {
            "format": FORMAT,
            "request": request,
            "rejected": len(rejects),
            "account": account,
            "clips": [asdict(clip) for clip in clips],
        }
        files.write(folder / "clips.json", to_json(content, indent=1) + "\n")


def _check_free(folder: Path) -> None:
    """Raise UsageError if what `stage` would write is there, and neither complete nor left by a killed process."""
    if (folder / "clips.json").exists():
        return  # `_load` holds the others against it, and nothing is written
    files.check_free(folder, UNIT, MADE)
    path = folder / "rejects.jsonl"
    if os.path.lexists(path) and not is_list_of_rejects(path, REJECT_KEYS):
        raise UsageError(f"{path} was not written by `shortcut codec train`", "move it away, or choose another --out")


def _reject(path: str, reason: Rejected, sha256: str = "") -> dict[str, Any]:
    """A line of rejects.jsonl."""
    known, passing = {"sha256": sha256} if sha256 else {}, {"passing": True} if reason.passing else {}
    return {"path": path, **known, "reason": str(reason), **passing}


def _write_rejects(folder: Path, rejects: list[dict[str, Any]]) -> None:
    files.make_folder(folder)
    files.write(folder / "rejects.jsonl", "".join(to_json(entry) + "\n" for entry in rejects))


def _check_finished(folder: Path, rejects: list[dict[str, Any]]) -> None:
    """Raise Unfinished if a file was rejected for a reason that may pass: clips are never made without it.

    rejects.jsonl is written before, unless it is that of clips that were made earlier.
    """
    passing = [reject for reject in rejects if reject.get("passing")]
    if passing:
        if not (folder / "clips.json").exists():
            _write_rejects(folder, rejects)
        raise Unfinished(len(passing), (f"{reject['path']}: {reject['reason']}" for reject in passing[:3]))


def _load(folder: Path, request: dict[str, object]) -> Clips:
    path = folder / "clips.json"
    try:
        content = read(path) or {}
        clips = [Clip(**entry) for entry in content["clips"]]
        known, rejected = content["request"], content["rejected"]
        _check_clips(clips)
    except (CheckFailed, ValueError, KeyError, TypeError) as error:
        raise CheckFailed(
            f"{path} was not written by `shortcut codec train`, or is damaged: {in_short(error)}",
            f"remove {folder} to read the files again",
        ) from error
    for split in ("train", "val"):
        size = 2 * sum(clip.samples for clip in clips if clip.split == split)
        samples = folder / f"{split}.s16"
        if not samples.is_file() or samples.stat().st_size != size:
            raise CheckFailed(f"{samples} is not {size:,} bytes long, as {path} says")
    changed = [line.partition(":")[0] for line in differences(known, request)]
    if changed:
        raise UsageError(
            f"{folder} was made from something else: its {', '.join(changed)} differ",
            "choose another --out, or remove that folder to read the files again",
        )
    return Clips(folder, clips, rejected)


def _check_clips(clips: list[Clip]) -> None:
    """Raise ValueError if the clips of a split do not lie one behind the other."""
    ends = {"train": 0, "val": 0}
    for clip in clips:
        texts = all(isinstance(text, str) for text in (clip.path, clip.sha256))
        if not texts or clip.start != ends[clip.split] or not isinstance(clip.samples, int) or clip.samples < 0:
            raise ValueError("its clips do not lie one behind the other")
        ends[clip.split] += clip.samples


def _read(job: tuple[Path, str, Path]) -> tuple[int, dict[str, float]]:
    """Write the samples of a file as 16-bit integers; returns their number, and what the reader noticed."""
    path, sha256, target = job
    reader = SoundReader(path, sha256=sha256)
    with files.writing(target) as stream:
        for samples in reader:
            stream.write((samples.clip(-1, 1) * FULL_SCALE).round().astype("<i2").tobytes())
    return target.stat().st_size // 2, reader.account


def divide(names: dict[str, str], speaker: str, val: float) -> dict[str, str]:
    """The split of each file, by SHA-256. Groups of files stay together; those with the lowest hashes are validation.

    names: the path of each file, by SHA-256. speaker: regular expression; files whose paths have the same first match
    form a group, and a file without a match is a group of its own.

    Raises UsageError if there are fewer than two groups.
    """
    groups: dict[str, list[str]] = {}
    for sha256, name in names.items():
        match = re.search(speaker, name) if speaker else None
        groups.setdefault(match.group() if match else sha256, []).append(sha256)
    if len(groups) < 2:
        raise UsageError(
            f"{len(names)} files form {len(groups)} groups; training and validation need one each",
            "give more files, or another data.speaker",
        )
    order = sorted(groups, key=lambda group: windows.key(*group.encode()))
    held = set(order[: max(1, round(val * len(order)))])
    return {sha256: "val" if group in held else "train" for group, members in groups.items() for sha256 in members}


class ClipWindows:
    """Random windows of a split, drawn from a seed and the number of the step."""

    def __init__(self, clips: Clips, split: str, config: CodecDataConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.size = round(config.segment_s * RATE_HZ)
        self.samples = np.memmap(clips.folder / f"{split}.s16", "<i2", "r")
        mine = [clip for clip in clips.clips if clip.split == split]
        self.starts = np.array([clip.start for clip in mine])
        self.ends = self.starts + np.array([clip.samples for clip in mine])

    def batch(self, step: int, count: int) -> Samples:
        """The windows of a step, float32 (count, samples)."""
        return np.stack([self._window(np.random.default_rng(windows.key(self.seed, step, i))) for i in range(count)])

    def spread(self, count: int) -> Samples:
        """`count` windows without augmentation, spread evenly over the split, float32 (count, samples)."""
        places = [(2 * index + 1) * len(self.samples) // (2 * count) for index in range(count)]
        return np.stack([self._cut(place, self.size) for place in places])

    def _cut(self, place: int, size: int) -> Samples:
        """`size` samples around sample `place` of the split, all of one clip; a shorter clip is padded with silence."""
        clip = int(np.searchsorted(self.starts, place, "right")) - 1
        first = max(int(self.starts[clip]), min(place - size // 2, int(self.ends[clip]) - size))
        found = self.samples[first : min(first + size, int(self.ends[clip]))].astype(np.float32) / FULL_SCALE
        return np.pad(found, (0, size - len(found)))

    def _augmented(self, rng: np.random.Generator) -> Samples:
        """A window at a random place, speed and gain."""
        import soxr

        rate = math.exp(rng.uniform(-1, 1) * math.log1p(self.config.speed)) if self.config.speed else 1.0
        size = math.ceil(self.size * rate)
        found = self._cut(int(rng.integers(len(self.samples))), size)
        if rate != 1.0:
            found = soxr.resample(found, RATE_HZ * rate, RATE_HZ, "MQ")[: self.size]
            found = np.pad(found, (0, self.size - len(found)))
        return found * np.float32(10 ** (rng.uniform(-1, 1) * self.config.gain_db / 20))

    def _window(self, rng: np.random.Generator) -> Samples:
        """An augmented window, or the sum of two; scaled down if it would clip."""
        found = self._augmented(rng)
        if rng.random() < self.config.mix:
            found = found + self._augmented(rng)
        loudest = np.abs(found).max(initial=0)
        return found / loudest if loudest > 1 else found
