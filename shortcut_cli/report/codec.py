"""The sections of a codec: what it is, its training, and its quality at each bandwidth."""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from shortcut_cli import files
from shortcut_cli.errors import CheckFailed
from shortcut_cli.kept import codec_scores
from shortcut_cli.report import curves, page, samples, tracks
from shortcut_cli.report.axis import around
from shortcut_cli.report.chart import Line, chart, legend, style
from shortcut_cli.report.page import Section, exact
from shortcut_cli.report.run import duration
from shortcut_cli.training import conditions, run_log

RESULT = "codec.pt"
UNITS = {"mel": "log-mel distance", "si_sdr": "SI-SDR, dB"}  # by the first part of a key of the log
MOST_PANELS = 16
MOST_HEARD = 3  # files that are played, each in every bandwidth
MOST_LISTED = 500
FIGURES = (
    ("log_mel", "log-mel distance (lower is better)"),
    ("si_sdr_db", "SI-SDR, dB (higher is better)"),
    ("stoi", "STOI (higher is better)"),
    ("pesq", "PESQ (higher is better)"),
)


def sections(folder: Path) -> list[Section]:
    """What a codec is and how its training went, if its codec.pt is in the folder, and what `codec eval` found.

    Raises UsageError or CheckFailed if the codec is damaged, or what was found of one that is not there.
    """
    made, sha256 = [], None
    if os.path.lexists(folder / RESULT):
        sha256 = files.sha256(folder / RESULT)
        made.append(Section("codec", "Codec", _facts(folder, sha256)))
        if os.path.lexists(folder / "log.jsonl"):
            made.append(Section("curves", "Curves", _attempted(lambda: _curves(folder))))
    if os.path.lexists(folder / codec_scores.NAME):
        scores = _attempted(lambda: _found(folder, sha256)) if sha256 else _found(folder, sha256)
        made.append(Section("bandwidths", "Quality at each bandwidth", scores))
        made += _heard(folder, sha256)
    return made


def _attempted(make: Callable[[], Markup]) -> Markup:
    """What `make` makes, or why it can't: of a codec that can be read the rest is shown."""
    try:
        return make()
    except CheckFailed as error:
        return page.notices([error.message])
    except OSError as error:
        return page.notices([f"{error.filename} can't be read: {error.strerror}"])


def _found(folder: Path, sha256: str | None) -> Markup:
    found = codec_scores.find(folder, sha256)
    other = f"{folder / codec_scores.NAME} is of another codec; `shortcut codec eval` makes it again."
    return _scores(found) if found else page.notices([other])


def _heard(folder: Path, sha256: str | None) -> list[Section]:
    """The first files with their reconstructions, to hear and see, and a list of all; [] if none were kept."""
    try:
        sounds = (codec_scores.find(folder, sha256) or {}).get("sounds", [])
    except (CheckFailed, OSError):
        return []  # the section above says it
    if not sounds:
        return []
    rows = [(one["path"], duration(one["seconds"]), ", ".join(one["reconstructions"].values())) for one in sounds]
    left = len(rows) - MOST_LISTED
    body = page.template(
        "codec_heard.html",
        files=[samples.reconstructed(folder, one) for one in sounds[:MOST_HEARD]],
        total=len(sounds),
        scale=tracks.scale(),
        table=page.table(
            ("file", "sound", "decoded to"), rows[:MOST_LISTED], f"and {left:,} more" if left > 0 else "All files"
        ),
    )
    return [Section("heard", "Files, original and decoded", body)]


def _facts(folder: Path, sha256: str) -> Markup:
    from shortcut_cli.codec import checkpoint

    content = checkpoint.read(folder / RESULT)
    codec, made = content["recipe"]["codec"], conditions.parts(content.get("conditions"))
    here = made[-1] if made else {}
    return page.facts(
        {
            "network": codec["network"],
            "codebooks": codec.get("codebooks"),
            "parameters": sum(tensor.numel() for tensor in content["weights"].values()),
            "step": content["step"],
            **{_title(name): float(value) for name, value in content["scores"].items()},
            "device": here.get("device"),
            "threads": here.get("threads"),
            "versions": ", ".join(f"{name} {version}" for name, version in content["versions"].items()),
            "codec.pt, SHA-256 begins with": sha256[:16],
            "folder": str(folder),
        }
    )


def _curves(folder: Path) -> Markup:
    """Every value that the log has, each in a plot of its own."""
    lines = [
        {name: math.nan if value is None else float(value) for name, value in line.items()}
        for line in run_log.read_log(folder)
    ]
    keys = list(dict.fromkeys(key for line in lines for key in line if key not in ("step", "seconds")))
    seconds = math.nan
    for line in lines:  # validations have none
        seconds = line.setdefault("seconds", seconds)
    made = {
        _title(key): [curves.logged(lines, key, _title(key), style(number))]
        for number, key in enumerate(keys[:MOST_PANELS])
    }
    return curves.panels(f"{page.key(folder)}-axis", made)


def _title(key: str) -> str:
    for start, words in UNITS.items():
        if key == start or key.startswith(f"{start}_"):
            rest = key[len(start) :].strip("_")
            return words + (f", {rest.replace('kbps', ' kbit/s')}" if rest else "")
    return "learning rate" if key == "lr" else key.replace("_", " ")


def _scores(found: Mapping[str, Any]) -> Markup:
    """A table of all bandwidths, and a plot of each measure, with Opus beside the codec."""
    rows = [*((found["weights"], row) for row in found["bandwidths"]), ("Opus", found["opus"])]
    names = {"kbps": "kbit/s", "log_mel": "log-mel distance", "si_sdr_db": "SI-SDR, dB", "stoi": "STOI", "pesq": "PESQ"}
    known = {key: name for key, name in names.items() if any(row.get(key) is not None for _, row in rows)}
    table = page.table(("codec", *known.values()), ((name, *(row.get(key) for key in known)) for name, row in rows))
    plots = Markup("").join(_plot(found, key, label) for key, label in FIGURES)
    facts = page.facts(
        {
            "files": found["files"],
            "files rejected": len(found["rejects"]),
            "sound": duration(found["seconds"]),
            "encodes at": f"{found['encode_x_realtime']:.3g} times real time",
            "decodes at": f"{found['decode_x_realtime']:.3g} times real time",
            "threads": found["threads"],
            "perplexity of the codebooks": ", ".join(f"{one:.0f}" for one in found["perplexity"]),
        }
    )
    return table + (page.template("plots.html", plots=plots) if plots else Markup("")) + facts


def _plot(found: Mapping[str, Any], key: str, label: str) -> Markup:
    """One measure against kbit/s; empty if it was measured at less than two bandwidths: the table has them all."""
    rows = [row for row in found["bandwidths"] if row.get(key) is not None]
    if len(rows) < 2:
        return Markup("")
    opus = [found["opus"]] if found["opus"].get(key) is not None else []
    named = [("this codec", rows), *(("Opus", [row]) for row in opus)]
    lines = [
        Line(style(number), [row["kbps"] for row in part], [row[key] for row in part], label=name)
        for number, (name, part) in enumerate(named)
    ]
    x = around("kbit/s", [row["kbps"] for row in (*rows, *opus)])
    y = around(label, [row[key] for row in (*rows, *opus)])
    told = "; ".join(f"{exact(row[key])} at {exact(row['kbps'])} kbit/s" for row in rows)
    names = legend((line.style, line.label) for line in lines)
    return page.template("figure.html", drawn=chart(lines, x, y, f"{label}: {told}"), legend=names, caption="")
