"""The options of each architecture, [model.NAME], in their own file so that reading a recipe loads no torch."""

import re
from typing import Literal

from pydantic import Field, field_validator

from shortcut_cli.config.schema import MOST_FFN, MOST_LAYERS, MOST_WIDTH, Config

TAPS_FORM = re.compile(r"paper|all|none|every:[1-9]\d*|\d+(,\d+)*")


class ShortcutOptions(Config):
    """[model.shortcut]"""

    taps: str = Field(
        "paper",
        description="tapped layers: paper (2, 4, 6 ... without the last two), all, every:K, none, or a list such as "
        '"2,4,6,8"; 0 is the embedding',
    )
    map: Literal["mlp", "linear", "identity"] = Field("mlp", description="what each tap goes through, after a norm")
    map_width: int = Field(1024, description="neurons of the mlp map", ge=1, le=MOST_FFN)
    map_norm: bool = Field(
        True,
        description="an RMS norm after each map; without it, and with init gpt2, the last layer's attention starts "
        "almost at nothing",
    )
    share_map: bool = Field(False, description="one map for all taps")
    concat: Literal["time", "feature"] = Field(
        "time", description="time: one key per tap and time, in one softmax; feature: taps side by side in one key"
    )
    mode: Literal["replace", "add", "gated"] = Field(
        "replace",
        description="replace: taps instead of the last layer's own keys (the paper); add: both in one softmax; gated: "
        "own attention plus a gate, zero at first, times attention to the taps",
    )
    project: Literal["shared", "per_tap"] = Field(
        "shared", description="keys and values: one projection, or one per tap"
    )
    depth_embedding: bool = Field(False, description="add a learned vector to the features of each tap")
    attention: Literal["auto", "mask", "merge"] = Field(
        "auto",
        description="mask: one attention with a mask; merge: one causal attention per tap, merged; equal results; "
        "auto: merge on CUDA, whose flash attention takes no mask, mask elsewhere",
    )

    @field_validator("taps")
    @classmethod
    def _known_form(cls, taps: str) -> str:
        if not TAPS_FORM.fullmatch(taps):
            raise ValueError('is none of paper, all, none, every:K, or a list such as "2,4,6,8"')
        return taps


class ConvOptions(Config):
    """[model.conv]"""

    kernel: int = Field(7, description="tokens that the convolution reads, its own included", ge=2, le=1024)
    groups: int = Field(
        1,
        description="blocks of the block-diagonal matrices of the feed-forward; 1: full matrices",
        ge=1,
        le=MOST_WIDTH,
    )


class LateKVOptions(Config):
    """[model.late_kv]"""

    layer: int = Field(
        0,
        description="layer whose state gives the last layer its keys and values; 0: the one in the middle",
        ge=0,
        le=MOST_LAYERS,
    )


class ValueResidualOptions(Config):
    """[model.value_residual]"""

    gate: Literal["scalar", "token"] = Field(
        "scalar", description="scalar: two learned numbers per layer; token: a weight per token and head"
    )


class DenseFormerOptions(Config):
    """[model.denseformer]"""

    dilation: int = Field(
        1, description="a mix reads every dilation-th state, counted back from its own", ge=1, le=MOST_LAYERS
    )
    period: int = Field(1, description="only every period-th layer is followed by a mix", ge=1, le=MOST_LAYERS)


class AttnResOptions(Config):
    """[model.attnres]"""

    variant: Literal["full", "block", "delta"] = Field(
        "full", description="sources: full: every sublayer; block: sums of groups; delta: added to the residual sum"
    )
    blocks: int = Field(8, description="block: groups of sublayers", ge=1, le=2 * MOST_LAYERS)


class DepthAttentionOptions(Config):
    """[model.depth_attention]"""

    values: Literal["raw", "mixed"] = Field(
        "mixed",
        description="what a layer mixes of those below: mixed: their mixed values (the authors' code); raw: their own",
    )


class MoDAOptions(Config):
    """[model.moda]"""

    feed_forward: bool = Field(
        False, description="each feed-forward leaves a key and a value for the layers above too, by a projection"
    )


class HyperOptions(Config):
    """[model.hyper]"""

    streams: int = Field(4, description="residual streams", ge=1, le=16)
    weights: Literal["static", "dynamic"] = Field(
        "dynamic", description="static: learned; dynamic: learned and token-dependent"
    )
