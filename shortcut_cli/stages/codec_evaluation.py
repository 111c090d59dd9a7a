"""Evaluate a codec: quality of the reconstruction at each bandwidth, use of the codebooks, and speed."""

import os
import time
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shortcut_cli import SCHEMA_VERSION, cleanup, files
from shortcut_cli.codec import loading, losses, rvq
from shortcut_cli.codec.layout import CODEBOOK_KBPS, CODES, MONO, RATE_HZ
from shortcut_cli.data import inputs
from shortcut_cli.data.documents import add_account
from shortcut_cli.data.sound import SUFFIXES, SoundReader
from shortcut_cli.errors import CheckFailed, Rejected, UsageError
from shortcut_cli.events import Note, Progress, Report
from shortcut_cli.kept import codec_scores

OPUS = "opus"
UNIT = "codec-eval"  # what the reconstructions are together
PESQ_RATE_HZ = 16_000
Samples = npt.NDArray[np.float32]


@dataclass
class Sums:
    """Means over files of scores that are undefined for some files."""

    values: dict[str, list[float]]

    def add(self, scores: dict[str, float | None]) -> None:
        """Add the scores of one file; None: undefined for this file."""
        for name, value in scores.items():
            if value is not None:
                self.values.setdefault(name, []).append(value)

    def means(self) -> dict[str, float | None]:
        """The mean of each score; None if it is undefined for all files."""
        return {name: (sum(found) / len(found) if found else None) for name, found in self.values.items()}


def evaluate(weights: str, paths: Iterable[str], out: Path | None, *, report: Report) -> dict[str, Any]:
    """Encode and decode every file with the codec `weights` (a name or a path), and compare the result with the file.

    Returns the result of `shortcut codec eval --json`: for each bandwidth, and for Opus at its lowest bitrate, means
    over the files of SI-SDR (dB), log-mel distance, STOI (Taal et al. 2011) and wide-band PESQ (ITU-T P.862.2); the
    perplexity of each codebook over all files; speeds as multiples of real time. A score is None if its package is not
    installed or if it is undefined for all files. "rejects" has the reasons of files that can't be read, "account" what
    the reader noticed in the others.

    out: folder for the reconstructions, which "sounds" then names beside each file; None: they are not kept.

    Raises UsageError if no file can be read or the codec is not 24 kHz mono.
    """
    found = inputs.find(paths, SUFFIXES, out=out)
    if not found.files:
        raise found.none(SUFFIXES, paths, out)
    codec = loading.codec(weights)
    if codec.layout != MONO:
        raise UsageError(f"{weights} is a 48 kHz stereo codec; `codec eval` takes 24 kHz mono codecs only")
    measures = Measures()
    if measures.missing:
        report(Note(text=f"without {measures.missing}: pip install 'shortcut-cli[measure]'"))
    counts = [count for count in (1, 2, 4, 8, 16, 32) if count <= codec.codebooks]
    names = _names([relative for relative, _ in found.files], [_label(count) for count in counts] + [OPUS], out)
    with nullcontext() if out is None else files.together(out, UNIT, names):
        result = _evaluate(weights, codec, found, measures, counts, out, report)
        cleanup.last()
        return result


def keep(result: dict[str, Any], out: Path | None, report: Report) -> Path | None:
    """Keep what `evaluate` returned in `out`, or beside the codec.pt, and return that folder; None if there is none.

    If it can't be written there, a note says so.
    """
    codec = Path(result["weights"])
    mine = codec.name == "codec.pt" and codec.is_file()
    folder = out or (codec.parent if mine else None)
    if folder is None:
        return None
    try:
        codec_scores.keep(folder, result, files.sha256(codec) if codec.is_file() else None)
    except (OSError, CheckFailed) as error:
        words = error.message if isinstance(error, CheckFailed) else error.strerror
        report(Note(text=f"the result could not be kept in {folder / codec_scores.NAME}: {words}"))
        return None
    return folder


def _evaluate(
    weights: str,
    codec: Any,
    found: inputs.Found,
    measures: "Measures",
    counts: list[int],
    out: Path | None,
    report: Report,
) -> dict[str, Any]:
    rows = {count: Sums({}) for count in (*counts, 0)}  # 0: Opus
    codes: list[npt.NDArray[np.int64]] = []
    account: dict[str, float] = {}
    rejects = [{"path": name, "reason": reason} for name, reason in found.rejects]
    sounds: list[dict[str, Any]] = []
    seconds, spent = 0.0, {"encode": 0.0, "decode": 0.0}
    for done, (relative, path) in enumerate(found.files, 1):
        reader = SoundReader(path)
        try:
            x = np.concatenate(list(reader))
        except Rejected as error:
            rejects.append({"path": relative, "reason": str(error)})
            continue
        add_account(account, reader.account)
        began = time.perf_counter()
        coded = np.concatenate(list(codec.encode([x], codec.codebooks)))  # (frames, Q)
        spent["encode"] += time.perf_counter() - began
        seconds += len(x) / RATE_HZ
        if out is not None:
            sounds.append(_heard(out, relative, path, len(x), [*map(_label, counts), OPUS]))
        codes.append(coded)
        for count in counts:
            began = time.perf_counter()
            y = np.concatenate(list(codec.decode([coded[:, :count]])))[: len(x)]
            spent["decode"] += (time.perf_counter() - began) / len(counts)
            rows[count].add(measures(x, y))
            _keep(out, relative, _label(count), y)
        y, kbps = _opus(x)
        rows[0].add({"kbps": kbps, **measures(x, y)})
        _keep(out, relative, OPUS, y)
        report(Progress(task="codec eval", done=done, total=len(found.files), unit="files"))
    if not codes:
        raise UsageError("none of the files can be read: " + "; ".join(f"{r['path']}: {r['reason']}" for r in rejects))
    return {
        "schema_version": SCHEMA_VERSION,
        "weights": weights,
        "files": len(codes),
        "rejects": rejects,
        "account": account,
        "seconds": seconds,
        "bandwidths": [{"kbps": count * CODEBOOK_KBPS, **rows[count].means()} for count in counts],
        "opus": rows[0].means(),
        "perplexity": rvq.perplexities(torch.from_numpy(np.concatenate(codes).T.copy()), CODES),
        "encode_x_realtime": seconds / spent["encode"],
        "decode_x_realtime": seconds / spent["decode"],
        "threads": torch.get_num_threads(),
        **({} if out is None else {"sounds": sounds}),
    }


class Measures:
    """The scores of one reconstruction; `missing` names those whose package is not installed."""

    def __init__(self) -> None:
        self.mel = losses.LogMel()
        self.stoi, self.pesq, absent = None, None, []
        try:
            from pystoi import stoi

            self.stoi = stoi
        except ModuleNotFoundError:
            absent.append("STOI (pystoi)")
        try:
            from pesq import pesq

            self.pesq = pesq
        except ModuleNotFoundError:
            absent.append("PESQ (pesq)")
        self.missing = " and ".join(absent)

    def __call__(self, x: Samples, y: Samples) -> dict[str, float | None]:
        """x: the original, y: its reconstruction, float32 (samples,) of equal length at 24 kHz."""
        both = torch.from_numpy(np.stack((x, y)))
        longest = self.mel.scales[-1][0]
        padded = torch.nn.functional.pad(both, (0, max(0, longest - both.shape[1])))
        silent = not x.any()
        return {
            "si_sdr_db": None if silent else losses.si_sdr_db(both[:1], both[1:]).item(),
            "log_mel": self.mel(padded[:1], padded[1:]).item(),
            "stoi": self._stoi(x, y),
            "pesq": self._pesq(x, y),
        }

    def _stoi(self, x: Samples, y: Samples) -> float | None:
        """None if fewer than 30 frames of x are loud enough: STOI is then undefined."""
        if self.stoi is None or not x.any():
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            try:
                return float(self.stoi(x, y, RATE_HZ))
            except (RuntimeWarning, ValueError):
                return None

    def _pesq(self, x: Samples, y: Samples) -> float | None:
        """None if PESQ finds no utterance."""
        if self.pesq is None or not x.any() or not y.any():
            return None
        import soxr
        from pesq import PesqError

        a, b = (soxr.resample(part, RATE_HZ, PESQ_RATE_HZ) for part in (x, y))
        try:
            return float(self.pesq(PESQ_RATE_HZ, a, b, "wb"))
        except (PesqError, ValueError):
            return None


def _opus(x: Samples) -> tuple[Samples, float]:
    """x after Opus at libsndfile's lowest bitrate (6 kbit/s), and the kbit/s of the whole file, headers included."""
    import io

    import soundfile

    stream = io.BytesIO()
    kind = {"samplerate": RATE_HZ, "channels": 1, "format": "OGG", "subtype": "OPUS", "compression_level": 1.0}
    with soundfile.SoundFile(stream, "w", **kind) as sound:
        sound.write(x)
    size = len(stream.getvalue())
    stream.seek(0)
    y, _ = soundfile.read(stream, dtype="float32")
    return np.pad(y[: len(x)], (0, max(0, len(x) - len(y)))), size * 8 / 1000 / (len(x) / RATE_HZ)


def _label(count: int) -> str:
    return f"{count * CODEBOOK_KBPS:g}kbps"


def _name(relative: str, label: str) -> str:
    """The file name of a reconstruction."""
    return f"{Path(relative).with_suffix('').as_posix().replace('/', '_')}-{label}.wav"


def _heard(out: Path, relative: str, path: Path, samples: int, labels: list[str]) -> dict[str, Any]:
    """A file and its reconstructions, as a page finds them again. "original": from the folder `out`."""
    return {
        "path": relative,
        "original": os.path.relpath(path.resolve(), out.resolve()),
        "sha256": files.sha256(path),
        "seconds": samples / RATE_HZ,
        "reconstructions": {label: _name(relative, label) for label in labels},
    }


def _names(sources: list[str], labels: list[str], out: Path | None) -> list[str]:
    """The file names of all reconstructions. Raises UsageError if one would take the place of another in `out`."""
    taken: dict[str, str] = {}
    for relative in sources:
        first = taken.setdefault(_name(relative, OPUS), relative)
        if out is not None and first != relative:
            raise UsageError(f"the reconstructions of {first} and {relative} would have the same names in {out}")
    return [_name(relative, label) for relative in sources for label in labels]


def _keep(out: Path | None, relative: str, label: str, y: Samples) -> None:
    if out is None:
        return
    import soundfile

    with files.writing(out / _name(relative, label)) as stream:
        shielded = files.Shielded(stream)
        soundfile.write(shielded, y.clip(-1, 1), RATE_HZ, format="WAV", subtype="PCM_16")
        shielded.check()
