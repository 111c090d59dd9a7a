"""What the bytes of weights and samples depend on besides recipe, data and checkpoint: the machine and the libraries.

How a sum is divided among threads, which instructions a CPU has and how a library orders its additions decide how
results are rounded. Everything that is trained says under which conditions it was, so that a change can be named.
"""

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from shortcut_cli import __version__
from shortcut_cli.config import writing
from shortcut_cli.formatting import counted

FROM_STEP = "from_step"
MOST_PARTS = 1000
LONGEST = 200  # characters of a name or a value


def now(device: str) -> dict[str, Any]:
    """The conditions in this process on a device: its kind or, of a GPU, its name; processes; threads; versions."""
    import numpy as np
    import torch

    kind = device.partition(":")[0]
    return {
        "device": torch.cuda.get_device_name(device) if kind == "cuda" else kind,
        "processes": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
        "threads": torch.get_num_threads(),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "shortcut": __version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


def changes(made: Any, here: Mapping[str, Any]) -> str:
    """How `here` differs from the conditions that a file names, on one line; empty if it does not.

    made: a table as `now` makes it; anything else means that the file, of an earlier version, names none.
    """
    if not isinstance(made, Mapping):
        return ""
    made = {"processes": 1, **made}  # earlier versions had no other number
    return ", ".join(writing.differences({key: made.get(key) for key in here}, here))


def parts(content: Any) -> list[dict[str, Any]]:
    """The conditions of each part of a training, as its files hold them; none if an earlier version wrote them.

    Nor if they are not what `now` says, names with texts and numbers: someone else may have written them.
    """
    whole = isinstance(content, list) and len(content) <= MOST_PARTS and all(map(_is_part, content))
    return [dict(part) for part in content] if whole else []


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and all(
        isinstance(name, str)
        and isinstance(value, str | int)
        and max(len(text) for text in (name, value) if isinstance(text, str)) <= LONGEST
        for name, value in part.items()
    )


def told(here: Mapping[str, Any]) -> str:
    """Conditions in words: "cpu, 2 threads, x86_64 AVX2, torch 2.6.0, numpy 2.0.0, shortcut 1.0"."""
    count = here["threads"]
    versions = (f"{name} {here[name]}" for name in ("torch", "numpy", "shortcut"))
    return ", ".join((here["device"], counted(count, "thread"), here["cpu"], *versions))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with `count` threads in this block; 0: with as many as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
