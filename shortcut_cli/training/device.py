"""Choosing the device to run on, and whether it has room for a model."""

import os
import re

from shortcut_cli.errors import Unavailable, UsageError

KNOWN = "auto, cpu, cuda, cuda:1, mps"
NAME = re.compile(r"auto|(cpu|cuda|mps|xpu|hpu|mtia|meta)(:[0-9]{1,4})?")
LEAST_BYTES = 8  # of a parameter that is trained: it and its gradient, in fp32; an optimizer has more


def check(name: str) -> str:
    """A name that PyTorch may know. Raises Unavailable otherwise, without importing it."""
    if not NAME.fullmatch(name):
        raise Unavailable(f"device {name!r} can't be used: it is none of {KNOWN}", "--device cpu")
    return name


def choose(name: str) -> str:
    """The torch name of a device; "auto" is CUDA if available. Raises Unavailable if the device can't be used."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).tolist()  # of tensors on "meta", which have no values, this raises too
    except (RuntimeError, AssertionError, ImportError) as error:
        raise Unavailable(f"device {name!r} can't be used: {str(error).splitlines()[0]}", "--device cpu") from error
    return name


def check_room(parameters: int, vocabulary: int, device: str, shares: int = 1) -> None:
    """Raise UsageError if the weights and gradients of a model have no room in a device's memory.

    Without this the system may end other processes, and this one without a word. Vocabularies come from manifests.
    shares: of how many processes, each with a device of its own, each has one; on a CPU they share the memory.
    """
    there, needed = _memory_bytes(device), parameters * LEAST_BYTES
    if device.startswith("cuda"):
        needed //= shares
    if there is not None and needed > there:
        gigabytes = f"{needed / 1e9:,.1f} GB" + (f" on each of {shares} devices" if shares > 1 else "")
        raise UsageError(
            f"the {parameters:,} parameters of this model, with a vocabulary of {vocabulary:,}, and their gradients "
            f"take {gigabytes}; {device} has {there / 1e9:,.1f} GB",
            "a smaller model.width or tokenizer.vocabulary needs less",
        )


def _memory_bytes(device: str) -> int | None:
    """The memory of a device; None if that is not known."""
    import torch

    kind = torch.device(device).type
    if kind == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if kind == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(device).total_memory)
    return None
