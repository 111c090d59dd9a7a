"""Several processes that train one run together, as torchrun starts them: one leads, and writes all files.

Each process takes its part of the windows of a step, which are the same windows whatever the number of processes.
Gradients and losses are averaged over the processes, in an order that depends on their number only. Numbers that are
on the CPU go through gloo, those on CUDA through NCCL.
"""

import os
import re
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shortcut_cli.errors import CheckFailed, Interrupted, ShortcutError, UsageError
from shortcut_cli.training import checkpoint, loop, torchrun

Result = TypeVar("Result")

FAILED, WELL = 1, 0
READ = (loop.STATE, loop.PREVIOUS)  # what all read together, as the words from 2 on
SEEN, DAMAGED, UNSEEN = "0", "1", "2"  # what a word of a process begins with
SHARED = 'with train.shard = "fsdp", all processes need to see the run folder, under the same name'
WORD_BYTES = 1000  # of what a process says to all
# What PyTorch's backends say when another process has gone, or is silent for too long.
SILENT = re.compile(
    r"gloo|\bNCCL\b|Connection (closed|reset|refused)|Broken pipe|\btime(d )?out\b|\b(TCP)?Store\b", re.IGNORECASE
)
SHOWN = 200  # characters of that
FAILS, LOSES = "fails", "loses"  # on the board: the rank of the first process that ends so
PATIENCE_S = 5  # for the board
START_S = 600.0  # that a process gets to start, and the leading one to read or write its files


class Left(ShortcutError):
    """The leading process ended with an error, which it shows itself."""

    exit_code = torchrun.LEFT


class Lost(ShortcutError):
    """Another process of the training was killed, or does not answer."""

    exit_code = torchrun.LOST


@dataclass(frozen=True)
class Processes:
    """The processes of a training, as seen from one of them. By itself it is a training of one process."""

    rank: int = 0
    count: int = 1
    group: Any = None  # through which they talk about steps
    board: Any = None  # on which each says at which step it is
    sharded: bool = False  # whether each has only its part of the weights
    states: Any = None  # through which they talk about states that are written while they train, if `sharded`
    timeout_s: float = START_S  # how long one waits for another
    logs: bool = False  # whether each writes a log of its own steps

    def with_parts(self) -> "Processes":
        """The same, each with its part of the weights; all call this."""
        patience = timedelta(seconds=max(START_S, self.timeout_s))
        return replace(self, sharded=True, states=dist.new_group(backend="gloo", timeout=patience))

    @property
    def leads(self) -> bool:
        """Whether this process writes the files, and speaks to the user."""
        return self.rank == 0

    def part(self, windows: int, parts: int = 1) -> int:
        """How many windows of a step this process takes at once, if a step has `parts` of them.

        Raises UsageError if they can't be divided.
        """
        if windows % (parts * self.count):
            raise UsageError(
                f"train.batch_size {windows} can't be divided among {self.count} processes"
                + (f" and {parts} parts of train.accumulation" if parts > 1 else ""),
                f"take a multiple of {parts * self.count}",
            )
        return windows // (parts * self.count)

    def forward(self, model: nn.Module) -> nn.Module:
        """The model, whose gradients are averaged over the processes when they are computed, if they are not already.

        DistributedDataParallel looks for parameters without a gradient, which a model does not have: it is then that it
        never rearranges what it sends, so that the order of sums is the same before and after a resume.
        """
        if self.count > 1:
            dist.barrier()  # from here on nobody waits longer than `timeout_s`
        if self.count == 1 or self.sharded:
            return model
        with warnings.catch_warnings():  # later versions have another name for the second one
            warnings.simplefilter("ignore", FutureWarning)
            return nn.parallel.DistributedDataParallel(
                model, process_group=self.group, find_unused_parameters=True, broadcast_buffers=False
            )

    def sends(self, forward: nn.Module, last: bool) -> AbstractContextManager[None]:
        """A block with a part of a step: gradients are averaged with the last one, not with each, if there is room."""
        return nullcontext() if last or self.count == 1 or self.sharded else forward.no_sync()  # type: ignore[operator]

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes, in place."""
        if self.count > 1:
            dist.all_reduce(value, group=self.group)
            value /= self.count
        return value

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if self.count > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def shared(self, work: Callable[[Tensor], Tensor], items: Tensor, first: int) -> Tensor:
        """work(items), which keeps their shape and treats each by itself: a process does every `count`-th of them.

        first: number of the first item, so that over several calls all processes get the same number, or one more.
        """
        if self.count == 1:
            return work(items)
        numbers = torch.arange(len(items))
        owners = (first + numbers) % self.count
        mine = items[owners == self.rank]
        part = items.new_zeros(-(-len(items) // self.count), *items.shape[1:])
        if len(mine):
            part[: len(mine)] = work(mine)
        parts = [torch.empty_like(part) for _ in range(self.count)]
        dist.all_gather(parts, part, group=self.group)
        return torch.stack(parts)[owners, numbers // self.count]

    @contextmanager
    def leading(self) -> Iterator[None]:
        """A block that the leading process goes through while the others `wait`."""
        try:
            yield
        except BaseException:
            self._tell(FAILED)
            raise
        self._tell(WELL)

    def wait(self, load: Callable[[str], str]) -> None:
        """Wait until the leading process has done what it does by itself. Raises Left if that has failed.

        load: called when the leading process reads a state by `together`, with its name; returns its checksum.
        """
        while (word := self._tell(WELL)) > FAILED:
            with suppress(CheckFailed, UsageError, OSError):  # the leading process says it
                self._each(partial(load, READ[word - 2]))
        if word == FAILED:
            raise Left("the leading process failed")

    def together(self, name: str, load: Callable[[str], str]) -> None:
        """load(name), which returns a checksum, in the leading process, while the others, which `wait`, do so too.

        name: one of READ. Raises what it raises; CheckFailed if it does so in another process, ShortcutError if that
        can't see the file, or sees another one.
        """
        self._tell(READ.index(name) + 2)
        said = self._each(partial(load, name))
        for rank, text in enumerate(said):
            if text[:1] == UNSEEN:
                raise ShortcutError(f"process {rank} of {self.count}: {text[1:]}", SHARED)
            if text[:1] == DAMAGED:
                raise CheckFailed(f"{text[1:]} (process {rank} of {self.count})")
            if text != said[self.rank]:  # on another disk, or the one before, for a while, in a network file system
                raise ShortcutError(
                    f"process {rank} of {self.count} sees another {name} than the first process", SHARED
                )

    def _each(self, load: Callable[[], str]) -> list[str]:
        """Which checksum each process has found, or what goes wrong there, by rank; all processes call this.

        Raises what `load` raises, once it is said.
        """
        try:
            found = load()
        except CheckFailed as error:
            self._said(DAMAGED + error.message)
            raise
        except Exception as error:
            self._said(UNSEEN + str(error))
            raise
        return self._said(SEEN + found)

    def _said(self, text: str) -> list[str]:
        """What each process says, by rank; all processes call this."""
        own = text.encode()[:WORD_BYTES].ljust(WORD_BYTES, b"\0")
        words = [torch.empty(WORD_BYTES, dtype=torch.uint8) for _ in range(self.count)]
        dist.all_gather(words, torch.frombuffer(bytearray(own), dtype=torch.uint8))
        return [word.numpy().tobytes().rstrip(b"\0").decode(errors="replace") for word in words]

    def told(self, value: bool) -> bool:
        """The value that the leading process has, in all."""
        return bool(self._tell(int(value)))

    def _tell(self, word: int) -> int:
        """What the leading process tells all."""
        said = torch.tensor([word])
        if self.count > 1:
            dist.broadcast(said, 0)
        return int(said)

    def copied(self, content: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """The content of a resume.pt of the leading process, in all; None in that itself."""
        if self.count == 1:
            return None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "resume.pt"
            if self.leads:
                assert content is not None
                checkpoint.save(path, dict(content))
            size = torch.tensor([path.stat().st_size if self.leads else 0])
            dist.broadcast(size, 0)
            if self.leads:
                whole = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
            else:
                whole = torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(whole, 0)
            if self.leads:
                return None
            path.write_bytes(whole.numpy().tobytes())
            return checkpoint.load(path)

    def agreed(self, asked: Callable[[], int | None]) -> Callable[[], int | None]:
        """`asked`, for all processes: what it returned in any of them one step before, or None.

        So all stop at the same step, and none waits: the numbers travel while the next step is computed.
        """
        if self.count == 1:
            return asked
        sent: list[tuple[Any, Tensor]] = []

        def both() -> int | None:
            code = None
            if sent:
                work, told = sent.pop()
                work.wait()
                code = int(told) or None
            told = torch.tensor([asked() or 0])
            sent.append((dist.all_reduce(told, dist.ReduceOp.MAX, self.group, async_op=True), told))
            return code

        return both

    def at(self, step: int) -> None:
        """Let the others know at which step this process is."""
        if self.board:
            self.board.set(_place(self.rank), str(step))

    def begun(self) -> bool:
        """Whether processes that were started before these, and failed, have begun the run anew."""
        return bool(self.board and self.board.check([torchrun.BEGUN]))

    def begin(self) -> None:
        """Let those that may be started after these know that the run has begun."""
        if self.board:
            self.board.set(torchrun.BEGUN, "")

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Raises Lost if another process stops answering while this block waits for it, Left if its error is shown."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not _is_silence(error):
                raise
            if self.board and _in_time(lambda: self.board.check([_place(FAILS)])):
                raise Left("another process failed") from error
            first = str(error).splitlines()[0][:SHOWN]
            raise Lost(f"{self._behind()} ({first})", "run the same command again to resume") from error

    def _behind(self) -> str:
        """Which processes are silent: those that took fewer steps, or have not noticed that others are silent."""
        steps: dict[int, int] = {}
        noticed: set[int] = {self.rank}
        _in_time(lambda: self._ask(steps, noticed))
        if len(steps) < self.count:
            return "a process of the training does not answer"
        least = min(steps.values())
        late = [str(rank) for rank, step in steps.items() if step == least and rank not in noticed]
        if not late:
            return f"a process of the training does not answer at step {least + 1}"
        return f"process {', '.join(late)} of {self.count} does not answer at step {least + 1}"

    def _ask(self, steps: dict[int, int], noticed: set[int]) -> None:
        """Read from the board at which step each process is, and who else has noticed that one is silent.

        Those that wait for the same one notice it within moments, so the others are given some.
        """
        if self.board:
            self.board.set_timeout(timedelta(seconds=PATIENCE_S))
            self.board.set(_notice(self.rank), "")
            time.sleep(PATIENCE_S / 2)
            noticed |= {rank for rank in range(self.count) if self.board.check([_notice(rank)])}
            for rank in range(self.count):
                steps[rank] = int(self.board.get(_place(rank)))


ALONE = Processes()


@contextmanager
def joined(device: str, timeout_s: float, logs: bool = False) -> Iterator[Processes]:
    """The processes that torchrun has started; one by itself if it has not.

    timeout_s: how long one waits for another, once all have started. logs: each has a log of its own. Raises Lost if
    that is over, or another one has gone, UsageError if there are more of them than GPUs.
    """
    if not torchrun.promised():
        yield ALONE
        return
    cuda = device.startswith("cuda")
    if cuda:
        here, there = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > there:
            raise UsageError(f"{here} processes on this machine, which has {there} GPUs", "one process for each GPU")
        torch.cuda.set_device(device)
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with Processes(rank, count).answering():
        patience = timedelta(seconds=max(START_S, timeout_s))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=patience)
        group = dist.new_group(timeout=timedelta(seconds=timeout_s))
        processes = Processes(rank, count, group, _board(), timeout_s=timeout_s, logs=logs)
    with processes.answering():
        try:
            yield processes
        except Interrupted:  # all are
            _part_ways()
            raise
        except Exception as error:
            if not isinstance(error, Lost | Left) and not _is_silence(error):
                is_first(FAILS)  # before the others find this one gone
            if isinstance(error, ShortcutError):
                dist.destroy_process_group()
            raise
        _part_ways()


def _part_ways() -> None:
    """Wait for all, so that none finds the others gone."""
    dist.barrier()
    dist.destroy_process_group()


def _board() -> Any:
    """A connection of its own to the store through which the processes have found each other."""
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)  # type: ignore[attr-defined]


def is_first(what: str) -> bool:
    """Whether this process is the first to say how it ends, so that it is the one that says it to the user.

    what: FAILS, or LOSES if it ends because another one is gone. True too if the board does not answer.
    """
    own = os.environ["RANK"]
    return _in_time(lambda: _board().compare_set(_place(what), "", own).decode()) in (None, own)


def _in_time(ask: Callable[[], Result]) -> Result | None:
    """What the board answers; None if it is gone, or after PATIENCE_S.

    In a thread, since a store at the other end of a cut cable is waited for beyond all its timeouts.
    """
    found: list[Result] = []

    def asked() -> None:
        with suppress(RuntimeError, ValueError):
            found.append(ask())

    asking = threading.Thread(target=asked, daemon=True)
    asking.start()
    asking.join(PATIENCE_S)
    return found[0] if found else None


def _is_silence(error: Exception) -> bool:
    """Whether PyTorch raises this because another process has gone, or is silent for too long."""
    first = next(iter(str(error).splitlines()), "")
    return isinstance(error, RuntimeError) and bool(SILENT.search(first))


def _place(of: int | str) -> str:
    """Where on the board the process of a rank says at which step it is, or the first one how it ends."""
    return f"shortcut/{torchrun.attempt()}/{of}"


def _notice(rank: int) -> str:
    """Where on the board a process says that it has waited in vain for another."""
    return f"{_place(rank)}/noticed"
