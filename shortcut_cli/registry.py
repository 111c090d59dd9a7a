"""The names that recipes and commands know, and the classes behind them, "module:Class", imported at first use."""

import importlib
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, Literal, get_args

from shortcut_cli.errors import UsageError

TOKENIZERS = {
    "audio": "shortcut_cli.tokenizers.audio:AudioTokenizer",
    "midi": "shortcut_cli.tokenizers.midi:MidiTokenizer",
    "text": "shortcut_cli.tokenizers.text:TextTokenizer",
}

DEFAULT_RECIPES = {"audio": "audio", "midi": "music", "text": "text"}  # of `shortcut prepare`, by domain

MODELS = {
    "gpt": "shortcut_cli.models.gpt:GPT",
    "conv": "shortcut_cli.models.conv:Conv",
    "shortcut": "shortcut_cli.models.shortcut:Shortcut",
    "shortcut_gated": "shortcut_cli.models.shortcut_gated:ShortcutGated",
    "shortcut_local": "shortcut_cli.models.shortcut_local:ShortcutLocal",
    "shortcut_pool": "shortcut_cli.models.shortcut_pool:ShortcutPool",
    "x0": "shortcut_cli.models.x0:X0",
    "dense_last": "shortcut_cli.models.dense_last:DenseLast",
    "late_kv": "shortcut_cli.models.late_kv:LateKV",
    "value_residual": "shortcut_cli.models.value_residual:ValueResidual",
    "denseformer": "shortcut_cli.models.denseformer:DenseFormer",
    "attnres": "shortcut_cli.models.attnres:AttnRes",
    "depth_attention": "shortcut_cli.models.depth_attention:DepthAttention",
    "moda": "shortcut_cli.models.moda:MoDA",
    "mudd": "shortcut_cli.models.mudd:Mudd",
    "mudd_last": "shortcut_cli.models.mudd_last:MuddLast",
    "hyper": "shortcut_cli.models.hyper:Hyper",
}

MODEL_OPTIONS = {  # for the architectures that have their own recipe keys
    "conv": "shortcut_cli.models.options:ConvOptions",
    "shortcut": "shortcut_cli.models.options:ShortcutOptions",
    "late_kv": "shortcut_cli.models.options:LateKVOptions",
    "value_residual": "shortcut_cli.models.options:ValueResidualOptions",
    "denseformer": "shortcut_cli.models.options:DenseFormerOptions",
    "attnres": "shortcut_cli.models.options:AttnResOptions",
    "depth_attention": "shortcut_cli.models.options:DepthAttentionOptions",
    "moda": "shortcut_cli.models.options:MoDAOptions",
    "hyper": "shortcut_cli.models.options:HyperOptions",
}

# The architecture under whose name the recipe keys of another one are; one that is not here has those of its own name.
OPTIONS_OF = {"shortcut_local": "shortcut", "shortcut_pool": "shortcut"}

OFFICIAL_WEIGHTS = ("encodec_24khz", "encodec_48khz")  # EnCodec's published checkpoints

ScoredSplit = Literal["val", "test"]
AnySplit = Literal["train", "val", "test"]
SPLITS = get_args(AnySplit)

Match = Literal["none", "params", "flops", "time"]  # what a comparison keeps equal between an arm and its baselines


def did_you_mean(name: str, known: Iterable[str], listed: Iterable[str] | None = None) -> str:
    """A sentence that proposes the name in `known` nearest to `name`, or lists them all, or only those `listed`."""
    known = sorted(known)
    near = get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else "Known: " + ", ".join(sorted(listed or known)) + "."


def load(table: dict[str, str], name: str) -> Any:
    """Import and return the class that `table` names for `name`.

    Raises UsageError if the table has no such name.
    """
    if name not in table:
        kind = "domain" if table is TOKENIZERS else "architecture"
        raise UsageError(f"unknown {kind} {name!r}", did_you_mean(name, table))
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
