"""What torchrun, or `train --devices`, says to each process that it starts, in the environment."""

import os

# Before torch is imported: DistributedDataParallel warns that it looks for parameters without a gradient, which it does
# for another reason, see `parallel.Processes.forward`.
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
PROMISED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# On the store through which processes find each other: the run was begun, so that others go on with it.
BEGUN = "shortcut/begun"
# Exit codes by which a process tells that it ends because of another one.
LOST = 76  # which was killed, or does not answer: all may be started again
LEFT = 77  # which ends with an error, and says so itself


def promised() -> bool:
    """Whether this process is one of several that torchrun has started."""
    return all(name in os.environ for name in PROMISED)


def leads() -> bool:
    """Whether this process speaks to the user: the first one, or the only one."""
    return not promised() or os.environ["RANK"] == "0"


def follows_here() -> bool:
    """Whether another process of this machine does what one has to do for all of them, such as fetching files."""
    return promised() and os.environ["LOCAL_RANK"] != "0"


def attempt() -> int:
    """How often the processes were started before, and failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if promised() else 0


def place(device: str) -> str:
    """The device of this process: of several GPUs of a machine, each takes one."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and promised() else device


def hush() -> None:
    """Keep PyTorch's warnings about what it does for us from the user's screen, in this process and those it starts."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
