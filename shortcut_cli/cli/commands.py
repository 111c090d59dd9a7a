"""The commands: each parses its arguments, makes one call, and shows the result.

Heavy imports are inside the bodies, after the checks that need none of them.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from shortcut_cli import __version__, registry
from shortcut_cli.cli import completion, console, endings, helptext, tables
from shortcut_cli.cli.signals import guarded, signals
from shortcut_cli.errors import CheckFailed, UsageError
from shortcut_cli.events import Progress
from shortcut_cli.training import device as devices
from shortcut_cli.training import torchrun

if TYPE_CHECKING:
    from shortcut_cli.config import reading
    from shortcut_cli.config.schema import Recipe
    from shortcut_cli.events import Report
    from shortcut_cli.inference import prompts


SHELLS = Literal["bash", "zsh", "fish"]


class _App(typer.Typer):
    """A group whose commands are of the class above."""

    def command(self, name: str | None = None, **options: Any) -> Any:
        """Add a command."""
        return super().command(name, cls=helptext.Command, **options)


def _group(text: str, epilog: str | None = None) -> typer.Typer:
    """A group of commands with plain help."""
    return _App(
        cls=helptext.Panels,
        help=text,
        epilog=epilog,
        callback=_help,
        invoke_without_command=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def _examples(*lines: str) -> str:
    """Examples for the end of a help, one a line."""
    return "\b\n" + "\n".join(["Examples:", *(f"  shortcut {line}" for line in lines)])


FIRST = """\b
First:
  shortcut demo                   all three domains on generated data, offline
  shortcut prepare text FOLDER    then your own .txt, .mid or .wav files

What makes something ends with the next command.
"""


def _help(context: typer.Context) -> None:
    """Show the help of a group that was called without a command, and fail."""
    if context.invoked_subcommand is None:
        console.text(f"{context.get_help()}\n", error=True)
        raise typer.Exit(UsageError.exit_code)


app = _group("Tokenize sound, music and text; train, evaluate and sample cross-layer attention models.", FIRST)
recipes_app = _group("List, print, copy and check recipes.")
app.add_typer(recipes_app, name="recipes", rich_help_panel="Models")
prove_app = _group("Check on your own data that resumed runs and tokens are exact.")
app.add_typer(prove_app, name="prove", rich_help_panel="Check")
codec_app = _group("Neural codecs: train, evaluate, fetch EnCodec's weights.")
app.add_typer(codec_app, name="codec", rich_help_panel="Codec")

# mypy wants the members written out, but these names come from the registry.
Domain = StrEnum("Domain", list(registry.TOKENIZERS))  # type: ignore[misc]
OfficialWeights = StrEnum("OfficialWeights", registry.OFFICIAL_WEIGHTS)  # type: ignore[misc]


MODEL_LIST = ", ".join(registry.MODELS)
MOST_WORKERS = 1024
MOST_TASKS = 100_000
MOST_REPEATED = 4  # paths of a command in the next one
MOST_RUNS = 1000  # of a comparison or a proof
MOST_WINDOWS = 10**9  # and files to check: more than there are
MOST_STEPS = 10**9
LARGEST_SEED = 2**63 - 1
Executor = Literal["local", "ray", "slurm"]
RayAddress = Annotated[
    str,
    typer.Option(
        "--ray-address",
        metavar="HOST:PORT",
        help="Ray cluster; default: $RAY_ADDRESS, else one here.",
    ),
]
MOST_SAID = 10_000  # a limit of a number that its help names


def _out(text: str) -> Any:
    return typer.Option("--out", metavar="DIR", help=text)


def _number(flag: str, text: str, least: int, most: int | None = None, metavar: str = "N") -> Any:
    """An option with a whole number in a range, which its help names, unless the limit is only against nonsense."""
    known = f"{least:,} to {most:,}" if most is not None and most <= MOST_SAID else f"at least {least:,}"
    return typer.Option(flag, metavar=metavar, min=least, max=most, help=f"{text.removesuffix('.')}; {known}.")


def _seed(text: str) -> Any:
    return _number("--seed", text, 0, LARGEST_SEED)


def _among(flag: str, choices: Any, text: str) -> Any:
    """An option with a few possible values."""
    return typer.Option(flag, metavar="|".join(get_args(choices)), help=text)


RecipeOption = Annotated[
    str,
    typer.Option("--recipe", metavar="NAME|FILE", help="Recipe name or .toml file.", autocompletion=completion.recipes),
]
RecipeName = Annotated[
    str, typer.Argument(metavar="NAME|FILE", help="Recipe name or .toml file.", autocompletion=completion.recipes)
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a recipe key, e.g. train.steps=200. Repeatable.",
        autocompletion=completion.settings,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]


def _known(given: str) -> str:
    """The name of a device. Raises Unavailable if it can be none."""
    return devices.check(given)


def _every_known(given: str) -> str:
    """The names of devices. Raises Unavailable if one can be none, UsageError if there are none."""
    return ",".join(map(devices.check, _names("--device", given)))


Device = Annotated[
    str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps.", callback=_known)
]
CheckpointOption = typer.Option("--ckpt", metavar="run.pt", help="Checkpoint written by `train`, or its run folder.")
Checkpoint = Annotated[Path, CheckpointOption]
ShardsOption = Annotated[
    str | None, typer.Option("--shards", metavar="DIR", help="Shards folder, or its URL; default: the recipe's.")
]
Workers = Annotated[int | None, _number("--workers", "Worker processes; default: one per core.", 1, MOST_WORKERS)]
MaxBad = Annotated[
    str, typer.Option("--max-bad", metavar="N|P%", help="Most rejected files to tolerate before exit 3.")
]
Resuming = Literal["auto", "never"]
Resume = Annotated[Resuming, _among("--resume", Resuming, "auto: resume an unfinished run; never: start over.")]
RunOut = Annotated[Path | None, _out("Run folder; default: runs/RECIPE/MODEL-sSEED.")]
NoReport = Annotated[bool, typer.Option("--no-report", help="Do not write the page in the folder.")]
Paths = Annotated[list[str], typer.Argument(metavar="PATH", help="Folders, files or globs, or URLs such as s3://.")]


PromptOption = Annotated[
    str | None,
    typer.Option("--prompt", metavar="FILE|-|TEXT", help="File of the domain, - for text on stdin, or a text itself."),
]
PromptTokens = Annotated[
    int | None,
    _number("--prompt-tokens", "Give only this many tokens, from its beginning.", 1, MOST_STEPS),
]
PromptSeconds = Annotated[
    float | None,
    typer.Option("--prompt-seconds", metavar="S", help="Give only its first seconds, above 0; sound and MIDI."),
]


def _given(prompt: str | None, tokens: int | None, seconds: float | None, only_new: bool = False) -> "prompts.Given":
    """What the options say about a prompt."""
    from shortcut_cli.inference import prompts

    def read() -> bytes:
        return console.standard_input(prompts.MOST_BYTES + 1)

    return prompts.Given(prompt, read, tokens, seconds, only_new)


def _checkpoint(ckpt: Path) -> Path:
    """The checkpoint that --ckpt names: the file, or run.pt in a run folder.

    Raises UsageError if it can't be a checkpoint, before anything heavy is imported.
    """
    from shortcut_cli.training import tensor_file

    path = ckpt / "run.pt" if ckpt.is_dir() else ckpt
    tensor_file.recognise(path, "run.pt")
    return path


def _check_sample(
    ckpt: Path | None, like: Path | None, given: "prompts.Given", settings: Sequence[Any], out: Path | None
) -> None:
    """Raise UsageError for whatever is wrong with a `sample` that can be seen before torch is loaded."""
    import sys

    from shortcut_cli.config import reading
    from shortcut_cli.stages import early

    early.check_sample(ckpt, like, given, settings)
    if ckpt is None or like is not None:
        return
    early.check_prompt(ckpt, given)
    if found := early.in_the_way(ckpt, given, settings, out or ckpt.parent / "samples"):
        path, seed = found
        again = endings.pasted(reading.with_flags(sys.argv[1:], ["--seed", str(seed)]))
        raise UsageError(
            f"{path} exists already, made from something else", "choose another --seed or --out", then=again
        )


def _refreshed(folder: Path | None, left_out: bool, report: "Report") -> dict[str, str]:
    """{"report": the page of the folder a command worked in}, or {"no_report": the reason}; empty if left out."""
    if folder is None or left_out:
        return {}
    from shortcut_cli.stages import reporting

    return reporting.refresh(folder, report)


def _refreshed_with(samples: Path, left_out: bool, report: "Report") -> dict[str, str]:
    """As `_refreshed`, of where samples are shown: the page of their run, or of their own folder if they lie elsewhere.

    If the run is an arm of a comparison, its page too, as "comparison_report".
    """
    run = _run_folder(samples) if samples.name == "samples" else None
    page = _refreshed(run or samples, left_out, report)
    runs = (run or samples).resolve().parent
    if run and runs.name == "runs" and (runs.parent / "compare.json").is_file():
        comparison = runs.parent if run.is_absolute() else Path(os.path.relpath(runs.parent))
        page |= {f"comparison_{key}": path for key, path in _refreshed(comparison, left_out, report).items()}
    return page


def _run_folder(ckpt: Path) -> Path | None:
    """The run folder that a checkpoint lies in; None if it lies elsewhere."""
    return ckpt.parent if (ckpt.parent / "run.pt").is_file() else None


def _settings(given: list[str] | None, **flags: tuple[str, object]) -> "list[str | reading.Setting]":
    """--set settings, then flags, which win: for each key, the flag and its value, None if it was not given."""
    from shortcut_cli.config import reading

    named = [
        reading.Setting(key.replace("__", "."), value, f"{flag} {value}")
        for key, (flag, value) in flags.items()
        if value is not None
    ]
    return [*(given or []), *named]


def _fetched(name: str) -> Path:
    """The folder of shards that a path or a URL names; those in a store are fetched, see `stores.fetched`."""
    from shortcut_cli import files

    if not files.is_url(name):
        return files.place(name)
    from shortcut_cli.stages import stores

    with console.Reporter() as report:
        return stores.fetched(name, report)


def _shown(name: str, folder: Path) -> str:
    """How a folder is shown that was named so: by its URL if it is the copy of one in a store."""
    from shortcut_cli import files

    return name if files.is_url(name) else str(folder)


def _with_shards(recipe: str, resolved: "Recipe", given: list[str] | None) -> "Recipe":
    """The recipe with the tokenizer's keys of its shards, which a line names; see `reading.with_shards`.

    Raises UsageError, which names the command that makes them, if the shards are not prepared.
    """
    import sys

    from shortcut_cli import files
    from shortcut_cli.config import reading, writing
    from shortcut_cli.kept.inputs import read

    folder = _fetched(resolved.data.shards)
    if (folder / "manifest.json").is_file():
        request = (read(folder / "manifest.json") or {}).get("request")
        made = request.get("tokenizer") if isinstance(request, dict) else None
        command = ["shortcut", *sys.argv[1:]]
        known = made if isinstance(made, dict) else {}
        resolved, taken = reading.with_shards(recipe, resolved, given or (), known, str(folder), command)
        if taken:
            said = ", ".join(f"{key} = {writing.toml(value)}" for key, value in taken.items())
            console.note(f"the tokenizer's keys are those of {folder}: {said}")
        return resolved
    begun = files.owner(folder) == "shortcut prepare"
    state = "is incomplete (it has no manifest.json)" if begun else "is not a shards folder (it has no manifest.json)"
    from shortcut_cli.stages import early

    occupied = early.no_place_for_shards(folder)  # perhaps since it is what they are to be made from
    source = folder if occupied and early.holds(folder, resolved.tokenizer.name) else "PATH..."
    parts = ["prepare", resolved.tokenizer.name, endings.placed(source), "--recipe", recipe]
    for setting in given or []:
        key = setting.partition("=")[0].strip()
        if key.startswith(("data.", "tokenizer.")) and not (occupied and key == "data.shards"):
            parts += ["--set", setting]
    parts += ["--out", endings.placed(early.free_shards(folder))] if occupied else []
    raise UsageError(f"{folder} {state}", then=endings.pasted(parts))


def _end(
    folder: Path | str,
    written: Sequence[str],
    then: Sequence[str],
    *,
    as_json: bool,
    said: Sequence[str] = (),
    page: Mapping[str, str] | None = None,
) -> None:
    """The last lines of a success: remarks, where its files are, the next command, and the page that shows the result.

    With --json there are none. page: what `_refreshed` or `_refreshed_with` returned.
    """
    if as_json:
        return
    for remark in dict.fromkeys(said):
        console.note(f"Note: {remark}", "yellow")
    if written:
        console.note(endings.told(folder, written))
    if then:
        console.note(f"Next: {endings.pasted(then)}", "bold", whole=True)
    for key, value in (page or {}).items():
        if key.endswith("no_report"):
            console.note(f"No page was written: {value}", "yellow")
        else:
            console.note(f"Page: {value}", whole=True)


def _few(paths: Sequence[str]) -> list[str]:
    """Paths for a next command: as they were given or, of many, the folder that holds them all."""
    from shortcut_cli import files

    few = len(paths) <= MOST_REPEATED or any(map(files.is_url, paths))
    return [*map(endings.placed, paths)] if few else [os.path.commonpath(map(os.path.abspath, paths))]


def _all(written: Sequence[str], page: Mapping[str, str]) -> list[str]:
    """Every file that a command wrote, its page too."""
    return [*dict.fromkeys([*written, *(path for key, path in page.items() if not key.endswith("no_report"))])]


def _finite(flag: str, given: float, least: float, greatest: float) -> float:
    """The value of a flag. Raises UsageError if it is out of range: NaN passes the ranges of Typer."""
    if not least <= given <= greatest:
        raise UsageError(f"{flag} {given} is not a number from {least:g} to {greatest:g}")
    return given


def _rates(lrs: str | None) -> list[float]:
    """The learning rates of --lrs. Raises UsageError if one is not positive and finite."""
    from shortcut_cli.config.schema import MOST_RATE

    try:
        rates = [float(rate) for rate in lrs.split(",")] if lrs is not None else []
    except ValueError as error:
        raise UsageError(f"--lrs {lrs} is not a list of numbers", "for example --lrs 5e-4,1e-3,2e-3") from error
    if not all(0 < rate <= MOST_RATE for rate in rates):
        raise UsageError(
            f"--lrs {lrs}: a learning rate is above 0, and at most {MOST_RATE:g}", "for example --lrs 5e-4,1e-3,2e-3"
        )
    return rates


def _names(flag: str, given: str) -> list[str]:
    """The names in a list with commas, without the spaces around them. Raises UsageError if there are none."""
    names = [name.strip() for name in given.split(",") if name.strip()]
    if not names:
        raise UsageError(f"{flag} {given!r} names nothing")
    return names


def _pair(contrast: str) -> tuple[str, str]:
    """The two models of a --contrast. Raises UsageError if it does not name two."""
    names = [name.strip() for name in contrast.split(":")]
    if len(names) != 2 or not all(names):
        raise UsageError(f"--contrast {contrast!r} does not name two models", "for example --contrast shortcut:gpt")
    return names[0], names[1]


def _task(given: str) -> tuple[int, int]:
    """The numbers of --task. Raises UsageError if they are not I/N with 1 <= I <= N."""
    number, slash, tasks = given.partition("/") if given.isascii() else ("", "", "")
    if not (slash and number.isdecimal() and tasks.isdecimal() and 1 <= int(number) <= int(tasks) <= MOST_TASKS):
        raise UsageError(f"--task {given!r} is not I/N with 1 <= I <= N <= {MOST_TASKS:,}", "for example --task 3/8")
    return int(number), int(tasks)


def _check_ray(executor: str, flags: Mapping[str, object]) -> None:
    """Raise UsageError if a flag is given, which is for Ray alone, without --executor ray."""
    for flag, given in flags.items():
        if given and executor != "ray":
            raise UsageError(f"{flag} is for --executor ray", f"add --executor ray, or leave out {flag}")


def _count(workers: int | None) -> int:
    return workers or os.cpu_count() or 1


@app.command(
    rich_help_panel="Data",
    epilog=_examples(
        "prepare text ./texts",
        "prepare midi ./midi --out shards/mine --workers 4",
        "prepare audio ./wavs --set tokenizer.weights=mini --task 3/8",
    ),
)
def prepare(
    domain: Annotated[Domain, typer.Argument(metavar="DOMAIN", help=f"Kind of files: {', '.join(Domain)}.")],
    paths: Paths,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="NAME|FILE",
            help="Recipe name or .toml file; default: the domain's.",
            autocompletion=completion.recipes,
        ),
    ] = None,
    out: Annotated[str | None, _out("Shards folder, or a URL such as s3://; default: the recipe's.")] = None,
    workers: Workers = None,
    max_bad: MaxBad = "1%",
    task: Annotated[
        str | None, typer.Option("--task", metavar="I/N", help="Scan one of N parts of the files, and write no shards.")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Put together what all tasks have left; scan nothing.")
    ] = False,
    executor: Annotated[Executor, _among("--executor", Executor, "Where the files are scanned.")] = "local",
    ray_address: RayAddress = "",
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Tokenize files into a folder of shards."""
    from shortcut_cli import files
    from shortcut_cli.config import reading
    from shortcut_cli.stages import preparation, stores

    _check_ray(executor, {"--ray-address": ray_address})
    name = registry.DEFAULT_RECIPES[domain] if recipe is None else recipe
    resolved = reading.read(name, _settings(settings, data__shards=("--out", out)))
    if resolved.tokenizer.name != domain:
        raise UsageError(f"recipe {name} is for {resolved.tokenizer.name}, not {domain}", "choose another --recipe")
    if task is not None:
        if merge:
            raise UsageError("--task and --merge exclude each other", "run --merge once all tasks are done")
        if executor != "local":
            raise UsageError(
                "--task and --executor exclude each other", f"--executor {executor} divides the files itself"
            )
        if files.is_url(resolved.data.shards):
            raise UsageError("--task needs a folder that all machines see, and --out is a URL", "choose another --out")
        place = files.place(resolved.data.shards)
        with console.Reporter() as report:
            part = preparation.prepare_part(
                resolved, paths, place, task=_task(task), n_workers=_count(workers), report=report
            )
        console.result(part | {"path": str(place)}, tables.part(part), as_json=as_json)
        return
    with console.Reporter() as report, stores.kept(resolved.data.shards, report) as folder:
        manifest = preparation.prepare(
            resolved,
            paths,
            folder,
            n_workers=_count(workers),
            max_bad=max_bad,
            report=report,
            merge=merge,
            executor=executor,
            ray_address=ray_address,
        )
    where = _shown(resolved.data.shards, folder)
    shown = {key: value for key, value in manifest.items() if key not in ("files", "request")} | {"path": where}
    written = endings.within(folder)
    console.result(shown, tables.shards(shown), *tables.account(shown), as_json=as_json, written=written)
    _end(folder, written, endings.after_prepare(name, where, settings or ()), as_json=as_json)


@app.command(
    rich_help_panel="Models",
    epilog=_examples(
        "train --recipe text",
        "train --recipe music --model gpt --seed 2 --set train.steps=500",
        "train --recipe text --dry-run",
    ),
)
def train(
    recipe: RecipeOption,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="NAME",
            help=f"Architecture, of {MODEL_LIST}; default: the recipe's.",
            autocompletion=completion.models,
        ),
    ] = None,
    seed: Annotated[int | None, _seed("Seed; default: the recipe's.")] = None,
    out: RunOut = None,
    resume: Resume = "auto",
    init_from: Annotated[
        Path | None,
        typer.Option("--init-from", metavar="RUN", help="Begin with the weights of this run folder or run.pt."),
    ] = None,
    extend: Annotated[
        int | None,
        _number("--extend", "Train the run to this many steps in all.", 1, MOST_STEPS, "STEPS"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, by a few steps. Nothing is written.")
    ] = False,
    device: Device = "auto",
    processes: Annotated[
        int, _number("--devices", "Train on N devices: GPUs, or processes of a CPU.", 1, MOST_WORKERS)
    ] = 1,
    max_restarts: Annotated[
        int,
        _number("--max-restarts", "With --devices: how often processes that fail are started again.", 0, MOST_RUNS),
    ] = 3,
    logs_per_rank: Annotated[
        bool,
        typer.Option("--logs-per-rank", help="Of several processes, each logs its own steps into the run folder."),
    ] = False,
    settings: Settings = None,
    no_report: NoReport = False,
    as_json: AsJson = False,
) -> None:
    """Train a model on shards. If it is interrupted, run it again to resume."""
    from shortcut_cli import files
    from shortcut_cli.config import reading
    from shortcut_cli.training import loop

    if processes > 1 and dry_run:
        raise UsageError("--dry-run takes no --devices", "it says what one device would do")
    if logs_per_rank and processes == 1 and not torchrun.promised():
        raise UsageError("--logs-per-rank is for several processes", "give --devices, or start them with torchrun")
    if extend and (dry_run or resume == "never"):
        raise UsageError(f"--extend goes on with a run: it takes no {'--dry-run' if dry_run else '--resume never'}")
    flags = {"model__name": ("--model", model), "train__seed": ("--seed", seed), "train__steps": ("--extend", extend)}
    resolved = reading.read(recipe, _settings(settings, **flags))
    resolved = _with_shards(recipe, resolved, settings)
    folder = out or reading.run_folder(recipe, resolved)
    first = None if init_from is None else _checkpoint(init_from)
    if not dry_run and not torchrun.promised():  # processes of one training hold its folder together
        files.check_held(folder, "shortcut train", known=loop.is_run_folder)
    if processes > 1 or torchrun.promised():
        torchrun.hush()
    if processes > 1 and not torchrun.promised():
        from shortcut_cli.cli import launch

        raise typer.Exit(launch.processes(sys.argv[1:], processes, max_restarts))
    from shortcut_cli.compare import watching
    from shortcut_cli.stages import training

    where = torchrun.place(devices.choose(device))
    with console.Reporter(quiet=not torchrun.leads(), teller=watching.inherited()) as report:
        if dry_run:
            found = training.rehearse(resolved, folder, device=where, report=report, init_from=first)
            console.result(found, tables.rehearsal(found), as_json=as_json)
            return
        summary = training.train(
            resolved,
            folder,
            device=where,
            resume=resume,
            report=report,
            stop=signals,
            init_from=first,
            extend=extend is not None,
            logs=logs_per_rank,
        )
        if not summary:  # of a process beside the one that speaks
            return
        page = _refreshed(folder, no_report, report)
    written = endings.of_training(folder)
    console.result(summary | page, summary["run"], as_json=as_json, written=_all(written, page))
    _end(folder, written, endings.after_train(folder), page=page, as_json=as_json)


@app.command(
    "eval",
    rich_help_panel="Models",
    epilog=_examples(
        "eval --ckpt runs/text/shortcut-s1",
        "eval --ckpt runs/text/shortcut-s1 --split val",
        "eval --ckpt runs/text/shortcut-s1 --files ./other",
    ),
)
def evaluate(
    ckpt: Checkpoint,
    shards: ShardsOption = None,
    split: Annotated[
        registry.AnySplit | None,
        _among("--split", registry.AnySplit, "Split to score; default: the recipe's eval.split."),
    ] = None,
    files: Annotated[
        list[str] | None,
        typer.Option("--files", metavar="PATH", help="Score these files, folders or globs instead of shards."),
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="PATH", help="More paths after --files.")] = None,
    workers: Workers = None,
    max_bad: MaxBad = "1%",
    device: Device = "auto",
    no_report: NoReport = False,
    as_json: AsJson = False,
) -> None:
    """Score a checkpoint on a split or on files. The result is in nats per token and in bits per natural unit.

    With --files, the run's own tokenizer is used. For text, bits per character and perplexity per word are added.
    """
    ckpt, paths = _checkpoint(ckpt), [*(files or []), *(more or [])]
    if paths and not files:
        raise UsageError(f"unexpected argument {paths[0]}", f"--files {paths[0]} scores a file or folder")
    if paths and (shards or split):
        raise UsageError("--files takes no --shards and no --split: all of the files are scored")
    from shortcut_cli.stages import early

    early.check_paths(paths)
    early.check_max_bad(max_bad)
    early.check_shards(shards)
    from shortcut_cli.stages import pipeline

    where = devices.choose(device)
    folder = None if shards is None else _fetched(shards)
    with console.Reporter() as report:
        if paths:
            result = pipeline.score_files(
                ckpt, paths, n_workers=_count(workers), max_bad=max_bad, device=where, report=report
            )
        else:
            result = pipeline.score(ckpt, folder, split, device=where, report=report)
        page = _refreshed(_run_folder(ckpt), no_report, report)
    written = endings.of_score(ckpt, result)
    console.result(
        result | page,
        tables.scores(str(ckpt), result),
        *tables.account(result),
        as_json=as_json,
        written=_all(written, page),
    )
    _end(ckpt.parent, written, endings.after_eval(ckpt), page=page, as_json=as_json, said=endings.of_results(result))


@app.command(
    rich_help_panel="Models",
    epilog=_examples(
        "sample --ckpt runs/music/shortcut-s1 -n 4",
        "sample --ckpt runs/text/shortcut-s1 --temperature 0.8 --top-p 0.95",
        "sample --like samples/sample-1-000.txt.json",
    ),
)
def sample(
    ckpt: Annotated[Path | None, CheckpointOption] = None,
    like: Annotated[
        Path | None, typer.Option("--like", metavar="SAMPLE.json", help="Recreate this sample, byte for byte.")
    ] = None,
    prompt: PromptOption = None,
    prompt_tokens: PromptTokens = None,
    prompt_seconds: PromptSeconds = None,
    only_new: Annotated[bool, typer.Option("--only-new", help="Write what follows the prompt, without it.")] = False,
    n: Annotated[int | None, _number("-n", "Number of samples.", 1)] = None,
    tokens: Annotated[int | None, _number("--tokens", "Most new tokens per sample.", 1)] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", metavar="X", help="Softmax temperature, 1e-6 to 1e6; 0 is greedy."),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", metavar="N", help="Sample from this many most probable tokens; 0: all."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", metavar="P", help="Sample from the fewest tokens with this probability; 1: all."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            "--min-p", metavar="P", help="Drop tokens below this share, 0 to 1, of the largest probability; 0: none."
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision", metavar="fp32|bf16", help="bf16: products in bf16, which is faster where the CPU has them."
        ),
    ] = None,
    seed: Annotated[int | None, _seed("Seed of the sampler.")] = None,
    out: Annotated[Path | None, _out("Folder of the samples; default: samples/ beside the checkpoint.")] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print the text of one sample while it is drawn; -n is 1 then.")
    ] = False,
    device: Device = "auto",
    no_report: NoReport = False,
    as_json: AsJson = False,
) -> None:
    """Sample .wav, .mid or .txt files. A .json beside each says how it was made.

    Options that are not given default to the recipe's [sample] section.
    """
    if stream and as_json:
        raise UsageError("--stream and --json both print on stdout", "leave out one of them")
    ckpt = None if ckpt is None else _checkpoint(ckpt)
    given = _given(prompt, prompt_tokens, prompt_seconds, only_new)
    settings = _settings(
        None,
        sample__n=("-n", 1 if stream and n is None and like is None else n),
        sample__tokens=("--tokens", tokens),
        sample__temperature=("--temperature", temperature),
        sample__top_k=("--top-k", top_k),
        sample__top_p=("--top-p", top_p),
        sample__min_p=("--min-p", min_p),
        sample__precision=("--precision", precision),
        sample__seed=("--seed", seed),
    )
    _check_sample(ckpt, like, given, settings, out)
    from shortcut_cli.stages import pipeline

    with console.Reporter() as report:
        paths = pipeline.draw(ckpt, like, given, settings, out, device=device, report=report, stream=stream)
        signals.close()  # its files are complete, and would be in the way of the same command
        listed = [str(path) for path in paths]
        if stream:
            console.end_stream(*listed)  # before anything else is shown on the line of its last word
        page = _refreshed_with(Path(listed[0]).parent, no_report, report) if listed else {}
    written = endings.of_samples(listed)
    if not stream:
        console.result({"samples": listed} | page, "\n".join(listed), as_json=as_json, written=_all(written, page))
    then = endings.after_sample(ckpt, endings.model_of(ckpt)) if ckpt else []
    folder = Path(listed[0]).parent if listed else ""
    _end(folder, written, then, page=page, as_json=as_json, said=endings.of_results({}, listed))


@app.command(
    rich_help_panel="Look",
    epilog=_examples(
        "attention --ckpt runs/text/shortcut-s1", "attention --ckpt runs/music/shortcut-s1 --prompt piece.mid"
    ),
)
def attention(
    ckpt: Checkpoint,
    prompt: PromptOption = None,
    prompt_tokens: PromptTokens = None,
    prompt_seconds: PromptSeconds = None,
    shards: ShardsOption = None,
    split: Annotated[
        registry.ScoredSplit | None, _among("--split", registry.ScoredSplit, "Split to analyse; default: val.")
    ] = None,
    windows: Annotated[int, _number("--windows", "Most context windows to analyse.", 1, MOST_WINDOWS)] = 64,
    out: Annotated[Path | None, _out("Folder of the results; default: attention/ beside the checkpoint.")] = None,
    device: Device = "auto",
    no_report: NoReport = False,
    as_json: AsJson = False,
) -> None:
    """Show what is read across layers, and its effect on the loss.

    Of a split, or of a prompt.
    """
    ckpt = _checkpoint(ckpt)
    given = _given(prompt, prompt_tokens, prompt_seconds)
    if prompt is not None and (shards or split):
        raise UsageError("--prompt takes no --shards and no --split: only the prompt is read")
    from shortcut_cli.stages import early

    early.check_shards(shards)
    early.check_prompt(ckpt, given)
    from shortcut_cli.stages import pipeline

    folder = out or ckpt.parent / "attention"
    chosen = None if shards is None else _fetched(shards)
    with console.Reporter() as report:
        result = pipeline.look(
            ckpt, given, chosen, split or "val", windows, folder, device=devices.choose(device), report=report
        )
        signals.close()  # its files are complete, and would be in the way of the same command
        page = _refreshed(out or _run_folder(ckpt) or folder, no_report, report)
    written = endings.named(folder, ["attention.json", "attention.npz", "attention.png", "use.png"])
    console.result(
        result | page,
        tables.attention(folder, result),
        tables.layers(result),
        as_json=as_json,
        written=_all(written, page),
    )
    _end(folder, written, endings.after_attention(ckpt, endings.model_of(ckpt)), page=page, as_json=as_json)


@app.command(
    "run",
    rich_help_panel="Models",
    epilog=_examples("run --recipe text-tiny ./texts", "run --recipe audio ./wavs --out runs/mine"),
)
def run_pipeline(
    recipe: RecipeOption,
    paths: Paths,
    out: RunOut = None,
    workers: Workers = None,
    max_bad: MaxBad = "1%",
    device: Device = "auto",
    settings: Settings = None,
    no_report: NoReport = False,
    as_json: AsJson = False,
) -> None:
    """Prepare, train, evaluate and sample. Finished stages are skipped."""
    from shortcut_cli.config import reading
    from shortcut_cli.stages import early
    from shortcut_cli.training import loop

    resolved = reading.read(recipe, _settings(settings))
    from shortcut_cli import files

    early.check_paths(paths)
    early.check_max_bad(max_bad)
    folder = out or reading.run_folder(recipe, resolved)
    files.check_held(folder, "shortcut train", known=loop.is_run_folder)
    from shortcut_cli.stages import pipeline

    place = files.place(resolved.data.shards)
    if (place / "manifest.json").is_file():
        resolved = _with_shards(recipe, resolved, settings)
    elif occupied := early.no_place_for_shards(place):
        again = reading.with_flags(sys.argv[1:], ["--set", f"data.shards={early.free_shards(place)}"])
        raise UsageError(occupied, then=endings.pasted(again))
    with console.Reporter() as report:
        result = pipeline.run_all(
            resolved,
            paths,
            folder,
            n_workers=_count(workers),
            max_bad=max_bad,
            device=devices.choose(device),
            report=report,
            stop=signals,
            page=not no_report,
        )
        page = _refreshed(folder, no_report, report)
    shown = [*tables.account(result["prepare"]), tables.scores(result["train"]["run"], result["eval"])]
    ckpt = folder / "run.pt"
    made = [
        *endings.of_training(folder),
        *endings.of_score(ckpt, result["eval"]),
        *endings.of_samples(result["samples"]),
    ]
    written = [*endings.within(files.place(resolved.data.shards)), *made]
    console.result(result | page, *shown, "\n".join(result["samples"]), as_json=as_json, written=_all(written, page))
    said = endings.of_results(result["eval"], result["samples"])
    if not as_json:
        console.note(endings.to_open(page.get("report", ""), result["samples"]), whole=True)
    _end(folder, made, endings.after_sample(ckpt, resolved.model.name), page=page, as_json=as_json, said=said)


@app.command(
    rich_help_panel="Models",
    epilog=_examples(
        "compare --recipe text-tiny --models shortcut",
        "compare --recipe text --models shortcut,moda --match flops",
        "compare --recipe text --models shortcut --ladder 64,96,128",
    ),
)
def compare(
    recipe: RecipeOption,
    models: Annotated[
        str,
        typer.Option(
            "--models",
            metavar="A,B,...",
            help=f"Architectures, of {MODEL_LIST}; gpt is always included.",
            autocompletion=completion.models,
        ),
    ],
    seeds: Annotated[int, _number("--seeds", "Runs per architecture, one per seed.", 1, MOST_RUNS)] = 3,
    match: Annotated[
        registry.Match | None,
        _among(
            "--match",
            registry.Match,
            "Match baselines by parameters, FLOPs or training time, or not at all; default: params, and flops "
            "with --ladder.",
        ),
    ] = None,
    ladder: Annotated[
        str | None,
        typer.Option(
            "--ladder",
            metavar="W,W,...",
            help="Widths of baselines, or layers x width; each model stands against the line through them.",
        ),
    ] = None,
    contrasts: Annotated[
        list[str] | None,
        typer.Option("--contrast", metavar="A:B", help="Test two of the models against each other too. Repeatable."),
    ] = None,
    most_seeds: Annotated[
        int,
        _number("--most-seeds", "Seeds there may be in the end, if more are added, or 0: no more.", 0, MOST_RUNS),
    ] = 0,
    lrs: Annotated[
        str | None,
        typer.Option(
            "--lrs", metavar="X,Y,...", help="Learning rates to begin a search on pilots with, for all models."
        ),
    ] = None,
    margin: Annotated[
        float, typer.Option("--margin", metavar="X", help="Equivalence margin, 0 to 100 nats per token.")
    ] = 0.005,
    out: Annotated[Path | None, _out("Folder of the comparison; default: comparisons/RECIPE.")] = None,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="NAME,...",
            help="One device, or several, e.g. cuda:0,cuda:1.",
            callback=_every_known,
        ),
    ] = "auto",
    task: Annotated[
        str | None, typer.Option("--task", metavar="I/N", help="Train one of N parts of the runs, and judge nothing.")
    ] = None,
    executor: Annotated[
        Literal["local", "ray"], _among("--executor", Literal["local", "ray"], "Where the runs are trained.")
    ] = "local",
    run_cpus: Annotated[int, _number("--run-cpus", "CPUs and threads of each run on Ray.", 1, 1024)] = 1,
    ray_address: RayAddress = "",
    settings: Settings = None,
    no_report: NoReport = False,
    as_json: AsJson = False,
) -> None:
    """Compare architectures with baselines of their cost over seeds. Writes a page with differences and intervals."""
    from shortcut_cli import files
    from shortcut_cli.compare import asked
    from shortcut_cli.config import reading

    resolved = reading.read(recipe, _settings(settings))
    names, rates, margin = _names("--models", models), _rates(lrs), _finite("--margin", margin, 0, 100)
    rungs, pairs = _names("--ladder", ladder) if ladder is not None else [], [_pair(one) for one in contrasts or ()]
    match = match or ("flops" if rungs else "params")
    if rungs and match == "none":
        raise UsageError("--ladder needs a cost to be laid over", "--match flops, params or time")
    share = None if task is None else _task(task)
    asked.check(resolved, names, rungs, pairs)
    asked.check_seeds(seeds, most_seeds)
    chosen = _names("--device", device)
    _check_ray(executor, {"--run-cpus": run_cpus != 1, "--ray-address": ray_address})
    if executor == "ray":
        if task is not None:
            raise UsageError("--task and --executor exclude each other", "--executor ray divides the runs itself")
        if chosen[0] not in ("auto", "cpu", "cuda") or len(chosen) > 1:
            raise UsageError(f"--device {device} is not of every machine", "with --executor ray: auto, cpu or cuda")
    resolved = _with_shards(recipe, resolved, settings)
    folder = out or Path("comparisons") / Path(recipe).stem
    if share is None:  # tasks hold it together
        files.check_held(folder, "shortcut compare", known=asked.is_comparison)
    from shortcut_cli.stages import comparison

    with console.Reporter() as report:
        result = comparison.compare(
            resolved,
            names,
            folder,
            seeds=seeds,
            match=match,
            rungs=rungs,
            pairs=pairs,
            most_seeds=most_seeds,
            lrs=rates,
            margin=margin,
            devices=chosen if executor == "ray" else [devices.choose(name) for name in chosen],
            executor=executor,
            run_cpus=run_cpus,
            ray_address=ray_address,
            report=report,
            stop=signals,
            page=not no_report,
            task=share,
        )
    if task is not None:
        console.result(result | {"path": str(folder)}, tables.share(result), as_json=as_json)
        return
    verdicts = console.Prose(
        "\n".join(
            [*result["notices"][not result["gate"]["open"] :], *(entry["verdict"] for entry in result["contrasts"])]
        )
    )
    page: dict[str, str] = {key: result[key] for key in ("report", "no_report") if key in result}
    written = endings.of_comparison(folder, resolved.eval.split)
    console.result(result, tables.comparison(result), verdicts, as_json=as_json, written=_all(written, page))
    commands = [] if as_json else comparison.commands(folder)
    if commands:
        console.note("Samples of the arms, beside each other on a page:")
    for command in commands:
        console.note(command, whole=True)
    _end(folder, written, ["runs", endings.placed(folder / "runs")], page=page, as_json=as_json)


@app.command(
    rich_help_panel="Look",
    epilog=_examples("inspect shards/text --verify", "inspect runs/text/shortcut-s1", "inspect text-tiny.toml"),
)
def inspect(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="Shards folder or its URL, run folder, .pt file or .toml file.")
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every byte with the checksums: always done for .pt files.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Describe a shards folder, a checkpoint, a codec or a recipe."""
    from shortcut_cli.stages import inspection

    folder = _fetched(path)
    found, shown = inspection.inspect(folder, verify=verify), _shown(path, folder)
    found |= {"path": shown} if shown != str(folder) else {}
    console.result(found, *tables.description(shown, found), as_json=as_json)


@app.command(
    "report", rich_help_panel="Look", epilog=_examples("report runs/text/shortcut-s1", "report runs/music/* --open")
)
def write_report(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH", help="Folders of runs, comparisons, codecs, shards, samples, attention, demos."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The page; default: report.html in the first folder.")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page about runs, comparisons, codecs, shards, samples and attention. It needs no network.

    A page that an earlier `report` wrote is replaced.
    """
    for path in paths:
        if not path.exists():
            raise UsageError(
                f"{path} does not exist", "give folders of runs, comparisons, codecs, shards, samples or attention"
            )
    from shortcut_cli.stages import reporting

    with console.Reporter() as report:
        result = reporting.told(paths, out, report)
    console.result(result, result["report"], as_json=as_json, written=[result["report"]])
    page = Path(result["report"])
    again = ["report", *map(endings.placed, paths), *(["--out", str(out)] if out else []), "--open"]
    _end(page.parent, [str(page)], [] if show else again, page={"report": str(page)}, as_json=as_json)
    if show:
        console.browse(Path(result["report"]))


@app.command("runs", rich_help_panel="Look", epilog=_examples("runs", "runs comparisons/text --json"))
def list_runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder with runs in it, at any depth.")] = Path(
        "runs"
    ),
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder with their scores.

    Those that are damaged are listed with the reason.
    """
    from shortcut_cli.stages import runs

    found = runs.listed(folder)
    console.result(found, *tables.runs(str(folder), found), as_json=as_json)


@app.command(rich_help_panel="Look", epilog=_examples("diff runs/text/gpt-s1 runs/text/shortcut-s1"))
def diff(
    first: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder or run.pt.")],
    second: Annotated[Path, typer.Argument(metavar="RUN", help="Another one.")],
    as_json: AsJson = False,
) -> None:
    """Show how two runs differ.

    In recipe keys, shards, tokenizers, versions, first weights, scores.
    """
    from shortcut_cli.stages import runs

    found = runs.difference(first, second)
    console.result(found, *tables.difference(found), as_json=as_json)


@recipes_app.command("list", epilog=_examples("recipes list"))
def recipes_list(as_json: AsJson = False) -> None:
    """List the recipes that come with shortcut."""
    from shortcut_cli.config import reading

    listed = [{"name": name, "about": reading.header(name).splitlines()[0]} for name in reading.names()]
    console.result({"recipes": listed}, tables.recipes(listed), as_json=as_json)


@recipes_app.command("show", epilog=_examples("recipes show text"))
def recipes_show(name: RecipeName) -> None:
    """Print a recipe."""
    from shortcut_cli.config import reading

    console.text(reading.text(name))


@recipes_app.command("copy", epilog=_examples("recipes copy text mine.toml"))
def recipes_copy(
    name: RecipeName,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="New .toml file.")],
) -> None:
    """Copy a recipe to a file of your own."""
    from shortcut_cli import files
    from shortcut_cli.config import reading

    if file.is_dir():
        raise UsageError(
            f"{file} is a folder",
            then=endings.pasted(
                ["recipes", "copy", endings.placed(name), endings.placed(file / f"{Path(name).stem}.toml")]
            ),
        )
    if os.path.lexists(file):  # a link that leads nowhere too
        raise UsageError(f"{file} exists already", "choose another file name")
    files.write(file, reading.text(name))
    console.text(f"{file}\n")
    _end(file.parent, [], ["recipes", "check", endings.placed(file)], as_json=False)


@recipes_app.command("check", epilog=_examples("recipes check mine.toml"))
def recipes_check(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="FILE", help="Recipe names or .toml files.", autocompletion=completion.recipes),
    ],
    as_json: AsJson = False,
) -> None:
    """Validate recipes. Exit 4 if one is not valid."""
    from shortcut_cli.stages import inspection

    checked = inspection.check_recipes(paths)
    console.result({"recipes": checked}, tables.checked_recipes(checked), as_json=as_json)
    wrong = sum(bool(entry["problem"]) for entry in checked)
    if wrong:
        raise CheckFailed(f"{wrong} of {len(checked)} recipes are not valid")


@prove_app.command(
    "resume",
    epilog=_examples("prove resume --recipe text-tiny", "prove resume --recipe text-tiny --kills 2 --out proof"),
)
def prove_resume(
    recipe: RecipeOption,
    kills: Annotated[int, _number("--kills", "How often to kill the second training.", 1, MOST_RUNS)] = 5,
    seed: Annotated[int, _seed("Seed of the kill times.")] = 1,
    out: Annotated[Path | None, _out("Keep both runs in this folder.")] = None,
    device: Device = "auto",
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Train twice, once with kills and resumes, and compare the weights.

    The kills come at random times. Exit 4 if weights or logs differ.
    """
    from shortcut_cli import files
    from shortcut_cli.config import reading

    resolved = reading.read(recipe, _settings(settings))
    resolved = _with_shards(recipe, resolved, settings)
    if out:
        files.check_empty(out)
    from shortcut_cli.stages import proof

    with console.Reporter() as report, files.temporary_folder() as scratch:
        folder = out or scratch / "runs"
        result = proof.resume(resolved, folder, kills=kills, seed=seed, device=devices.choose(device), report=report)
    equal = result["equal_weights"] and result["equal_logs"]
    verdict = f"weights and logs are {'equal' if equal else 'not equal'} after {result['kills']} kills"
    verdict += f" ({result['conditions']})"
    written = endings.within(out) if out else []
    console.result(result, tables.proof("prove resume", result), verdict, as_json=as_json, written=written)
    if not equal:
        raise CheckFailed("the interrupted training ended with different weights or logs")


@prove_app.command(
    "tokens", epilog=_examples("prove tokens shards/text", "prove tokens shards/text ./texts --sources 100")
)
def prove_tokens(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Shards folder.")],
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH", help="Files it was prepared from; default: those that `prepare` noted."),
    ] = None,
    sources: Annotated[int, _number("--sources", "How many files to check.", 1, MOST_WINDOWS)] = 20,
    seed: Annotated[int, _seed("Seed of the choice of files.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Tokenize random files again, in blocks of a different size, and compare the ids.

    Exit 4 if ids differ.
    """
    from shortcut_cli.stages import proof

    with console.Reporter() as report:
        result = proof.tokens(folder, paths or [], count=sources, seed=seed, report=report)
    compared = f"{result['tokens']:,} tokens of {result['sources']:,} files"
    verdict = f"{compared} were compared; {'some differ' if result['different'] else 'all are equal'}"
    console.result(result, tables.proof(f"prove tokens {folder}", result), verdict, as_json=as_json)
    if result["different"]:
        raise CheckFailed(f"{len(result['different'])} documents were tokenized differently from {folder}")


@codec_app.command(
    "train", epilog=_examples("codec train ./wavs", "codec train ./wavs --set train.steps=1000 --out runs/codec")
)
def codec_train(
    paths: Paths,
    recipe: RecipeOption = "codec-mini",
    out: Annotated[Path | None, _out("Run folder; default: runs/RECIPE-sSEED.")] = None,
    workers: Workers = None,
    resume: Resume = "auto",
    device: Device = "auto",
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Train a codec on sound files. If it is interrupted, run it again to resume."""
    from shortcut_cli import files
    from shortcut_cli.config import reading
    from shortcut_cli.stages import early
    from shortcut_cli.training import loop

    resolved = reading.read_codec(recipe, _settings(settings))
    early.check_paths(paths)
    folder = out or Path("runs") / f"{Path(recipe).stem}-s{resolved.train.seed}"
    files.check_held(folder, "shortcut codec train", known=loop.is_run_folder)
    from shortcut_cli.stages import codec_training

    with console.Reporter() as report:
        summary = codec_training.train(
            resolved,
            paths,
            folder,
            n_workers=_count(workers),
            device=devices.choose(device),
            resume=resume,
            report=report,
            stop=signals,
        )
    written = endings.of_training(folder)
    console.result(summary, summary["codec"], as_json=as_json, written=written)
    _end(folder, written, ["codec", "eval", endings.placed(summary["codec"]), *_few(paths)], as_json=as_json)


@codec_app.command("get", epilog=_examples("codec get encodec_24khz"))
def codec_get(
    name: Annotated[
        OfficialWeights, typer.Argument(metavar="NAME", help=f"Published weights: {', '.join(OfficialWeights)}.")
    ],
    as_json: AsJson = False,
) -> None:
    """Fetch EnCodec's weights into the cache. An interrupted download is resumed."""
    from shortcut_cli.codec import weights

    there = weights.cached(name).is_file()
    with console.Reporter() as report:
        path = weights.fetch(
            name,
            lambda done, total: report(Progress(task=f"get {name}", done=done, total=total or done, unit="bytes")),
        )
    found = {"name": str(name), "path": str(path), "worked": not there}
    console.result(found, str(path), as_json=as_json, written=[str(path)])
    _end(path.parent, [], ["doctor"], as_json=as_json)


@codec_app.command(
    "eval", epilog=_examples("codec eval mini ./wavs", "codec eval runs/codec/codec.pt ./wavs --out decoded")
)
def codec_eval(
    weights: Annotated[
        str,
        typer.Argument(metavar="WEIGHTS", help="A codec.pt, or a name such as mini.", autocompletion=completion.codecs),
    ],
    paths: Paths,
    out: Annotated[Path | None, _out("Keep the reconstructions in this folder.")] = None,
    no_report: NoReport = False,
    as_json: AsJson = False,
) -> None:
    """Compare sound with its reconstruction at every bandwidth, and with Opus."""
    from shortcut_cli.stages import early

    early.check_paths(paths)
    early.check_codec(weights)
    from shortcut_cli.stages import codec_evaluation

    with console.Reporter() as report:
        result = codec_evaluation.evaluate(weights, paths, out, report=report)
        signals.close()  # its files are complete, and would be in the way of the same command
        kept = codec_evaluation.keep(result, out, report)
        page = _refreshed(kept, no_report, report)
    written = endings.within(out) if out else endings.named(kept, ["codec-eval.json"]) if kept else []
    console.result(
        result | page,
        tables.codec_scores(result),
        *tables.account(result),
        as_json=as_json,
        written=_all(written, page),
    )
    then = ["prepare", "audio", *_few(paths), "--set", f"tokenizer.weights={weights}"]
    _end(kept or out or "", written, then, page=page, as_json=as_json)


@app.command(rich_help_panel="Check", epilog=_examples("doctor", "doctor --json"))
def doctor(as_json: AsJson = False) -> None:
    """Check what works on this machine, and say how to fix the rest."""
    from shortcut_cli.stages.doctor import examine

    checks = examine()
    console.result({"checks": checks}, *tables.checks(checks), as_json=as_json)


@app.command(rich_help_panel="Data", epilog=_examples("demo", "demo --out /tmp/demo --workers 2"))
def demo(
    out: Annotated[Path | None, _out("Folder of data, runs and samples; default: demo.")] = None,
    workers: Workers = None,
    device: Device = "auto",
    no_report: NoReport = False,
    as_json: AsJson = False,
) -> None:
    """Run every domain end to end on generated data, offline. Takes about three minutes on two CPU cores."""
    from shortcut_cli import files

    folder = out or Path("demo")
    files.check_held(folder, "shortcut demo")
    from shortcut_cli.stages import demo as stage

    with console.Reporter() as report:
        result = stage.demo(
            folder,
            n_workers=_count(workers),
            device=devices.choose(device),
            report=report,
            stop=signals,
            page=not no_report,
        )
        page = _refreshed(folder, no_report, report)
    written = endings.within(folder)
    console.result(
        result | page, tables.demo(result), "\n".join(result["samples"]), as_json=as_json, written=_all(written, page)
    )
    _end(folder, written, endings.after_demo(folder), page=page, as_json=as_json)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    install: Annotated[
        SHELLS | None, _among("--install-completion", SHELLS, "Set up completion with Tab in this shell.")
    ] = None,
    show: Annotated[SHELLS | None, _among("--show-completion", SHELLS, "Print the script that sets it up.")] = None,
) -> None:
    if version:
        console.text(f"{__version__}\n")
        raise typer.Exit(0)
    if install or show:
        _complete(install, show)
        raise typer.Exit(0)
    _help(context)


def _complete(install: str | None, show: str | None) -> None:
    """Set up completion in a shell, or print the script that does."""
    if install:
        console.text(f"{completion.install(install)}\n")
        console.note("completion begins in a new shell")
    if show:
        console.text(f"{completion.script(show)}\n")


def main() -> None:
    """The `shortcut` command."""
    guarded(lambda: dispatch(None))


def dispatch(arguments: list[str] | None) -> Any:
    """Run the command that `arguments` name; None: the arguments of this process.

    Raises UsageError, which points to the help of the command, if the arguments are wrong.
    """
    if console.COMPLETION in os.environ:
        completion.begin()
    try:
        return app(arguments, prog_name="shortcut", standalone_mode=False)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "shortcut"
        message = error.format_message().replace("Value error, ", "")  # pydantic's words, in newer versions of Typer
        if "Input should" in message:  # pydantic's words too, which do not say what it got
            wrong: list[Any] = getattr(error.__cause__, "errors", list)()
            message = message.partition(", unable to parse")[0] + "".join(
                f", got {one['input']!r}" for one in wrong[:1]
            )
        raise UsageError(message, then=f"{path} --help") from error
