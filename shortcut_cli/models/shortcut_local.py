"""A control: the shortcut model, maps and number of keys included, but every tap reads the layer just below the last.

What a shortcut gains over this, it gains by reading across layers, not by having more parameters.
"""

from torch import Tensor

from shortcut_cli.models.shortcut import Shortcut


class ShortcutLocal(Shortcut):
    """`shortcut`, with the options of [model.shortcut], without its cross-layer reads."""

    def sources(self, states: list[Tensor]) -> list[Tensor]:
        """The state that the last layer reads, once per tap."""
        return [states[-1]] * len(self.tapped)

    def _labels(self) -> tuple[str, ...]:
        return tuple(name.replace("layer", "map of layer") for name in super()._labels())
