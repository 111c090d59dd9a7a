"""Recipes: their schema, reading them, and `--set key=value`.

A recipe is one flat TOML file with the sections [data] [tokenizer] [model] [train] [eval] [sample].
The keys of a tokenizer stand in [tokenizer], those of an architecture in [model.NAME]; both are declared
as `Options` by the class that the registry names, so that a new one needs no change here.
"""

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from shortcut_cli import registry
from shortcut_cli.errors import UsageError


class Keys(BaseModel):
    """A section of a recipe: no unknown key, no silent conversion, no change after reading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)


class DataKeys(Keys):
    """[data]: where the shards lie and how documents are divided."""

    shards: str = Field(description="folder of the shards, relative to where the command runs", min_length=1)
    split: Literal["documents", "contiguous"] = Field(
        "documents",
        description="documents: whole documents, by the hash of their content; contiguous: first part train, then val, "
        "then test (taken anyway where there are fewer than three different documents)",
    )
    val: float = Field(0.05, description="share of the validation split", gt=0, lt=0.5)
    test: float = Field(0.05, description="share of the test split", gt=0, lt=0.5)
    shard_tokens: int = Field(2**28, description="tokens in one shard file, at most", ge=1024)
    file_timeout_s: float = Field(7200, description="a file that takes longer than this is rejected, in seconds", gt=0)
    file_memory_mb: int = Field(
        4096,
        description="a file that takes more memory than this, libraries included, is rejected, in MB (on Linux)",
        ge=1024,
    )


class ModelKeys(Keys):
    """[model]: what all architectures share; the keys of one stand in [model.NAME]."""

    name: str = Field(description="architecture: " + ", ".join(registry.MODELS))
    layers: int = Field(description="decoder layers, the last one included", ge=1)
    width: int = Field(description="width of the residual stream", ge=2)
    heads: int = Field(description="attention heads; width / heads must be even", ge=1)
    context: int = Field(description="tokens that the model sees at once", ge=2)
    ffn: int = Field(description="inner width of the feed-forward layers", ge=1)
    activation: Literal["gelu", "swiglu"] = Field("gelu", description="of the feed-forward layers")
    tied: bool = Field(True, description="the output head shares the weights of the embedding")
    dropout: float = Field(0.0, description="on embeddings and on what each sublayer adds", ge=0, lt=1)
    rope_base: float = Field(10000.0, description="base of the rotary position frequencies", gt=1)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ModelKeys":
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} is not a multiple of twice heads {self.heads}")
        if self.name not in registry.MODELS:
            raise ValueError(f"unknown name {self.name!r}. {registry.did_you_mean(self.name, list(registry.MODELS))}")
        return self


class ScheduleKeys(Keys):
    """What every training has in [train]: AdamW, its schedule, and how often to look."""

    steps: int = Field(description="optimiser steps", ge=1)
    batch_size: int = Field(description="windows in a step", ge=1)
    lr: float = Field(description="peak learning rate", gt=0)
    min_lr: float = Field(0.1, description="final learning rate as a share of lr", ge=0, le=1)
    warmup: int = Field(100, description="steps of linear warm-up", ge=0)
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="after warm-up: cosine; wsd, stable and then linear decay; or constant"
    )
    decay: float = Field(0.2, description="wsd: share of the steps that the decay takes", gt=0, le=1)
    weight_decay: float = Field(0.1, description="on matrices only", ge=0)
    beta1: float = Field(0.9, description="AdamW", ge=0, lt=1)
    beta2: float = Field(0.95, description="AdamW", ge=0, lt=1)
    clip: float = Field(1.0, description="largest norm of the gradient; 0 switches clipping off", ge=0)
    ema: float = Field(
        0.0, description="decay of an average of the weights that is evaluated and kept; 0: off", ge=0, lt=1
    )
    seed: int = Field(1, description="of initial weights, order of windows and dropout", ge=0)
    log_every: int = Field(10, description="steps between two lines of log.jsonl", ge=1)
    eval_every: int = Field(250, description="steps between two validations and savings", ge=1)
    eval_windows: int = Field(64, description="windows of the validation split used during training", ge=1)
    tensorboard: bool = Field(False, description="write TensorBoard events too (needs the extra `tensorboard`)")


class TrainKeys(ScheduleKeys):
    """[train]: the optimiser, its schedule, and how often to look."""

    accumulation: int = Field(1, description="parts that a step's windows are divided into, to save memory", ge=1)
    router_lr: float = Field(
        1.0, description="learning rate of gates, routers and static mixes over depth, as a multiple of lr", gt=0
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 autocast on CUDA, fp32 elsewhere"
    )
    compile: bool = Field(False, description="torch.compile the model")
    deterministic: bool = Field(False, description="only deterministic kernels, so that CUDA runs repeat to the bit")

    @model_validator(mode="after")
    def _parts_divide_batch(self) -> "TrainKeys":
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}")
        return self


class EvalKeys(Keys):
    """[eval]: how a split is scored."""

    split: Literal["val", "test"] = Field("test", description="the split that is scored")
    stride: int = Field(description="tokens scored in a window; the rest of the context is only read", ge=1)
    batch_size: int = Field(16, description="windows at once", ge=1)
    resamples: int = Field(1000, description="bootstrap resamples of documents for the interval", ge=1)


class SampleKeys(Keys):
    """[sample]: how the model is sampled."""

    n: int = Field(4, description="samples", ge=1)
    tokens: int = Field(description="new tokens, at most", ge=1)
    temperature: float = Field(1.0, description="divides the logits; 0 takes the most probable token", ge=0)
    top_k: int = Field(0, description="only the k most probable tokens; 0: all", ge=0)
    top_p: float = Field(
        1.0, description="only the most probable tokens that together hold this probability", gt=0, le=1
    )
    min_p: float = Field(0.0, description="only tokens with this share of the largest probability", ge=0, lt=1)
    seed: int = Field(1, description="of the sampler", ge=0)


class Recipe(Keys):
    """A whole recipe. `schema()` is this class with the registered tokenizers and architectures filled in."""

    data: DataKeys
    tokenizer: Any
    model: Any
    train: TrainKeys
    eval: EvalKeys
    sample: SampleKeys

    @model_validator(mode="after")
    def _stride_within_context(self) -> "Recipe":
        if self.eval.stride > self.model.context:
            raise ValueError(f"eval.stride {self.eval.stride} is larger than model.context {self.model.context}")
        return self


class CodecDataKeys(Keys):
    """[data] of a codec: clips, and which of them belong together."""

    speaker: str = Field(
        "",
        description="regular expression; files whose path has the same first match come into the same split, as those "
        "of a speaker; empty: each file by itself",
    )
    val: float = Field(0.1, description="share of the validation split", gt=0, lt=0.5)
    segment_s: float = Field(1.0, description="length of a training window, in seconds", ge=0.2, le=60)
    speed: float = Field(
        0.0,
        description="windows are played at a random speed, pitch included, up to this share faster or slower",
        ge=0,
        lt=0.5,
    )
    gain_db: float = Field(0.0, description="windows get a random gain of up to this many dB, up or down", ge=0, le=40)
    mix: float = Field(0.0, description="share of the windows to which another one is added", ge=0, le=1)
    file_timeout_s: float = Field(7200, description="a file that takes longer than this is rejected, in seconds", gt=0)
    file_memory_mb: int = Field(
        4096, description="a file that takes more memory than this, libraries included, is rejected, in MB", ge=1024
    )

    @model_validator(mode="after")
    def _speaker_is_an_expression(self) -> "CodecDataKeys":
        try:
            re.compile(self.speaker)
        except re.error as error:
            raise ValueError(f"data.speaker is no regular expression: {error}") from error
        return self


class FrameKeys(Keys):
    """[codec.frame]: STFT and ConvNeXt blocks at frame rate."""

    width: int = Field(160, description="width of the blocks", ge=8)
    encoder_blocks: int = Field(6, description="ConvNeXt blocks before the quantizer", ge=1)
    decoder_blocks: int = Field(8, description="ConvNeXt blocks after it", ge=1)
    expansion: int = Field(4, description="inner width of a block, as a multiple of its width", ge=1)
    kernel: int = Field(7, description="frames that a block's convolution sees", ge=2)


class SeanetKeys(Keys):
    """[codec.seanet]: EnCodec's own encoder and decoder."""

    filters: int = Field(32, description="filters of the outermost convolution", ge=2)


class CodecKeys(Keys):
    """[codec]: the network and its codebooks, of 1,024 codes each."""

    network: Literal["frame", "seanet"] = Field(
        "frame", description="frame: STFT and ConvNeXt blocks at frame rate; seanet: EnCodec's own encoder and decoder"
    )
    codebooks: int = Field(8, description="residual codebooks of 1,024 codes, 0.75 kbit/s each", ge=1, le=32)
    dimension: int = Field(64, description="of the embedding that is quantized", ge=2)
    codebook_decay: float = Field(0.99, description="of the running means that the codes follow", gt=0, lt=1)
    frame: FrameKeys = Field(default_factory=FrameKeys, description="keys of the network frame alone")
    seanet: SeanetKeys = Field(default_factory=SeanetKeys, description="keys of the network seanet alone")


class CodecTrainKeys(ScheduleKeys):
    """[train] of a codec: the optimiser, and what each loss weighs."""

    mel: float = Field(1.0, description="weight of the distance of log-mel spectra at four window lengths", ge=0)
    wave: float = Field(
        0.1, description="weight of the mean absolute difference of samples, of windows of equal loudness", ge=0
    )
    commitment: float = Field(1.0, description="weight of the distance of embeddings from their codes", ge=0)
    adversarial_from: int = Field(
        0, description="step from which EnCodec's discriminator and loss balancer take part; 0: never", ge=0
    )
    adversarial: float = Field(3.0, description="weight of the adversarial loss", ge=0)
    features: float = Field(3.0, description="weight of the distance of the discriminator's features", ge=0)
    discriminator_filters: int = Field(32, description="filters of the discriminator", ge=1)
    discriminator_lr: float = Field(3e-4, description="learning rate of the discriminator, times the schedule", gt=0)


class CodecRecipe(Keys):
    """A recipe of `shortcut codec train`."""

    data: CodecDataKeys
    codec: CodecKeys
    train: CodecTrainKeys


AnyRecipe = TypeVar("AnyRecipe", Recipe, CodecRecipe)


@cache
def schema() -> type[Recipe]:
    """The class of all recipes, with the options of every registered tokenizer and architecture."""
    tokenizers = [registry.load(registry.TOKENIZERS, name).Options for name in registry.TOKENIZERS]
    union: Any = tokenizers[0]
    for options in tokenizers[1:]:
        union = union | options
    architectures: dict[str, Any] = {}
    for name in registry.MODEL_OPTIONS:
        options = registry.load(registry.MODEL_OPTIONS, name)
        architectures[name] = (options, Field(default_factory=options, description=f"keys of {name} alone"))
    model = create_model("Model", __base__=ModelKeys, **architectures)
    tokenizer: Any = Annotated[union, Field(discriminator="name")]
    return create_model("Recipe", __base__=Recipe, tokenizer=(tokenizer, ...), model=(model, ...))


def folder() -> Path:
    """The folder of the recipes that come with the program: inside the package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def names() -> list[str]:
    """The names of the recipes that come with the program."""
    return sorted(path.stem for path in folder().glob("*.toml"))


def find(name: str) -> Path:
    """The file that a `--recipe` argument means: a path, or the name of a recipe that comes with the program.

    Raises UsageError where there is none.
    """
    path = Path(name)
    if path.suffix == ".toml" or "/" in name:
        if not path.is_file():
            raise UsageError(
                f"recipe file {name} does not exist", "`shortcut recipes list` shows the ones that come with it"
            )
        return path
    if name not in names():
        raise UsageError(f"unknown recipe {name!r}", registry.did_you_mean(name, names()))
    return folder() / f"{name}.toml"


def read(name: str, settings: Iterable[str] = ()) -> Recipe:
    """Read recipe `name` (a name or a path), then apply `settings` ("train.steps=200"), then validate.

    Raises UsageError that names the file, the key, the value got and what would be right.
    """
    found = read_any(name, settings)
    if isinstance(found, CodecRecipe):
        raise UsageError(f"recipe {name} is one of a codec", f"shortcut codec train PATH... --recipe {name}")
    return found


def read_codec(name: str, settings: Iterable[str] = ()) -> CodecRecipe:
    """As `read`, for the recipe of a codec."""
    found = read_any(name, settings)
    if not isinstance(found, CodecRecipe):
        raise UsageError(
            f"recipe {name} is not one of a codec", f"shortcut train --recipe {name}, or a [codec] section"
        )
    return found


def read_any(name: str, settings: Iterable[str] = ()) -> Recipe | CodecRecipe:
    """As `read`, for a recipe of either kind: that of a codec has a section [codec]."""
    path = find(name)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UsageError(
            f"{path} can't be read as TOML: {error}", "`shortcut recipes show music` is a whole one"
        ) from error
    for setting in settings:
        _apply(tree, setting)
    return validate_codec(tree, str(path)) if "codec" in tree else validate(tree, str(path))


def run_folder(name: str, recipe: Recipe) -> Path:
    """Where a run of the recipe of that name goes unless told otherwise: runs/RECIPE/MODEL-sSEED."""
    return Path("runs") / Path(name).stem / f"{recipe.model.name}-s{recipe.train.seed}"


def validate(tree: Mapping[str, Any], where: str) -> Recipe:
    """Check a recipe that was read from `where`, and return it.

    Raises UsageError with one line for each wrong key.
    """
    return _checked(schema(), tree, where)


def validate_codec(tree: Mapping[str, Any], where: str) -> CodecRecipe:
    """As `validate`, for the recipe of a codec."""
    return _checked(CodecRecipe, tree, where)


def _checked(kind: type[AnyRecipe], tree: Mapping[str, Any], where: str) -> AnyRecipe:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise UsageError(f"{where} is not a valid recipe\n" + "\n".join(lines), _near(error, kind)) from error


def with_settings(recipe: Recipe, settings: Iterable[str], where: str = "--set") -> Recipe:
    """A copy of `recipe` with `settings` applied and checked again."""
    tree = recipe.model_dump()
    for setting in settings:
        _apply(tree, setting)
    return validate(tree, where)


def _apply(tree: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise UsageError(f"--set {setting} is not SECTION.KEY=VALUE", "for example --set train.steps=200")
    table = tree
    for part in parts[:-1]:
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            raise UsageError(f"--set {setting}: {part} is a key, not a section")
        table = inner
    table[parts[-1]] = _value(text)


def _value(text: str) -> Any:
    """A TOML value where the text is one, else the text itself (so that names and paths need no quotes)."""
    try:
        parsed = tomllib.loads(f"x = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["x"] if len(parsed) == 1 else text


def _key(location: tuple[int | str, ...]) -> str:
    # Pydantic puts the tag of the tokenizer union into the location: (tokenizer, midi, bpe) is the key tokenizer.bpe.
    parts = [str(part) for part in location]
    if len(parts) > 1 and parts[0] == "tokenizer" and parts[1] in registry.TOKENIZERS:
        del parts[1]
    return ".".join(parts) or "recipe"


def _explain(problem: Any) -> str:
    key = _key(problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"  {key}: no such key"
    if problem["type"] == "missing":
        return f"  {key}: is missing"
    text = problem["msg"].removeprefix("Value error, ")
    got = problem["input"]
    return f"  {key}: {text}" + ("" if isinstance(got, (dict, BaseModel)) else f", got {got!r}")


def _near(error: ValidationError, kind: type[Recipe] | type[CodecRecipe]) -> str:
    """The hint for the first unknown key: its nearest relatives among all keys."""
    for problem in error.errors():
        if problem["type"] == "extra_forbidden":
            known = codec_keys() if kind is CodecRecipe else keys()
            return registry.did_you_mean(_key(problem["loc"]), list(known))
    return "`shortcut recipes show music` is a whole recipe; docs/recipes.md lists every key"


def keys() -> dict[str, str]:
    """Every key that a recipe can have, dotted, with its description."""
    sections = schema().model_fields
    names = ("data", "model", "train", "eval", "sample")
    found = {key: text for name in names for key, text in _section_keys(f"{name}.", sections[name].annotation)}
    for name in registry.TOKENIZERS:
        for key, text in _section_keys("tokenizer.", registry.load(registry.TOKENIZERS, name).Options):
            found.setdefault(key, text)
    return found


def codec_keys() -> dict[str, str]:
    """Every key that the recipe of a codec can have, dotted, with its description."""
    return dict(_section_keys("", CodecRecipe))


def _section_keys(prefix: str, section: Any) -> Iterator[tuple[str, str]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _section_keys(f"{prefix}{name}.", field.annotation)
        else:
            yield prefix + name, field.description or ""


def dump(recipe: Recipe | CodecRecipe) -> str:
    """The recipe as a TOML text that `read` gives back equal."""
    lines: list[str] = []

    def table(prefix: str, tree: Mapping[str, Any]) -> None:
        lines.append(f"[{prefix}]")
        lines.extend(f"{key} = {_toml(value)}" for key, value in tree.items() if not isinstance(value, dict))
        lines.append("")
        for key, value in tree.items():
            if isinstance(value, dict):
                table(f"{prefix}.{key}", value)

    for name, tree in recipe.model_dump().items():
        table(name, tree)
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = "".join(
            f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else ("\\" + c if c in '\\"' else c) for c in value
        )
        return f'"{escaped}"'
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    assert isinstance(value, int | float), f"no TOML form for {value!r}"
    return repr(value)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys in which two nested tables differ, each as "key: old -> new"."""
    lines: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines


def header(name: str) -> str:
    """The comment at the head of a recipe file, without the comment signs."""
    lines: list[str] = []
    for line in find(name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return "\n".join(lines)
