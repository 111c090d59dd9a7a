"""The schema of a recipe.

A recipe is a TOML file with the sections [data] [tokenizer] [model] [train] [eval] [sample]. The options of a tokenizer
are in [tokenizer], those of an architecture in [model.NAME]. Both are declared by the classes that the registry names,
so a new one needs no change here.
"""

import bisect
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator, model_validator

from shortcut_cli import registry

UNIONS = (Union, UnionType)
# Which keys, or whole sections, do not determine the weights of a run; all others do, and bind it: a new key too. What
# [data] and [tokenizer] do to the weights, they do through the shards, whose checksum binds a run. How often and on how
# many windows to validate is not here: it decides which weights run.pt keeps.
FREE = frozenset(
    {
        *("data", "tokenizer", "eval", "sample", "train.log_every", "train.tensorboard", "train.keep"),
        *("train.timeout_s", "train.shard", "train.checkpoint_activations"),
    }
)
# Which files are in which split binds the run of a codec by itself.
CODEC_FREE = frozenset({"data.speaker", "data.val", "data.file_timeout_s", "data.file_memory_mb"}) | {
    "train.log_every",
    "train.tensorboard",
}
# Keys that came later, and whose value 0 asks for nothing: a recipe without them is equal to one that has it.
UNASKED = frozenset({("train", "threads"), ("train", "schedule_steps")})


class Config(BaseModel):
    """A section of a recipe: no unknown keys, no silent conversions, no changes after reading.

    Every number is finite, and every integer has at most 63 bits, so that NumPy and PyTorch can hold it. Most numbers
    have an upper bound too. It is far above what anybody trains: it is there to name a slip of the finger before the
    machine runs out of memory.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _fits_63_bits(cls, value: Any) -> Any:
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) >= 2**63:
                raise ValueError("is an integer of more than 63 bits")
        return value


MOST_COUNT = 10**9  # steps, windows, tokens of a sample
MOST_BATCH = 2**20
MOST_LAYERS = 512
MOST_WIDTH = 65_536
MOST_CONTEXT = 2**24
MOST_FFN = 2**20
MOST_RATE = 1000.0  # of learning, and weights of losses
MOST_SAMPLES = 10**6
MOST_THREADS = 1024
SEED = 2**63  # seeds are below it
COLDEST = 1e-6  # the lowest temperature but 0: logits divided by it stay far from the largest float


FileTimeout = Annotated[
    float, Field(description="a file that takes more than this many seconds is rejected", gt=0, le=MOST_COUNT)
]
FileMemory = Annotated[
    int,
    Field(
        description="a file that takes more than this many MB of memory, libraries included, is rejected (on Linux)",
        ge=1024,
        le=2**30,
    ),
]


class SplitsConfig(Config):
    """[data.splits]: the splits that come with a corpus; empty if it has none."""

    train: list[str] = Field([], description="names, folders or globs of the files of the training split")
    val: list[str] = Field([], description="the same for the validation split")
    test: list[str] = Field([], description="the same for the test split")
    table: str = Field(
        "", description="a .csv or .tsv with a column `split` and one with the paths of the files, such as MAESTRO's"
    )

    def __bool__(self) -> bool:
        return bool(self.train or self.val or self.test or self.table)


def _nearest(value: int, valid: Iterable[int], name: str) -> str:
    """The valid values of a key next to a wrong one, below and above it: "width 96 or 108"; empty if there are none."""
    values = sorted(valid)
    place = bisect.bisect(values, value)
    near = [str(each) for each in values[max(0, place - 1) : place + 1]]
    return f"{name} {' or '.join(near)}" if near else ""


class DataConfig(Config):
    """[data]: the shards folder, and how documents are split."""

    shards: str = Field(description="shards folder, relative to the working directory", min_length=1)
    split: Literal["documents", "contiguous", "given"] = Field(
        "documents",
        description="documents: whole documents, by the hash of their content; contiguous: the first part is train, "
        "then val, then test (also used if there are fewer than three different documents); given: as data.splits "
        "says (also used in place of documents if data.splits says anything)",
    )
    val: float = Field(0.05, description="share of the validation split", gt=0, lt=0.5)
    test: float = Field(0.05, description="share of the test split", gt=0, lt=0.5)
    duplicates: Literal["drop", "keep"] = Field(
        "drop",
        description="of equal documents: drop all but the first (with data.splits, the one in test, else in val), or "
        "keep them; equal files are one in any case",
    )
    shard_tokens: int = Field(
        2**28, description="most tokens per shard file, unless a single document has more", ge=1024, le=2**40
    )
    file_timeout_s: FileTimeout = 7200
    file_memory_mb: FileMemory = 4096
    splits: SplitsConfig = Field(default_factory=SplitsConfig, description="splits that come with the corpus")

    @model_validator(mode="after")
    def _splits_fit(self) -> "DataConfig":
        if self.split == "contiguous" and self.splits:
            raise ValueError("split 'contiguous' takes no splits, but splits names some")
        if self.split == "given" and not self.splits:
            raise ValueError("split 'given' needs splits: train, val and test, or table")
        return self


class ModelConfig(Config):
    """[model]: the keys that all architectures share; those of one architecture are in [model.NAME]."""

    name: str = Field(description="architecture: " + ", ".join(registry.MODELS))
    layers: int = Field(description="decoder layers, including the last one", ge=1, le=MOST_LAYERS)
    width: int = Field(description="width of the residual stream", ge=2, le=MOST_WIDTH)
    heads: int = Field(description="attention heads; width / heads must be even", ge=1, le=MOST_WIDTH)
    context: int = Field(description="context length, in tokens", ge=2, le=MOST_CONTEXT)
    ffn: int = Field(description="inner width of the feed-forward layers", ge=1, le=MOST_FFN)
    activation: Literal["gelu", "swiglu", "relu2"] = Field(
        "gelu", description="activation function of the feed-forward layers"
    )
    qk_norm: bool = Field(
        True, description="divide each head's queries and keys by their root mean square, after rotation"
    )
    init: Literal["fan_in", "gpt2"] = Field(
        "fan_in",
        description="initial matrices, by their standard deviation; fan_in: inputs^-1/2, 1 in an embedding "
        "that is not tied, and 0 for what writes to the residual stream; "
        "gpt2: 0.02, divided by sqrt(2 layers) for what writes to it",
    )
    tied: bool = Field(False, description="share the weights of the embedding with the output head")
    dropout: float = Field(0.0, description="dropout rate of embeddings and of the output of each sublayer", ge=0, lt=1)
    rope_base: float = Field(10000.0, description="base of the RoPE frequencies", gt=1, le=1e12)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ModelConfig":
        if self.width % (2 * self.heads):
            widths = _nearest(self.width, range(2 * self.heads, MOST_WIDTH + 1, 2 * self.heads), "width")
            heads = _nearest(
                self.heads, (n for n in range(1, self.width // 2 + 1) if self.width % (2 * n) == 0), "heads"
            )
            valid = ", or ".join(filter(None, (widths, heads)))
            raise ValueError(f"width {self.width} is not a multiple of twice heads {self.heads}: take {valid}")
        return self

    @model_validator(mode="after")
    def _known_name(self) -> "ModelConfig":
        if self.name not in registry.MODELS:
            raise ValueError(f"unknown architecture {self.name!r}. {registry.did_you_mean(self.name, registry.MODELS)}")
        return self


def _min_lr(default: float) -> Any:
    return Field(default, description="final learning rate, as a share of lr", ge=0, le=1)


def _schedule(default: str) -> Any:
    return Field(default, description="after warm-up: cosine; wsd (stable, then linear decay); or constant")


def _decay(default: float) -> Any:
    text = "wsd: share of the steps spent in the decay, after the warm-up at most"
    return Field(default, description=text, gt=0, le=1)


class ScheduleConfig(Config):
    """The keys of [train] that models and codecs share: AdamW, its schedule, and how often to validate."""

    steps: int = Field(description="optimizer steps", ge=1, le=MOST_COUNT)
    batch_size: int = Field(description="windows per step", ge=1, le=MOST_BATCH)
    lr: float = Field(
        description="peak learning rate; with muon and fan_in one did best at three widths (docs/experiments.md)",
        gt=0,
        le=MOST_RATE,
    )
    min_lr: float = _min_lr(0.1)
    warmup: int = Field(100, description="steps of linear warm-up", ge=0, le=MOST_COUNT)
    schedule: Literal["cosine", "wsd", "constant"] = _schedule("cosine")
    decay: float = _decay(0.2)
    schedule_steps: int = Field(
        0,
        description="steps that the schedule takes; its last learning rate holds from there on, as after `--extend` "
        "with cosine; 0: train.steps",
        ge=0,
        le=MOST_COUNT,
    )
    weight_decay: float = Field(0.1, description="weight decay, on matrices only", ge=0, le=MOST_RATE)
    beta1: float = Field(0.9, description="beta1 of AdamW", ge=0, lt=1)
    beta2: float = Field(0.95, description="beta2 of AdamW", ge=0, lt=1)
    clip: float = Field(1.0, description="largest norm of the gradient; 0: no clipping", ge=0, le=1e9)
    ema: float = Field(
        0.0, description="decay of the EMA of the weights, which is then validated and saved; 0: no EMA", ge=0, lt=1
    )
    seed: int = Field(1, description="seed of initial weights, window order and dropout", ge=0, lt=SEED)
    log_every: int = Field(10, description="steps between lines of log.jsonl", ge=1, le=MOST_COUNT)
    eval_every: int = Field(250, description="steps between validations, each followed by a save", ge=1, le=MOST_COUNT)
    eval_windows: int = Field(
        64, description="windows of the validation split that are scored during training", ge=1, le=MOST_COUNT
    )
    tensorboard: bool = Field(False, description="also write TensorBoard events (needs the extra `tensorboard`)")
    threads: int = Field(
        0,
        description="CPU threads to compute with, on which the last bits of the weights depend; 0: as many as the "
        "machine has",
        ge=0,
        le=MOST_THREADS,
    )


def kept(keep: str) -> tuple[bool, int]:
    """What train.keep asks for beside run.pt: whether last.pt, and how many steps apart step-N.pt, 0 for none.

    Raises ValueError if it names anything else, a part twice, or not `best`.
    """
    parts = [part.strip() for part in keep.split(",")]
    spaced = [part.removeprefix("every:") for part in parts if part.startswith("every:")]
    rest = sorted(part for part in parts if not part.startswith("every:"))
    if rest not in (["best"], ["best", "last"]) or len(spaced) > 1:
        raise ValueError('is not best, with last and every:N if wanted: "best, last, every:1000"')
    apart = spaced[0] if spaced else "0"
    if not (apart.isascii() and apart.isdecimal() and len(apart) <= len(str(MOST_COUNT))):
        raise ValueError(f"every:{apart[:20]} names no number of steps")
    if spaced and not 1 <= int(apart) <= MOST_COUNT:
        raise ValueError(f"every:{apart} is not from 1 to {MOST_COUNT:,}")
    return "last" in rest, int(apart)


class TrainConfig(ScheduleConfig):
    """[train]: the optimizer, its schedule, and how often to validate.

    The defaults of the schedule are what the recipes have; docs/experiments.md says what was tried.
    """

    min_lr: float = _min_lr(0.0)
    schedule: Literal["cosine", "wsd", "constant"] = _schedule("wsd")
    decay: float = _decay(1.0)
    optimizer: Literal["muon", "adamw"] = Field(
        "muon",
        description="muon: Muon for the matrices of the layers, AdamW for the rest; adamw: AdamW for all weights",
    )
    matrix_lr: float = Field(2.5, description="muon: learning rate of matrices, as a multiple of lr", gt=0, le=1e6)
    momentum: float = Field(0.9, description="muon: momentum", ge=0, lt=1)
    momentum_warmup: int = Field(
        200, description="muon: steps in which the momentum rises linearly from 0.85", ge=0, le=MOST_COUNT
    )
    accumulation: int = Field(
        1,
        description="gradient accumulation: parts that a step's windows are divided into, to save memory",
        ge=1,
        le=MOST_BATCH,
    )
    router_lr: float = Field(
        1.0,
        description="learning rate of gates, routers and static mixes over depth, as a multiple of lr",
        gt=0,
        le=1e6,
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="of products; weights, norms, softmax and loss are fp32. auto: bf16 on CUDA and on CPUs with "
        "instructions for it (AVX512-BF16, AMX), fp32 elsewhere. What was chosen is kept with the run: it is evaluated "
        "in it too",
    )
    compile: Literal["auto", True, False] = Field(
        "auto",
        description="torch.compile the model: true, false, or auto: from 2,000 steps on, on one GPU for which this "
        "machine can compile",
    )
    deterministic: bool = Field(
        False, description="use only deterministic kernels, so that CUDA runs repeat bit for bit"
    )
    keep: str = Field(
        "best",
        description="checkpoints to keep, with commas: best (run.pt, the lowest validation loss; always), last "
        "(last.pt, the newest validation's weights), every:N (step-N.pt, step-2N.pt ...)",
    )
    shard: Literal["none", "fsdp"] = Field(
        "none",
        description="of several processes, what each keeps of the weights and of the optimizer: none: all of it; fsdp: "
        "its part, for models that would not fit (FSDP2)",
    )
    checkpoint_activations: bool = Field(
        False, description="keep only the inputs of layers for the gradient, and compute the rest again: less memory"
    )
    timeout_s: float = Field(
        600.0, description="of several processes: how long one waits for another, seconds", gt=0, le=MOST_COUNT
    )

    @field_validator("compile", mode="before")
    @classmethod
    def _no_number_compiles(cls, wanted: object) -> object:
        if wanted != "auto" and not isinstance(wanted, bool):
            raise ValueError("Input should be 'auto', true or false")
        return wanted

    @field_validator("keep")
    @classmethod
    def _keep_is_known(cls, keep: str) -> str:
        kept(keep)
        return keep

    @model_validator(mode="after")
    def _parts_divide_batch(self) -> "TrainConfig":
        if self.batch_size % self.accumulation:
            parts = _nearest(
                self.accumulation,
                (n for n in range(1, self.batch_size + 1) if self.batch_size % n == 0),
                "accumulation",
            )
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}: take {parts}"
            )
        return self


class EvalConfig(Config):
    """[eval]: how a split is scored."""

    split: registry.ScoredSplit = Field("test", description="split to score")
    stride: int = Field(
        description="tokens scored per window; the rest of the context is only read", ge=1, le=MOST_CONTEXT
    )
    batch_size: int = Field(16, description="windows per batch", ge=1, le=MOST_BATCH)
    resamples: int = Field(1000, description="bootstrap resamples for the confidence intervals", ge=1, le=MOST_SAMPLES)


class SampleConfig(Config):
    """[sample]: how the model is sampled."""

    n: int = Field(4, description="number of samples", ge=1, le=MOST_SAMPLES)
    tokens: int = Field(description="most new tokens per sample", ge=1, le=MOST_COUNT)
    temperature: float = Field(1.0, description="softmax temperature, 1e-6 to 1e6; 0 is greedy", ge=0, le=1e6)
    top_k: int = Field(0, description="sample from the k most probable tokens; 0: all", ge=0, le=MOST_COUNT)
    top_p: float = Field(
        1.0, description="sample from the fewest tokens that together have this probability; 1: all", ge=COLDEST, le=1
    )
    min_p: float = Field(
        0.0, description="drop tokens below this share of the largest probability; 0: none", ge=0, lt=1
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="bf16: weights are rounded to bf16, and products computed in it; faster on a CPU with AVX512-BF16 "
        "or AMX, and on a GPU",
    )
    seed: int = Field(1, description="seed of the sampler", ge=0, lt=SEED)

    @field_validator("temperature")
    @classmethod
    def _divides(cls, temperature: float) -> float:
        if 0 < temperature < COLDEST:
            raise ValueError(f"is neither 0 (greedy) nor at least {COLDEST:g}")
        return temperature


class Recipe(Config):
    """A whole recipe. `schema()` fills in the registered tokenizers and architectures."""

    data: DataConfig
    tokenizer: Any
    model: Any
    train: TrainConfig
    eval: EvalConfig
    sample: SampleConfig

    @model_validator(mode="after")
    def _stride_within_context(self) -> "Recipe":
        if self.eval.stride > self.model.context:
            raise ValueError(
                f"eval.stride {self.eval.stride} is larger than model.context {self.model.context}: "
                f"take at most {self.model.context}"
            )
        return self


class CodecDataConfig(Config):
    """[data] of a codec: training windows, and which files belong together."""

    speaker: str = Field(
        "",
        description="regular expression; files whose paths have the same first match go into the same split, for "
        "example those of one speaker; empty: each file by itself",
    )
    val: float = Field(0.1, description="share of the validation split", gt=0, lt=0.5)
    segment_s: float = Field(1.0, description="length of a training window, in seconds", ge=0.2, le=60)
    speed: float = Field(
        0.0,
        description="random change of speed, pitch included: up to this share faster or slower",
        ge=0,
        lt=0.5,
    )
    gain_db: float = Field(0.0, description="random gain of up to this many dB, up or down", ge=0, le=40)
    mix: float = Field(0.0, description="share of the windows that another window is added to", ge=0, le=1)
    file_timeout_s: FileTimeout = 7200
    file_memory_mb: FileMemory = 4096

    @model_validator(mode="after")
    def _speaker_is_an_expression(self) -> "CodecDataConfig":
        try:
            re.compile(self.speaker)
        except re.error as error:
            raise ValueError(f"data.speaker is not a regular expression: {error}") from error
        return self


class FrameConfig(Config):
    """[codec.frame]: STFT and ConvNeXt blocks at frame rate."""

    width: int = Field(160, description="width of the blocks", ge=8, le=MOST_WIDTH)
    encoder_blocks: int = Field(6, description="ConvNeXt blocks before the quantizer", ge=1, le=MOST_LAYERS)
    decoder_blocks: int = Field(8, description="ConvNeXt blocks after the quantizer", ge=1, le=MOST_LAYERS)
    expansion: int = Field(4, description="inner width of a block, as a multiple of its width", ge=1, le=64)
    kernel: int = Field(7, description="kernel size of a block's convolution, in frames", ge=2, le=1024)


class SeanetConfig(Config):
    """[codec.seanet]: EnCodec's own encoder and decoder."""

    filters: int = Field(32, description="filters of the outermost convolution", ge=2, le=4096)


class CodecConfig(Config):
    """[codec]: the network and its codebooks, of 1,024 codes each."""

    network: Literal["frame", "seanet"] = Field(
        "frame", description="frame: STFT and ConvNeXt blocks at frame rate; seanet: EnCodec's own encoder and decoder"
    )
    codebooks: int = Field(8, description="residual codebooks of 1,024 codes, 0.75 kbit/s each", ge=1, le=32)
    dimension: int = Field(64, description="dimension of the embedding that is quantized", ge=2, le=MOST_WIDTH)
    codebook_decay: float = Field(0.99, description="decay of the running means that the codes follow", gt=0, lt=1)
    frame: FrameConfig = Field(default_factory=FrameConfig, description="keys of the network frame")
    seanet: SeanetConfig = Field(default_factory=SeanetConfig, description="keys of the network seanet")


class CodecTrainConfig(ScheduleConfig):
    """[train] of a codec: the optimizer, its schedule, and the weight of each loss."""

    mel: float = Field(
        1.0, description="weight of the distance between log-mel spectra, at four window lengths", ge=0, le=MOST_RATE
    )
    wave: float = Field(
        0.1,
        description="weight of the mean absolute difference of samples, relative to the window's loudness",
        ge=0,
        le=MOST_RATE,
    )
    commitment: float = Field(
        1.0, description="weight of the distance between embeddings and their codes", ge=0, le=MOST_RATE
    )
    adversarial_from: int = Field(
        0,
        description="step from which EnCodec's discriminator and loss balancer are used; 0: never",
        ge=0,
        le=MOST_COUNT,
    )
    adversarial: float = Field(3.0, description="weight of the adversarial loss", ge=0, le=MOST_RATE)
    features: float = Field(
        3.0, description="weight of the feature-matching loss of the discriminator", ge=0, le=MOST_RATE
    )
    discriminator_filters: int = Field(32, description="filters of the discriminator", ge=1, le=4096)
    discriminator_lr: float = Field(
        3e-4, description="peak learning rate of the discriminator, on the same schedule", gt=0, le=MOST_RATE
    )


class CodecRecipe(Config):
    """A recipe for `shortcut codec train`."""

    data: CodecDataConfig
    codec: CodecConfig
    train: CodecTrainConfig


AnyRecipe = TypeVar("AnyRecipe", Recipe, CodecRecipe)


@cache
def schema() -> type[Recipe]:
    """`Recipe` with the options of every registered tokenizer and architecture."""
    tokenizers = [registry.load(registry.TOKENIZERS, name).Options for name in registry.TOKENIZERS]
    union: Any = tokenizers[0]
    for options in tokenizers[1:]:
        union = union | options
    architectures: dict[str, Any] = {}
    for name in registry.MODEL_OPTIONS:
        options = registry.load(registry.MODEL_OPTIONS, name)
        architectures[name] = (options, Field(default_factory=options, description=f"keys of {name}"))
    model = create_model("Model", __base__=ModelConfig, **architectures)
    tokenizer: Any = Annotated[union, Field(discriminator="name")]
    return create_model("Recipe", __base__=Recipe, tokenizer=(tokenizer, ...), model=(model, ...))


def binding(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a recipe, or of a codec recipe, that determines the weights of a run: all but FREE or CODEC_FREE.

    Of the tables [model.NAME], and [codec.NAME], only the one that the architecture or network reads is part of it.
    Keys of UNASKED that are 0 are left out, since recipes that were written before there were such keys lack them.
    """
    if "codec" in recipe:
        free, options = CODEC_FREE, recipe["codec"]["network"]
    else:
        name = recipe["model"]["name"]
        free, options = FREE, registry.OPTIONS_OF.get(name, name)
    return {
        section: {
            key: value
            for key, value in table.items()
            if f"{section}.{key}" not in free
            and (key == options or not isinstance(value, Mapping))
            and ((section, key) not in UNASKED or value)
        }
        for section, table in recipe.items()
        if section not in free
    }


def keys(tokenizers: Iterable[str] = registry.TOKENIZERS) -> dict[str, str]:
    """Every key that a recipe can have, dotted, with its description. tokenizers: the names of those to include."""
    sections = schema().model_fields
    names = ("data", "model", "train", "eval", "sample")
    found = {key: text for name in names for key, text in _section_keys(f"{name}.", sections[name].annotation)}
    for name in tokenizers:
        for key, text in _section_keys("tokenizer.", registry.load(registry.TOKENIZERS, name).Options):
            found.setdefault(key, text)
    return found


def codec_keys() -> dict[str, str]:
    """Every key that a codec recipe can have, dotted, with its description."""
    return dict(_section_keys("", CodecRecipe))


def known_keys(kind: type[BaseModel], tree: Mapping[str, Any]) -> dict[str, str]:
    """The keys that a recipe of a kind can have, if it is not valid yet: those of all tokenizers if it names none."""
    if kind is CodecRecipe:
        return codec_keys()
    section = tree.get("tokenizer")
    name = section.get("name") if isinstance(section, Mapping) else None
    return keys([name] if name in registry.TOKENIZERS else registry.TOKENIZERS)


def is_text(kind: type[BaseModel], key: str) -> bool:
    """Whether a dotted key of a recipe holds text, in every tokenizer that has it; False if there is no such key."""
    types: list[Any] = [kind]
    for part in key.split("."):
        types = [found for each in types for found in _members(each, part)]
    return bool(types) and all(_is_text(each) for each in types)


def choices(kind: Any, key: str) -> list[str]:
    """The values that a dotted key of a section can have, as --set takes them, if they are few; else none."""
    types: list[Any] = [kind]
    for part in key.split("."):
        types = [found for each in types for found in _members(each, part)]
    return [value for each in types for value in _few(each)]


def _few(kind: Any) -> list[str]:
    if kind is bool:
        return ["true", "false"]
    values = get_args(kind) if get_origin(kind) is Literal else ()
    return [str(value).lower() if isinstance(value, bool) else value for value in values]


def _members(holder: Any, name: str) -> list[Any]:
    """The types that a key can have within a section, a table with free keys, or one of several sections."""
    if isinstance(holder, type) and issubclass(holder, BaseModel):
        field = holder.model_fields.get(name)
        return [field.annotation] if field else []
    arguments = get_args(holder)
    if get_origin(holder) is dict:
        return [arguments[1]]
    return [found for each in arguments for found in _members(each, name)] if get_origin(holder) in UNIONS else []


def _is_text(kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return all(isinstance(value, str) for value in get_args(kind))
    if get_origin(kind) in UNIONS:
        return all(each is NoneType or _is_text(each) for each in get_args(kind))
    return kind is str


def _section_keys(prefix: str, section: Any) -> Iterator[tuple[str, str]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _section_keys(f"{prefix}{name}.", field.annotation)
        else:
            yield prefix + name, field.description or ""
