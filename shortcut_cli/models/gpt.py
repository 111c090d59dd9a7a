"""The baseline: the pre-norm decoder with rotary positions of transformer.py, as it is."""

from shortcut_cli.models.transformer import Decoder


class GPT(Decoder):
    """A GPT-like decoder: every layer reads the one below."""
