"""Doctor: check what works on this machine, and say how to fix the rest."""

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    *("torch", "numpy", "scipy", "encodec", "miditok", "symusic", "sentencepiece", "soundfile", "soxr"),
    *("jinja2", "markupsafe", "matplotlib", "pebble", "pydantic", "typer", "rich"),
)
GIB = 2**30
LOW_DISK_GIB = 2


@dataclass(frozen=True)
class Check:
    """One check: what was checked, whether it works, what was found, and how to fix it."""

    what: str
    works: bool
    found: str
    remedy: str = ""


def examine() -> list[dict[str, Any]]:
    """Run all checks; returns them as dictionaries."""
    return [asdict(check) for check in (*_packages(), *_devices(), *_codecs(), *_disk())]


def _packages() -> Iterator[Check]:
    yield Check("Python", True, platform.python_version())
    for package in PACKAGES:
        try:
            yield Check(package, True, version(package))
        except PackageNotFoundError:
            yield Check(package, False, "not installed", f"pip install {package}")


def _devices() -> Iterator[Check]:
    import torch

    yield Check("CPU", True, f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}")
    if torch.cuda.is_available():
        yield Check("CUDA", True, torch.cuda.get_device_name())
    else:
        yield Check("CUDA", True, "none; training runs on the CPU")
    if torch.backends.mps.is_available():
        yield Check("MPS", True, "available with --device mps")


def _codecs() -> Iterator[Check]:
    from shortcut_cli.codec import weights

    for name, path in weights.EMBEDDED.items():
        yield Check(f"codec {name}", path.is_file(), str(path), "reinstall shortcut-cli, which includes it")
    for name in weights.OFFICIAL:
        path = weights.cached(name)
        if path.is_file():
            yield Check(f"codec {name}", True, str(path))
        else:
            remedy = f"run shortcut codec get {name}, or let the first use fetch it; offline, put the file at {path}"
            yield Check(f"codec {name}", False, "not fetched yet", remedy)


def _disk() -> Iterator[Check]:
    free = shutil.disk_usage(Path.cwd()).free / GIB
    yield Check(
        "disk",
        free >= LOW_DISK_GIB,
        f"{free:.1f} GiB free here",
        "free some space, or write to another disk with --out",
    )
