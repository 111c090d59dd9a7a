"""A control: the last layer takes keys and values from one earlier layer, by its own projections, without any map.

The cheapest reading of a shortcut: no more parameters than the baseline but the norm of the tap. Compare the record of
2026-03-06 of modded-nanogpt, in which late attention reads the state of one layer in the middle.
"""

from pydantic import Field

from shortcut_cli.models.shortcut import Shortcut, ShortcutOptions
from shortcut_cli.recipe import Keys, ModelKeys


class LateKVOptions(Keys):
    """[model.late_kv]"""

    layer: int = Field(
        0, description="whose state the last layer's keys and values come from; 0: that in the middle", ge=0
    )


class LateKV(Shortcut):
    """`shortcut` with one tap, no map, and keys and values of it alone."""

    Options = LateKVOptions

    def options_of(self, keys: ModelKeys) -> ShortcutOptions:
        """One tap."""
        layer = keys.late_kv.layer or max(1, keys.layers // 2)  # type: ignore[attr-defined]
        return ShortcutOptions(taps=str(layer), map="identity", mode="replace")  # type: ignore[call-arg]
