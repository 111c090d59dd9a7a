"""The baseline: a pre-norm decoder with rotary positions, as the layers in blocks.py are."""

from shortcut_cli.models.blocks import Decoder
from shortcut_cli.recipe import Keys


class GPT(Decoder):
    """A GPT-like decoder, whose every layer reads the one below."""

    class Options(Keys):
        """The baseline has no keys of its own."""
