"""Choosing the device to run on."""

from shortcut_cli.errors import Unavailable


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
