"""A control: the shortcut model with its maps and as many keys, but every tap reads the layer right below the last.

What a shortcut gains over this, it gains by reading across layers, and not by having more parameters.
"""

from torch import Tensor

from shortcut_cli.models.shortcut import Shortcut


class ShortcutLocal(Shortcut):
    """`shortcut` with [model.shortcut]'s keys, without its cross-layer reads."""

    def sources(self, states: list[Tensor]) -> list[Tensor]:
        """The state that the last layer reads, once for each tap."""
        return [states[-1]] * len(self.tapped)

    def _labels(self) -> tuple[str, ...]:
        return tuple(name.replace("layer", "map of layer") for name in super()._labels())
