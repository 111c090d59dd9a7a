"""One cell of a comparison: trained, scored, and what that took noted, in a process of its own.

`shortcut compare` runs it, as `python -m shortcut_cli.cell RECIPE FOLDER DEVICE`.
"""

import json
import resource
import sys
from pathlib import Path

from shortcut_cli import cli, console, files, recipe
from shortcut_cli.pipeline import score
from shortcut_cli.stages import training


def run(planned: str, folder: Path, device: str) -> None:
    """What `shortcut train` and then `shortcut eval` do, without a second start; then cost.json, which says it is done.

    The peak memory is that of training.
    """
    with console.Reporter() as report:
        resolved = recipe.read(planned)
        training.train(resolved, folder, device=device, resume="auto", report=report, stop=cli.signals)
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        score(folder / "run.pt", None, None, device=device, report=report)
    files.write(folder / "cost.json", json.dumps({"peak_mb": peak_mb, "device": device}) + "\n")


if __name__ == "__main__":
    cli.guarded(lambda: run(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
