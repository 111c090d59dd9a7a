"""The command line: it parses, makes one call, and shows the result.

Heavy imports live inside the bodies, after what can be found wrong without them.
"""

import errno
import gc
import os
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from shortcut_cli import __version__, console
from shortcut_cli.errors import CheckFailed, ShortcutError, Unavailable, UsageError
from shortcut_cli.signals import Signals


def _group(text: str) -> typer.Typer:
    """A group of commands with plain help: Typer's Rich help takes longer to import than `--help` may take in all."""
    return typer.Typer(
        help=text,
        callback=_help,
        invoke_without_command=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"max_content_width": 100},
    )


def _help(context: typer.Context) -> None:
    """The help of a group that was called without a command."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(UsageError.exit_code)


app = _group("Tokenize sound, music and text; train, evaluate and sample cross-layer attention models on them.")
recipes_app = _group("The recipes that come with shortcut, and your own.")
app.add_typer(recipes_app, name="recipes")
prove_app = _group("Run what shortcut promises on your own data, and compare.")
app.add_typer(prove_app, name="prove")
codec_app = _group("Neural codecs: train, measure, fetch EnCodec's weights.")
app.add_typer(codec_app, name="codec")
signals = Signals()


class Domain(StrEnum):
    """The domains of `prepare`."""

    audio = "audio"
    midi = "midi"
    text = "text"


class CodecName(StrEnum):
    """The weights of `codec get`."""

    encodec_24khz = "encodec_24khz"
    encodec_48khz = "encodec_48khz"


class Split(StrEnum):
    """The splits of `eval`."""

    val = "val"
    test = "test"


class Match(StrEnum):
    """What the baselines of `compare` have as much of as their arm."""

    none = "none"
    params = "params"
    flops = "flops"
    time = "time"


class Resume(StrEnum):
    """What `train` does with an unfinished run."""

    auto = "auto"
    never = "never"


RECIPES = {Domain.audio: "audio", Domain.midi: "music", Domain.text: "text"}

RecipeOption = Annotated[str, typer.Option("--recipe", metavar="NAME|FILE", help="Recipe name or .toml file.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a recipe key, as train.steps=200. Repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")]
Checkpoint = Annotated[Path, typer.Option("--ckpt", metavar="run.pt", help="Checkpoint that `train` wrote.")]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Worker processes (default: all cores).")]
MaxBad = Annotated[str, typer.Option("--max-bad", metavar="N|P%", help="Rejected files that are still a success.")]
Prompt = Annotated[Path | None, typer.Option("--prompt", metavar="FILE", help="A file of the domain to go on from.")]
ResumeOption = Annotated[Resume, typer.Option("--resume", help="Go on with an unfinished run, or begin again.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder to write into.")]
Paths = Annotated[list[str], typer.Argument(metavar="PATH", help="Folders, files or globs.")]


def _device(name: str) -> str:
    """The torch name of a device. Raises Unavailable where this machine has none."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise Unavailable(f"device {name!r} can't be used: {str(error).splitlines()[0]}", "--device cpu") from error
    return name


def _recognise(ckpt: Path) -> None:
    """Raise UsageError where `ckpt` is no checkpoint at all, before anything heavy is imported."""
    from shortcut_cli import sealed

    sealed.recognise(ckpt, "run.pt")


def _settings(given: list[str] | None, **flags: object) -> list[str]:
    """--set settings, then flags, which win; a flag that was not given is None."""
    return [*(given or []), *(f"{key.replace('__', '.')}={value}" for key, value in flags.items() if value is not None)]


@app.command()
def prepare(
    domain: Annotated[Domain, typer.Argument(help="What the files are.")],
    paths: Paths,
    recipe: Annotated[str | None, typer.Option("--recipe", metavar="NAME|FILE", help="Default: the domain's.")] = None,
    out: Out = None,
    workers: Workers = None,
    max_bad: MaxBad = "1%",
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Tokenize files into a folder of shards."""
    from shortcut_cli import recipe as recipes
    from shortcut_cli.stages import preparation

    name = recipe or RECIPES[domain]
    resolved = recipes.read(name, _settings(settings, data__shards=out))
    if resolved.tokenizer.name != domain:
        raise UsageError(f"recipe {name} is for {resolved.tokenizer.name}, not {domain}", "choose another --recipe")
    folder = Path(resolved.data.shards)
    with console.Reporter() as report:
        manifest = preparation.prepare(
            resolved, paths, folder, n_workers=workers or os.cpu_count() or 1, max_bad=max_bad, report=report
        )
    _show_shards(manifest | {"path": str(folder)}, as_json=as_json)


def _show_shards(manifest: dict[str, Any], *, as_json: bool) -> None:
    unit = manifest["tokenizer"]["unit"]
    rows = []
    for name, split in manifest["splits"].items():
        amount = split["units"].get(unit, 0)
        rows.append((name, split["documents"], split["tokens"], amount, split["tokens"] / amount if amount else None))
    state = " (already prepared; nothing to do)" if manifest.get("worked") is False else ""
    counts = f"{manifest['inputs']:,} files, {manifest['duplicates']:,} duplicates, {manifest['rejected']:,} rejected"
    if manifest.get("ignored"):
        counts += f", {manifest['ignored']:,} with other suffixes ignored"
    rate = f", {manifest['tokens_per_s']:,.0f} tokens/s" if manifest.get("tokens_per_s") else ""
    title = f"{manifest['path']}: {counts}{rate}{state}"
    columns = ("split", "documents", "tokens", f"{unit}s", f"tokens per {unit}")
    shown = {key: value for key, value in manifest.items() if key not in ("files", "request")}
    console.result({"schema_version": 1, **shown}, console.table(title, columns, rows), as_json=as_json)


@app.command()
def train(
    recipe: RecipeOption,
    model: Annotated[str | None, typer.Option("--model", help="Architecture, instead of the recipe's.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed, instead of the recipe's.")] = None,
    out: Out = None,
    resume: ResumeOption = Resume.auto,
    device: Device = "auto",
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Train a model on shards. An interrupted run goes on where it was."""
    from shortcut_cli import recipe as recipes

    resolved = recipes.read(recipe, _settings(settings, model__name=model, train__seed=seed))
    folder = out or recipes.run_folder(recipe, resolved)
    from shortcut_cli.stages import training

    with console.Reporter() as report:
        summary = training.train(resolved, folder, device=_device(device), resume=resume, report=report, stop=signals)
    console.result({"schema_version": 1, **summary}, summary["run"], as_json=as_json)


@app.command("eval")
def evaluate(
    ckpt: Checkpoint,
    shards: Annotated[Path | None, typer.Option("--shards", metavar="DIR", help="Default: the recipe's.")] = None,
    split: Annotated[Split | None, typer.Option("--split", help="Default: the recipe's eval.split.")] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Score a checkpoint on every token of a split. Also in natural units: per byte, second or note."""
    _recognise(ckpt)
    from shortcut_cli.pipeline import score

    with console.Reporter() as report:
        result = score(ckpt, shards, split, device=_device(device), report=report)
    console.result(result, _scores(str(ckpt), result), as_json=as_json)


def _scores(title: str, result: dict[str, Any]) -> Any:
    unit = result["unit"]
    rows = {
        "split": f"{result['split']}, {result['documents']:,} documents, {result['tokens']:,} tokens",
        "nats per token": result["nats_per_token"],
        f"  95 % interval over {result['interval_over']}": result["interval_95"],
        "  unigram entropy of the split": result["unigram_entropy"],
        "perplexity": result["perplexity"],
        "accuracy": result["accuracy"],
        f"bits per {unit}": result["bits_per_unit"],
        "  95 % interval": result["bits_per_unit_interval_95"],
    }
    if "depth_weights" in result:
        heads = result["depth_weights"]["by_head"]
        for source, shares in zip(result["depth_weights"]["sources"], zip(*heads, strict=True), strict=True):
            rows[f"attention to {source}"] = sum(shares) / len(shares)
    return console.pairs(title, rows)


@app.command()
def sample(
    ckpt: Annotated[
        Path | None, typer.Option("--ckpt", metavar="run.pt", help="Checkpoint that `train` wrote.")
    ] = None,
    like: Annotated[
        Path | None, typer.Option("--like", metavar="SAMPLE.json", help="Make this sample again, byte for byte.")
    ] = None,
    prompt: Prompt = None,
    n: Annotated[int | None, typer.Option("-n", min=1, help="Number of samples.")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", min=1, help="New tokens, at most.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="0 takes the most probable.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="0: all.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="1: all.")] = None,
    min_p: Annotated[float | None, typer.Option("--min-p", help="0: all.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the sampler.")] = None,
    out: Out = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Sample .wav, .mid or .txt files. Each has a .json beside it."""
    if ckpt is not None:
        _recognise(ckpt)
    from shortcut_cli import checkpoint
    from shortcut_cli import recipe as recipes
    from shortcut_cli.stages import sampling

    flags = {"n": n, "tokens": tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    settings = _settings(None, **{f"sample__{key}": value for key, value in (flags | {"seed": seed}).items()})
    only, folder = None, out
    if like is not None:
        if settings:
            raise UsageError("--like takes the sampler's settings from the sample", "leave out the other flags")
        again = sampling.like(like, ckpt, prompt)
        ckpt, prompt, settings, only = again.checkpoint, again.prompt, again.settings, again.number
        device, folder = (again.device if device == "auto" else device), out or like.parent / "again"
    if ckpt is None:
        raise UsageError("neither --ckpt nor --like is given", "shortcut sample --ckpt runs/RECIPE/MODEL-s1/run.pt")
    where = _device(device)
    run = checkpoint.open_run(ckpt, where)
    keys = recipes.with_settings(run.recipe, settings, "the flags").sample
    if only is not None and not 0 <= only < keys.n:
        raise CheckFailed(f"{like} is sample {only} of {keys.n}")
    with console.Reporter() as report:
        paths = sampling.sample(
            run, folder or ckpt.parent / "samples", keys, prompt=prompt, device=where, report=report, only=only
        )
    listed = [str(path) for path in paths]
    console.result({"schema_version": 1, "samples": listed}, "\n".join(listed), as_json=as_json)


@app.command()
def attention(
    ckpt: Checkpoint,
    prompt: Annotated[Path | None, typer.Option("--prompt", metavar="FILE", help="Look at this file.")] = None,
    shards: Annotated[Path | None, typer.Option("--shards", metavar="DIR", help="Default: the recipe's.")] = None,
    split: Annotated[Split, typer.Option("--split", help="Looked at without --prompt.")] = Split.val,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Of the model's context, at most.")] = 64,
    out: Out = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Show where the final layer looked, and what each layer adds."""
    _recognise(ckpt)
    from shortcut_cli.pipeline import look

    folder = out or ckpt.parent / "attention"
    with console.Reporter() as report:
        result = look(ckpt, prompt, shards, split, windows, folder, device=_device(device), report=report)
    title = f"{folder}: {result['tokens']:,} tokens, {result['nats_per_token']:.4f} nats each"
    columns = ("source", "mass", "tokens back", "nats if closed", "95 %", "nats if exchanged", "95 %")
    console.result(result, console.table(title, columns, _uses(result)), as_json=as_json)


def _uses(result: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    for entry in result["sources"]:
        costs = [entry["closed"], entry["exchanged"] or {}]
        cells = [cost.get(key) for cost in costs for key in ("nats_per_token", "interval_95")]
        yield entry["source"], entry["mass"], entry["distance_tokens"], *cells


@app.command("run")
def run_pipeline(
    recipe: RecipeOption,
    paths: Paths,
    out: Out = None,
    workers: Workers = None,
    max_bad: MaxBad = "1%",
    device: Device = "auto",
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Prepare, train, eval and sample; finished stages are skipped."""
    from shortcut_cli import recipe as recipes

    resolved = recipes.read(recipe, _settings(settings))
    from shortcut_cli import pipeline

    with console.Reporter() as report:
        result = pipeline.run_all(
            resolved,
            paths,
            out or recipes.run_folder(recipe, resolved),
            n_workers=workers or os.cpu_count() or 1,
            max_bad=max_bad,
            device=_device(device),
            report=report,
            stop=signals,
        )
    console.result({"schema_version": 1, **result}, _scores(result["train"]["run"], result["eval"]), as_json=as_json)
    if not as_json:
        console.result(None, "\n".join(result["samples"]), as_json=False)


@app.command()
def compare(
    recipe: RecipeOption,
    models: Annotated[str, typer.Option("--models", metavar="A,B,...", help="Architectures; gpt is always there.")],
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each arm.")] = 3,
    match: Annotated[Match, typer.Option("--match", help="What an arm's baseline has as much of.")] = Match.params,
    lrs: Annotated[
        str | None, typer.Option("--lrs", metavar="X,Y,...", help="Learning rates: each arm takes its best.")
    ] = None,
    margin: Annotated[float, typer.Option("--margin", help="Of equality, nats per token.")] = 0.005,
    out: Out = None,
    device: Annotated[str, typer.Option("--device", help="One, or several: cuda:0,cuda:1.")] = "auto",
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Train arms and matched baselines over seeds. A page says what differs, and how surely."""
    from shortcut_cli import recipe as recipes

    resolved = recipes.read(recipe, _settings(settings))
    try:
        rates = [float(rate) for rate in lrs.split(",")] if lrs else []
    except ValueError as error:
        raise UsageError(f"--lrs {lrs} is not a list of numbers", "for example --lrs 5e-4,1e-3,2e-3") from error
    from shortcut_cli import compare as stage
    from shortcut_cli.stages import comparison

    with console.Reporter() as report:
        result = stage.compare(
            resolved,
            models.split(","),
            out or Path("comparisons") / Path(recipe).stem,
            seeds=seeds,
            match=match,
            lrs=rates,
            margin=margin,
            devices=[_device(name) for name in device.split(",")],
            report=report,
            stop=signals,
        )
    table = console.table("means over seeds", comparison.headings(result), comparison.table(result))
    console.result(result, table, as_json=as_json)
    if not as_json:
        console.result(None, "\n".join(entry["verdict"] for entry in result["contrasts"]), as_json=False)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A shards folder, a .pt or a .toml file.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every byte with the sums written beside it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a shards folder, a checkpoint or a recipe is."""
    from shortcut_cli.stages import inspection

    found = inspection.inspect(path, verify=verify)
    if found["kind"] == "shards" and not as_json:
        _show_shards(found, as_json=False)
        return
    console.result({"schema_version": 1, **found}, console.pairs(str(path), _flat(found)), as_json=as_json)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in tree.items():
        rows |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return rows


@recipes_app.command("list")
def recipes_list(as_json: AsJson = False) -> None:
    """The recipes that come with shortcut."""
    from shortcut_cli import recipe as recipes

    heads = {name: recipes.header(name).splitlines()[0] for name in recipes.names()}
    listed = [{"name": name, "about": about} for name, about in heads.items()]
    table = console.table("recipes", ("name", "about"), heads.items())
    table.columns[1].justify = "left"
    console.result({"schema_version": 1, "recipes": listed}, table, as_json=as_json)


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Print a recipe file."""
    from shortcut_cli import recipe as recipes

    sys.stdout.write(recipes.find(name).read_text(encoding="utf-8"))


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(metavar="NAME")], file: Annotated[Path, typer.Argument(metavar="FILE")]
) -> None:
    """Copy a recipe to a file of your own."""
    from shortcut_cli import files
    from shortcut_cli import recipe as recipes

    if file.exists():
        raise UsageError(f"{file} exists already", "choose another file name")
    files.write(file, recipes.find(name).read_text(encoding="utf-8"))
    console.result(None, str(file), as_json=False)


@recipes_app.command("check")
def recipes_check(paths: Annotated[list[str], typer.Argument(metavar="FILE")], as_json: AsJson = False) -> None:
    """Validate recipe files; exit 4 where one is wrong."""
    from shortcut_cli.stages.inspection import check_recipes

    checked = check_recipes(paths)
    table = console.table("recipes", ("recipe", "problem"), ((c["recipe"], c["problem"] or "none") for c in checked))
    table.columns[1].justify = "left"
    console.result({"schema_version": 1, "recipes": checked}, table, as_json=as_json)
    wrong = sum(bool(entry["problem"]) for entry in checked)
    if wrong:
        raise CheckFailed(f"{wrong} of {len(checked)} recipes are not valid")


@prove_app.command("resume")
def prove_resume(
    recipe: RecipeOption,
    kills: Annotated[int, typer.Option("--kills", min=1, help="How often the second training is killed.")] = 5,
    seed: Annotated[int, typer.Option("--seed", help="Of the moments.")] = 1,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Keep both runs here.")] = None,
    device: Device = "auto",
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Train twice, once killed and resumed, and compare.

    The kills come at random moments. Exit 4 where weights or logs differ.
    """
    import tempfile

    from shortcut_cli import recipe as recipes

    resolved = recipes.read(recipe, _settings(settings))
    from shortcut_cli.stages import proof

    with console.Reporter() as report, tempfile.TemporaryDirectory(prefix="shortcut-") as scratch:
        folder = out or Path(scratch) / "runs"
        result = proof.resume(resolved, folder, kills=kills, seed=seed, device=_device(device), report=report)
    console.result(result, console.pairs("prove resume", _named(result)), as_json=as_json)
    if not (result["equal_weights"] and result["equal_logs"]):
        raise CheckFailed("the killed training did not end as the uninterrupted one")


@prove_app.command("tokens")
def prove_tokens(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A shards folder.")],
    paths: Annotated[list[str] | None, typer.Argument(metavar="PATH", help="What it was prepared from.")] = None,
    sources: Annotated[int, typer.Option("--sources", min=1, help="How many random files to read again.")] = 20,
    seed: Annotated[int, typer.Option("--seed", help="Of the choice.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Tokenize random documents again from their sources.

    In other blocks. Exit 4 where ids differ.
    """
    from shortcut_cli.stages import proof

    with console.Reporter() as report:
        result = proof.tokens(folder, paths or [], count=sources, seed=seed, report=report)
    console.result(result, console.pairs(f"prove tokens {folder}", _named(result)), as_json=as_json)
    if result["different"]:
        raise CheckFailed(f"{len(result['different'])} documents have other tokens than in {folder}")


def _named(result: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("_", " "): value for key, value in result.items() if key != "schema_version"}


@codec_app.command("train")
def codec_train(
    paths: Paths,
    recipe: RecipeOption = "codec-mini",
    out: Out = None,
    workers: Workers = None,
    resume: ResumeOption = Resume.auto,
    device: Device = "auto",
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Train a codec on sound files. An interrupted run goes on where it was."""
    from shortcut_cli import recipe as recipes

    resolved = recipes.read_codec(recipe, _settings(settings))
    from shortcut_cli.stages import codec_training

    folder = out or Path("runs") / f"{Path(recipe).stem}-s{resolved.train.seed}"
    with console.Reporter() as report:
        summary = codec_training.train(
            resolved,
            paths,
            folder,
            n_workers=workers or os.cpu_count() or 1,
            device=_device(device),
            resume=resume,
            report=report,
            stop=signals,
        )
    console.result({"schema_version": 1, **summary}, summary["codec"], as_json=as_json)


@codec_app.command("get")
def codec_get(
    name: Annotated[CodecName, typer.Argument(help="Official weights of EnCodec.")], as_json: AsJson = False
) -> None:
    """Fetch EnCodec's weights into the cache. A download that broke off goes on where it was."""
    from shortcut_cli.codec import weights

    with console.Reporter() as report:
        there = weights.cached(name).is_file()
        path = weights.fetch(
            name,
            lambda done, total: report("progress", task=f"get {name}", done=done, total=total or done, unit="bytes"),
        )
    result = {"schema_version": 1, "name": str(name), "path": str(path), "worked": not there}
    console.result(result, str(path), as_json=as_json)


@codec_app.command("eval")
def codec_eval(
    weights: Annotated[str, typer.Argument(metavar="WEIGHTS", help="A codec.pt, or a name such as mini.")],
    paths: Paths,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Keep the reconstructions here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare sound with what a codec makes of it. At every bandwidth, and with Opus."""
    from shortcut_cli.stages import codec_evaluation

    with console.Reporter() as report:
        result = codec_evaluation.evaluate(weights, paths, out, report=report)
    columns = ("codec", "kbit/s", "SI-SDR dB", "log-mel distance", "STOI", "PESQ")
    shares = ", ".join(f"{perplexity:.0f}" for perplexity in result["perplexity"])
    title = (
        f"{result['files']:,} files, {len(result['rejects']):,} rejected, {result['seconds']:,.0f} s; encodes "
        f"{result['encode_x_realtime']:,.0f} and decodes {result['decode_x_realtime']:,.0f} times faster than time, "
        f"codebooks of perplexity {shares}"
    )
    console.result(result, console.table(title, columns, codec_evaluation.rows(result)), as_json=as_json)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what works on this machine, and what to do about the rest."""
    from shortcut_cli.stages.doctor import examine

    checks = examine()
    rows = (
        (c["what"], "ok" if c["works"] else "missing", c["found"], "" if c["works"] else c["remedy"]) for c in checks
    )
    table = console.table("doctor", ("what", "state", "found", "what to do"), rows)
    for column in table.columns:
        column.justify = "left"
    console.result({"schema_version": 1, "checks": checks}, table, as_json=as_json)


@app.command()
def demo(out: Out = None, workers: Workers = None, device: Device = "auto", as_json: AsJson = False) -> None:
    """All domains end to end, on generated data, offline. Takes about two minutes."""
    from shortcut_cli.demo import demo as play

    with console.Reporter() as report:
        result = play(
            out or Path("demo"),
            n_workers=workers or os.cpu_count() or 1,
            device=_device(device),
            report=report,
            stop=signals,
        )
    columns = ("recipe", "model", "parameters", "nats/token", "unigram entropy", "accuracy", "bits per unit")
    rows = (
        (
            row["recipe"],
            row["model"],
            row["parameters"],
            row["nats_per_token"],
            row["unigram_entropy"],
            row["accuracy"],
            f"{row['bits_per_unit']:.4g} bits/{row['unit']}",
        )
        for row in result["rows"]
    )
    console.result(result, console.table("test split", columns, rows), as_json=as_json)
    if not as_json:
        console.result(None, "\n".join(result["samples"]), as_json=False)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit(0)
    _help(context)


SYSTEM_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS}


def main() -> None:
    """The `shortcut` command."""
    guarded(lambda: app(standalone_mode=False))


def guarded(command: Callable[[], Any]) -> NoReturn:
    """Run a command to the end of the process: a ShortcutError is one panel and its exit code; bugs keep theirs."""
    console.harden()
    signals.install()
    try:
        sys.exit(command())
    except typer.TyperException as error:  # words that are no command, option or value of one
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "shortcut"
        console.panel(UsageError(error.format_message(), f"{path} --help"))
        sys.exit(UsageError.exit_code)
    except ShortcutError as error:
        console.panel(error)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in SYSTEM_ERRORS:
            raise
        where = f": {error.filename}" if error.filename else ""
        console.panel(ShortcutError(f"{error.strerror}{where}", "what was complete before is unchanged"))
        sys.exit(ShortcutError.exit_code)
    finally:
        # Else the interpreter looks for circles among torch's 180,000 objects on its way out, for 0.4 s.
        gc.freeze()
