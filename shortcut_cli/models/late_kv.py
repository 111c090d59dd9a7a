"""A control: the last layer takes keys and values from one earlier layer, by its own projections, without any map.

The cheapest reading of a shortcut: no more parameters than the baseline but the norm of the tap. Compare the record of
2026-03-06 of modded-nanogpt, in which late attention reads the state of one layer in the middle.
"""

from shortcut_cli.models.options import ShortcutOptions
from shortcut_cli.models.shortcut import Shortcut
from shortcut_cli.recipe import ModelKeys


class LateKV(Shortcut):
    """`shortcut` with one tap, no map, and keys and values of it alone."""

    def options_of(self, keys: ModelKeys) -> ShortcutOptions:
        """One tap."""
        layer = keys.late_kv.layer or max(1, keys.layers // 2)  # type: ignore[attr-defined]
        return ShortcutOptions(taps=str(layer), map="identity", mode="replace")  # type: ignore[call-arg]
