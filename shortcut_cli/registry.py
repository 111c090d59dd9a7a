"""The names that recipes know: name -> "module:Class", imported when first asked for."""

import importlib
from difflib import get_close_matches
from typing import Any

from shortcut_cli.errors import UsageError

TOKENIZERS = {
    "audio": "shortcut_cli.tokenizers.audio:AudioTokenizer",
    "midi": "shortcut_cli.tokenizers.midi:MidiTokenizer",
    "text": "shortcut_cli.tokenizers.text:TextTokenizer",
}

MODELS = {
    "gpt": "shortcut_cli.models.gpt:GPT",
    "shortcut": "shortcut_cli.models.shortcut:Shortcut",
    "shortcut_gated": "shortcut_cli.models.shortcut_gated:ShortcutGated",
    "shortcut_local": "shortcut_cli.models.shortcut_local:ShortcutLocal",
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

MODEL_OPTIONS = {  # of the architectures that have keys of their own
    "shortcut": "shortcut_cli.models.options:ShortcutOptions",
    "late_kv": "shortcut_cli.models.options:LateKVOptions",
    "value_residual": "shortcut_cli.models.options:ValueResidualOptions",
    "denseformer": "shortcut_cli.models.options:DenseFormerOptions",
    "attnres": "shortcut_cli.models.options:AttnResOptions",
    "hyper": "shortcut_cli.models.options:HyperOptions",
}


def did_you_mean(name: str, known: list[str]) -> str:
    """A sentence that proposes the nearest of `known`, or lists them all."""
    near = get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else "Known: " + ", ".join(sorted(known)) + "."


def load(table: dict[str, str], name: str) -> Any:
    """Import and return the class that `name` stands for.

    Raises UsageError where the table has no such name.
    """
    if name not in table:
        raise UsageError(f"unknown name {name!r}", did_you_mean(name, list(table)))
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
