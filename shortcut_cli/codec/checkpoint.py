"""codec.pt, the result of `shortcut codec train`: weights in half precision, and the recipe of their network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shortcut_cli.codec import encodec, vocos
from shortcut_cli.codec.layout import CODES
from shortcut_cli.config import reading
from shortcut_cli.config.schema import CodecConfig, CodecRecipe
from shortcut_cli.errors import CheckFailed, UsageError
from shortcut_cli.training import tensor_file

FORMAT = 1
KIND = "codec"
FIELDS = {"format": int, "kind": str, "recipe": dict, "weights": dict, "step": int, "scores": dict, "versions": dict}
TRAINING_ONLY = ("embed_avg", "cluster_size")  # buffers of the quantizer, by name ending, that codec.pt leaves out


class Seanet(nn.Module):
    """EnCodec's encoder and decoder around a quantizer, over whole clips."""

    def __init__(self, dimension: int, filters: int, quantizer: Any) -> None:
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


Network = Seanet | vocos.Network


def network(config: CodecConfig, seed: int = 0) -> Network:
    """The network that a recipe describes, its weights drawn from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        quantizer = encodec.quantizer(config.dimension, config.codebooks, CODES, config.codebook_decay)
        if config.network == "seanet":
            return Seanet(config.dimension, config.seanet.filters, quantizer)
        return vocos.Network(config.dimension, config.frame, quantizer)


def save(
    path: Path,
    made: CodecRecipe,
    weights: dict[str, Tensor],
    *,
    step: int,
    scores: dict[str, float],
    conditions: Sequence[dict[str, Any]] = (),
) -> None:
    """Write a codec.pt. conditions: those of each part of its training."""
    kept = {name: tensor.half() for name, tensor in weights.items() if not name.endswith(TRAINING_ONLY)}
    content = {"format": FORMAT, "kind": KIND, "recipe": made.model_dump(), "weights": kept}
    content |= {"step": step, "scores": scores, "versions": tensor_file.versions(), "conditions": [*conditions]}
    tensor_file.save(path, content)


def read(path: Path) -> dict[str, Any]:
    """The content of a codec.pt, read with its checksum verified and without running code.

    Raises UsageError if the file is not a codec.pt, CheckFailed if it is damaged or has another format.
    """
    content = tensor_file.load(path, "codec.pt")
    if not isinstance(content, dict) or not content.keys() >= FIELDS.keys() or content["kind"] != KIND:
        raise CheckFailed(f"{path} is a PyTorch file, but not a codec.pt")
    tensor_file.check_format(path, content["format"], FORMAT)
    kinds = all(isinstance(content[name], kind) for name, kind in FIELDS.items())
    if not (
        kinds
        and tensor_file.are_shown(content)
        and tensor_file.is_recipe(content["recipe"], "codec", "network")
        and tensor_file.are_tensors(content["weights"], "float16")
    ):
        raise CheckFailed(f"{path} is not a codec.pt: its fields have the wrong types")
    return content


def is_codec(path: Path) -> bool:
    """Whether a file that `tensor_file.save` wrote is a codec.pt. Raises what `tensor_file.load` raises."""
    content = tensor_file.load(path, "run.pt")
    return isinstance(content, dict) and content.get("kind") == KIND


def load(path: Path) -> encodec.Codec | vocos.Codec:
    """The codec in a codec.pt, ready to encode and decode streams.

    Raises what `read` raises, and CheckFailed if recipe and weights do not match.
    """
    content = read(path)
    try:
        config = reading.validate_codec(content["recipe"], str(path)).codec
    except UsageError as error:
        raise CheckFailed(tensor_file.shortened(error.message), error.hint) from error
    blocks = config.frame.encoder_blocks + config.frame.decoder_blocks if config.network == "frame" else 0
    blocks += config.codebooks
    tensor_file.check_shapes(path, content["weights"], lambda: network(config), blocks, unsaved=TRAINING_ONLY)
    found = network(config)
    found.load_state_dict({name: tensor.float() for name, tensor in content["weights"].items()}, strict=False)
    return encodec.Codec(found) if isinstance(found, Seanet) else vocos.Codec(found)
