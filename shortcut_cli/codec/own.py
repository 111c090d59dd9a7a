"""Codecs that `shortcut codec train` makes: their networks, and codec.pt.

codec.pt holds the weights in half precision and the recipe, which says how to build the network around them.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shortcut_cli import recipe, sealed
from shortcut_cli.codec import encodec, frame
from shortcut_cli.codec.stream import CODES
from shortcut_cli.errors import CheckFailed
from shortcut_cli.recipe import CodecKeys, CodecRecipe

FORMAT = 1
KIND = "codec"
FIELDS = {"format": int, "kind": str, "recipe": dict, "weights": dict, "step": int, "scores": dict, "versions": dict}
TRAINING_ONLY = ("embed_avg", "cluster_size")  # what the quantizer needs to learn alone


class Seanet(nn.Module):
    """EnCodec's encoder and decoder around a quantizer, over whole clips."""

    def __init__(self, dimension: int, filters: int, quantizer: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encodec.seanet(dimension, filters)
        self.quantizer = quantizer

    def encode(self, x: Tensor) -> Tensor:
        """Samples (B, N) -> embeddings (B, D, T), T = N / HOP rounded up."""
        z: Tensor = self.encoder(x[:, None])
        return z

    def decode(self, z: Tensor) -> Tensor:
        """Embeddings (B, D, T) -> samples (B, T HOP)."""
        x: Tensor = self.decoder(z)[:, 0]
        return x


def network(keys: CodecKeys, seed: int = 0) -> Any:
    """The network that a recipe describes, its weights drawn from a seed; over whole clips."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        quantizer = encodec.quantizer(keys.dimension, keys.codebooks, CODES, keys.codebook_decay)
        if keys.network == "seanet":
            return Seanet(keys.dimension, keys.seanet.filters, quantizer)
        return frame.Network(keys.dimension, keys.frame, quantizer)


def save(path: Path, made: CodecRecipe, weights: dict[str, Tensor], *, step: int, scores: dict[str, float]) -> None:
    """Write a codec.pt."""
    kept = {name: tensor.half() for name, tensor in weights.items() if not name.endswith(TRAINING_ONLY)}
    content = {"format": FORMAT, "kind": KIND, "recipe": made.model_dump(), "weights": kept}
    sealed.save(path, content | {"step": step, "scores": scores, "versions": sealed.versions()})


def read(path: Path) -> dict[str, Any]:
    """The content of a codec.pt, every byte checked, without running any code that it may hold.

    Raises UsageError where the file is none, CheckFailed where it is damaged, or from a later version.
    """
    content = sealed.load(path, "codec.pt")
    if not isinstance(content, dict) or not content.keys() >= FIELDS.keys() or content["kind"] != KIND:
        raise CheckFailed(f"{path} is a PyTorch file, but not a codec.pt")
    if content["format"] != FORMAT:
        raise CheckFailed(f"{path} has format {content['format']!r}; this version reads {FORMAT}", "update shortcut")
    kinds = all(isinstance(content[name], kind) for name, kind in FIELDS.items())
    if not (kinds and sealed.are_tensors(content["weights"], torch.float16)):
        raise CheckFailed(f"{path} is not a codec.pt: its fields are of other types")
    return content


def is_codec(path: Path) -> bool:
    """Whether a file of ours is a codec.pt. Raises what `sealed.load` raises."""
    content = sealed.load(path, "run.pt")
    return isinstance(content, dict) and content.get("kind") == KIND


def load(path: Path) -> Any:
    """The codec of a codec.pt, ready to encode and decode streams.

    Raises what `read` raises, and CheckFailed where recipe and weights do not belong together.
    """
    content = read(path)
    keys = recipe.validate_codec(content["recipe"], str(path)).codec
    with torch.device("meta"):  # shapes alone, so that no recipe can ask for more memory than its weights take
        expected = _shapes(network(keys).state_dict())
    changes = recipe.differences(expected, _shapes(content["weights"]))
    if changes:
        raise CheckFailed(f"{path}: the weights are not those of its recipe\n" + "\n".join(changes[:5]))
    return ready(network(keys), content["weights"], keys)


def ready(empty: Any, weights: dict[str, Tensor], keys: CodecKeys) -> Any:
    """A network with the weights of a codec.pt, as a codec."""
    empty.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=False)
    return encodec.Codec(empty) if keys.network == "seanet" else frame.Codec(empty)


def _shapes(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items() if not name.endswith(TRAINING_ONLY)}
