"""One run of a comparison, in a process of its own: train, score, and write down what it cost.

`shortcut compare` starts it as `python -m shortcut_cli.cli.worker RECIPE FOLDER DEVICE`.
"""

import json
import resource
import sys
from pathlib import Path

from shortcut_cli import files
from shortcut_cli.cli import console
from shortcut_cli.cli.signals import guarded, signals
from shortcut_cli.config import reading
from shortcut_cli.stages import training
from shortcut_cli.stages.pipeline import score


def run(planned: str, folder: Path, device: str) -> None:
    """Do what `shortcut train` and then `shortcut eval` do; then write cost.json, which marks the run as finished.

    The peak memory in it is that of training, in MB.
    """
    with console.Reporter() as report:
        resolved = reading.read(planned)
        training.train(resolved, folder, device=device, resume="auto", report=report, stop=signals)
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        score(folder / "run.pt", None, None, device=device, report=report)
    files.write(folder / "cost.json", json.dumps({"peak_mb": peak_mb, "device": device}) + "\n")


if __name__ == "__main__":
    guarded(lambda: run(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
