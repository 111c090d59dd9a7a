"""The keys of each architecture, [model.NAME]; in a file apart, so that reading a recipe loads no torch."""

import re
from typing import Literal

from pydantic import Field, field_validator

from shortcut_cli.recipe import Keys

TAPS_FORM = re.compile(r"paper|all|none|every:[1-9]\d*|\d+(,\d+)*")


class ShortcutOptions(Keys):
    """[model.shortcut]"""

    taps: str = Field(
        "paper",
        description="layers that are tapped: paper (2, 4, 6 ... but the last two), all, every:K, none, or a list as "
        '"2,4,6,8"; 0 is the embedding',
    )
    map: Literal["mlp", "linear", "identity"] = Field("mlp", description="what each tap goes through, after a norm")
    map_width: int = Field(1024, description="neurons of the mlp map", ge=1)
    share_map: bool = Field(False, description="one map for all taps")
    concat: Literal["time", "feature"] = Field(
        "time", description="time: a key for each tap and time, in one softmax; feature: taps side by side in one key"
    )
    mode: Literal["replace", "add", "gated"] = Field(
        "replace",
        description="replace: taps instead of the last layer's own keys (the paper); add: both in one softmax; gated: "
        "own attention plus a gate, zero at first, times attention to the taps",
    )
    project: Literal["shared", "per_tap"] = Field("shared", description="keys and values: one projection, or one a tap")
    depth_embedding: bool = Field(False, description="add a learned vector to the features of each tap")
    attention: Literal["mask", "merge"] = Field(
        "mask", description="mask: one attention with a mask; merge: one causal attention a tap, merged; equal results"
    )

    @field_validator("taps")
    @classmethod
    def _known_form(cls, taps: str) -> str:
        if not TAPS_FORM.fullmatch(taps):
            raise ValueError('is none of paper, all, none, every:K, or a list as "2,4,6,8"')
        return taps


class LateKVOptions(Keys):
    """[model.late_kv]"""

    layer: int = Field(
        0, description="whose state the last layer's keys and values come from; 0: that in the middle", ge=0
    )


class ValueResidualOptions(Keys):
    """[model.value_residual]"""

    gate: Literal["scalar", "token"] = Field(
        "scalar", description="scalar: two learned numbers a layer; token: a weight for each token and head"
    )


class DenseFormerOptions(Keys):
    """[model.denseformer]"""

    dilation: int = Field(1, description="a mix reads every dilation-th state below, its own first", ge=1)
    period: int = Field(1, description="only every period-th layer is followed by a mix", ge=1)


class AttnResOptions(Keys):
    """[model.attnres]"""

    variant: Literal["full", "block", "delta"] = Field(
        "full", description="sources: full: every sublayer; block: sums of groups; delta: added to the residual sum"
    )
    blocks: int = Field(8, description="block: groups of sublayers", ge=1)


class HyperOptions(Keys):
    """[model.hyper]"""

    streams: int = Field(4, description="residual streams", ge=1, le=16)
    weights: Literal["static", "dynamic"] = Field("dynamic", description="static: learned; dynamic: by the token too")
