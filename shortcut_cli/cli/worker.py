"""One run of a comparison, in a process of its own: train, score, and write down what it cost.

`shortcut compare` starts it as `python -m shortcut_cli.cli.worker RECIPE FOLDER DEVICE NUMBER [PIPE]`, with the number
of an open file in which it is told how far the run is, see `compare.watching`. PIPE is the number of one that is open
for as long as the process that started this one lives: without it this one ends too.
"""

import os
import resource
import sys
import threading
from pathlib import Path

from shortcut_cli import files
from shortcut_cli.cli import console
from shortcut_cli.cli.signals import guarded, signals
from shortcut_cli.compare.watching import Teller
from shortcut_cli.errors import Diverged
from shortcut_cli.events import Note
from shortcut_cli.formatting import to_json


def run(planned: str, folder: Path, device: str, teller: Teller | None = None) -> None:
    """Do what `shortcut train` does and write cost.json; then do what `shortcut eval` does, without floors.

    cost.json has the peak memory of training, in MB, or None if another process did the training. Of a run that
    diverges, its folder says so, and that is all: the others of the comparison go on.
    """
    # After `signals.install`, since it takes seconds.
    from shortcut_cli.compare.runner import cost_of, keep_divergence
    from shortcut_cli.config import reading
    from shortcut_cli.stages import training
    from shortcut_cli.stages.pipeline import score

    with console.Reporter(teller=teller) as report:
        resolved = reading.read(planned)
        shards = files.place(resolved.data.shards)
        try:
            trained = training.train(resolved, folder, device=device, resume="auto", report=report, stop=signals)
        except Diverged as error:
            keep_divergence(folder, resolved, error)
            report(Note(text=error.message))
            return
        checkpoint = folder / "run.pt"
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000 if trained["worked"] else None
        inputs = {"checkpoint_sha256": files.sha256(checkpoint)}
        if trained["worked"] or cost_of(folder, inputs) is None:
            cost = {"peak_mb": peak_mb, "device": device, "inputs": inputs}
            files.write(folder / "cost.json", to_json(cost) + "\n")
        score(checkpoint, shards, None, resolved.eval, device=device, report=report, with_floors=False)


def end_with(pipe: int) -> None:
    """End this process once nobody has the other end of a pipe any more."""
    os.read(pipe, 1)
    os._exit(1)


if __name__ == "__main__":
    if len(sys.argv) > 5:
        threading.Thread(target=end_with, args=(int(sys.argv[5]),), daemon=True).start()
    guarded(lambda: run(sys.argv[1], Path(sys.argv[2]), sys.argv[3], Teller(int(sys.argv[4]))))
