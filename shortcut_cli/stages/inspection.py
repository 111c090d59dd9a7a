"""Inspect: describe a shards folder, a checkpoint, a codec or a recipe, and check that it is complete.

PyTorch is imported only for checkpoints and codecs.
"""

import shlex
from pathlib import Path
from typing import Any

from shortcut_cli import files
from shortcut_cli.config import reading
from shortcut_cli.data import shards
from shortcut_cli.errors import CheckFailed, UsageError
from shortcut_cli.kept import scores
from shortcut_cli.training import conditions, tensor_file

# Whose folders are unfinished without one of the files that are looked for here; those of samples never have one.
RESULT_LACKS = ("shortcut train", "shortcut codec train", "shortcut compare")


def inspect(path: Path, *, verify: bool) -> dict[str, Any]:
    """Describe a path; a run folder is its run.pt or codec.pt.

    verify: also compare every byte of a shards folder with its checksums, as is always done when a .pt file is read.

    Raises UsageError if the path is none of these kinds or has nothing to verify, CheckFailed if something is missing
    or damaged.
    """
    if path.is_dir():
        results = [path / name for name in ("run.pt", "codec.pt") if (path / name).is_file()]
        if results:
            return _weights(results[0])
        if (path / "compare.json").is_file():
            raise UsageError(f"{path} is a comparison", then=f"shortcut report {shlex.quote(str(path))}")
        if not (path / shards.MANIFEST).is_file() and files.owner(path) in RESULT_LACKS:
            files.refuse_unfinished(path)
        return _shards(path, verify)
    if path.suffix == ".toml":
        if verify:
            raise UsageError(
                f"{path} is a recipe, which has no checksum", then=f"shortcut recipes check {shlex.quote(str(path))}"
            )
        return {"kind": "recipe", "path": str(path)} | reading.read_any(str(path)).model_dump()
    if path.suffix == ".pt":
        return _weights(path)
    state = "is neither a shards folder nor a .pt or .toml file" if path.exists() else "does not exist"
    if str(path) in reading.names():
        raise UsageError(f"{path} {state}; a recipe has that name", then=f"shortcut recipes show {path}")
    raise UsageError(f"{path} {state}", "give a shards folder, a run folder, a .pt file or a .toml file")


def _weights(path: Path) -> dict[str, Any]:
    tensor_file.recognise(path, "run.pt")
    from shortcut_cli.codec import checkpoint as codec_checkpoint

    return _codec(path) if codec_checkpoint.is_codec(path) else _checkpoint(path)


def _shards(folder: Path, verify: bool) -> dict[str, Any]:
    manifest = shards.read_manifest(folder)
    opened = shards.Shards(folder)
    for name in shards.SPLITS:
        opened.split(name)
    if verify:
        problems = list(shards.verify(folder))
        if problems:
            raise CheckFailed(f"{folder} is not as it was written\n" + "\n".join(f"  {line}" for line in problems))
    kept = {key: value for key, value in manifest.items() if key not in ("files", "request")}
    return {"kind": "shards", "path": str(folder), "verified": verify, **kept}


def _codec(path: Path) -> dict[str, Any]:
    from shortcut_cli.codec import checkpoint as codec_checkpoint

    codec, content = codec_checkpoint.load(path), codec_checkpoint.read(path)
    return {
        "kind": "codec",
        "path": str(path),
        "verified": True,  # or it could not have been read
        "network": content["recipe"]["codec"]["network"],
        "codebooks": codec.codebooks,
        "parameters": sum(tensor.numel() for tensor in content["weights"].values()),
        "step": content["step"],
        "scores": content["scores"],
        "versions": content["versions"],
        "conditions": conditions.parts(content.get("conditions")),
        "recipe": content["recipe"],
    }


def _test_scores(path: Path) -> dict[str, Any]:
    """What `eval` has found for a run.pt, by split, or why that can't be read: the checkpoint is none the worse."""
    try:
        return dict(scores.listed(path.parent, files.sha256(path)))
    except CheckFailed as error:
        return {"unreadable": error.message}


def _checkpoint(path: Path) -> dict[str, Any]:
    from shortcut_cli.inference import runs

    run = runs.open_run(path, "cpu")
    context = run.recipe.model.context
    return {
        "kind": "checkpoint",
        "path": str(path),
        "verified": True,  # or it could not have been read
        "model": run.recipe.model.name,
        "parameters": run.model.count(),
        "forward_flops_per_token": run.model.flops(context) // context,
        "cache_bytes_per_token": run.model.cache_bytes_per_token(),
        "step": run.content["step"],
        "scores": run.content["scores"] | _test_scores(path),
        "tokenizer": run.content["tokenizer"]["fingerprint"],
        "shards": run.content["shards"],
        "versions": run.content["versions"],
        "conditions": conditions.parts(run.content.get("conditions")),
        "lineage": run.content.get("lineage", {}),
        "recipe": run.recipe.model_dump(),
    }


def check_recipes(paths: list[str]) -> list[dict[str, Any]]:
    """Validate recipes; returns an entry for each, whose "problem" is empty if it is valid."""
    found = []
    for path in paths:
        try:
            reading.read_any(path)
            problem = ""
        except UsageError as error:
            problem = error.message
        found.append({"recipe": path, "problem": problem})
    return found
