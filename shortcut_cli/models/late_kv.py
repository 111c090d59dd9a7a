"""A control: the last layer takes keys and values from one earlier layer, by its own projections, without a map.

The cheapest form of a shortcut: its only parameters beyond the baseline's are the norm of the tap. Compare
modded-nanogpt, record of 2026-03-06, in which late attention reads the state of one layer in the middle.
"""

from shortcut_cli.config.schema import ModelConfig
from shortcut_cli.errors import UsageError
from shortcut_cli.models.options import ShortcutOptions
from shortcut_cli.models.shortcut import Shortcut


class LateKV(Shortcut):
    """`shortcut` with one tap and no map; keys and values come only from the tap."""

    def options_of(self, config: ModelConfig) -> ShortcutOptions:
        """One tap. Raises UsageError if it is not below the last layer."""
        layer = config.late_kv.layer or max(1, config.layers // 2)  # type: ignore[attr-defined]
        if layer >= config.layers:
            raise UsageError(
                f"model.late_kv.layer names layer {layer}, which is not below the last layer, {config.layers}"
            )
        return ShortcutOptions(taps=str(layer), map="identity", mode="replace")
