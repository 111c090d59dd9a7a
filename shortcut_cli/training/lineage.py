"""Runs that begin with the weights of another checkpoint, and how they name it: `lineage` in run.pt.

init_from       SHA-256 of the checkpoint; it binds the run, as its recipe and its shards do
ancestors       SHA-256 of the checkpoints that this one began with in turn, the nearest first
step, model, shards, tokenizer      of that checkpoint: its architecture, and the checksums of its data
taken, initialised, unused          names of the weights that were taken, were not there, and had no place
differs         keys of [model] with other values there, as "key: there -> here": weights of equal shape may be used
                otherwise by this model
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shortcut_cli import files, registry
from shortcut_cli.config import writing
from shortcut_cli.errors import UsageError
from shortcut_cli.models.transformer import Decoder
from shortcut_cli.training import checkpoint, sharded, tensor_file

LISTED = 20  # names in a line for the user


@dataclass(frozen=True)
class Ancestor:
    """A checkpoint whose weights a run begins with."""

    path: Path
    sha256: str
    content: dict[str, Any]

    @torch.no_grad()
    def give(self, model: Decoder) -> dict[str, Any]:
        """Copy its weights into those of a model that have the same name and shape; returns the lineage of the model.

        Raises UsageError if there are none.
        """
        found, state = self.content["model"], model.state_dict()
        # Weights that are tied have one name here: their first, that of the embedding.
        own = {name: weight for name, weight in (*model.named_parameters(), *model.named_buffers()) if name in state}
        taken = [name for name, weight in own.items() if name in found and found[name].shape == weight.shape]
        if not taken:
            raise UsageError(
                f"no weight of {self.path} has the name and shape of one of this model",
                f"its model has other keys: {', '.join(self._differences(model))}",
            )
        for name in taken:
            sharded.local(own[name]).copy_(sharded.local(sharded.part(found[name], own[name])))
        used = {found[name].data_ptr() for name in taken}  # a tied weight is used under either name
        unused = [name for name, weight in found.items() if name not in taken and weight.data_ptr() not in used]
        before = self.content.get("lineage") or {}
        ancestors = [before["init_from"], *before["ancestors"]] if before else []
        return {
            "init_from": self.sha256,
            "ancestors": ancestors[: checkpoint.MOST_ANCESTORS],
            "step": self.content["step"],
            "model": self.content["recipe"]["model"]["name"],
            "shards": self.content["shards"],
            "tokenizer": self.content["tokenizer"]["fingerprint"],
            "taken": taken,
            "initialised": [name for name in own if name not in taken],
            "unused": unused[: tensor_file.MOST_LISTED],
            "differs": [line[: tensor_file.SHOWN] for line in self._differences(model)[: tensor_file.MOST_LISTED]],
        }

    def _differences(self, model: Decoder) -> list[str]:
        """Keys of [model] that both recipes have with different values; not those of other architectures' tables."""
        own, before = model.config.model_dump(), self.content["recipe"]["model"]
        sections = {registry.OPTIONS_OF.get(name, name) for name in (own["name"], before["name"])}
        shared = [key for key in own if key in before and (not isinstance(own[key], dict) or key in sections)]
        return writing.differences({key: before[key] for key in shared}, {key: own[key] for key in shared})


def read(path: Path) -> Ancestor:
    """Read the checkpoint that a run is to begin with.

    Raises what `checkpoint.load` raises, and UsageError if the file is replaced meanwhile, as by a training.
    """
    tensor_file.recognise(path, "run.pt")
    before = path.stat()
    ancestor = Ancestor(path, files.sha256(path), checkpoint.load(path))
    after = path.stat()
    if (before.st_ino, before.st_mtime_ns, before.st_size) != (after.st_ino, after.st_mtime_ns, after.st_size):
        raise UsageError(f"{path} was replaced while it was read", "copy it, or wait until its training has ended")
    return ancestor


def told(lineage: dict[str, Any], tokenizer: str) -> str:
    """Lineage in words, a line each. tokenizer: fingerprint of that of the new run."""
    taken, initialised, unused = (lineage[key] for key in ("taken", "initialised", "unused"))
    lines = [
        f"begins with {lineage['init_from'][:12]}, step {lineage['step']:,}: "
        f"{len(taken)} of {len(taken) + len(initialised)} weights are taken"
    ]
    lines += [f"  initialised: {_listed(initialised)}"] if initialised else []
    lines += [f"  not used: {_listed(unused)}"] if unused else []
    lines += [f"  its model has other keys: {_listed(lineage['differs'])}"] if lineage["differs"] else []
    if lineage["tokenizer"] != tokenizer:
        lines.append(
            f"  its tokenizer is {lineage['tokenizer'][:12]}, that of these shards {tokenizer[:12]}: "
            "its embedding was trained for other tokens"
        )
    return "\n".join(lines)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED:,} more, which `inspect` lists" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
