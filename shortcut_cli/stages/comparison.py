"""Compare architectures on the same data with baselines of their cost, over seeds. Finished runs are skipped.

Each run has an ordinary run folder, as from `shortcut train` and `shortcut eval`, and a process of its own, so that its
peak memory can be measured and several devices work in parallel.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from shortcut_cli import SCHEMA_VERSION, files
from shortcut_cli.compare import looks
from shortcut_cli.compare.arms import Arm, plan, reaching
from shortcut_cli.compare.asked import BASELINE, COMPARISON, check, check_seeds, is_comparison, ladder
from shortcut_cli.compare.contrasts import LADDER, Judge, Named, gate, judged, notices
from shortcut_cli.compare.rates import Curve, search
from shortcut_cli.compare.runner import PlannedRun, Runner, differing, pilots
from shortcut_cli.config import reading
from shortcut_cli.config.schema import MOST_RATE, SEED, Recipe, binding
from shortcut_cli.data import executors
from shortcut_cli.data.shards import Shards, warning
from shortcut_cli.errors import CheckFailed, UsageError
from shortcut_cli.events import Note, Report
from shortcut_cli.formatting import to_json
from shortcut_cli.inference import floors
from shortcut_cli.kept import floors as kept_floors
from shortcut_cli.kept.inputs import differences, read
from shortcut_cli.registry import Match
from shortcut_cli.report import assemble
from shortcut_cli.report.comparison import to_sample
from shortcut_cli.report.page import attempted
from shortcut_cli.training.loop import Stop


def compare(
    resolved: Recipe,
    models: Sequence[str],
    out: Path,
    *,
    seeds: int,
    match: Match,
    lrs: Sequence[float],
    margin: float,
    devices: Sequence[str],
    report: Report,
    stop: Stop,
    rungs: Sequence[str] = (),
    pairs: Sequence[tuple[str, str]] = (),
    most_seeds: int = 0,
    page: bool = True,
    task: tuple[int, int] | None = None,
    executor: str = "local",
    run_cpus: int = 1,
    ray_address: str = "",
) -> dict[str, Any]:
    """Train and score every arm and its baselines, and write compare.json and, if `page`, report.html into `out`.

    match: what a baseline shares with its arm; with a ladder, the cost that it is laid over. lrs: learning rates that
    the search on pilots begins with; of fewer than two, that one, or the recipe's, serves all arms. margin: of
    equivalence, in nats per token. rungs: see `asked.ladder`. pairs: of arms that are compared with each other too.
    most_seeds: how many there may be in the end; 0: as many as now, or as were planned. Returns the content of
    compare.json, and the path of the page as "report", or as "no_report" why it could not be written.
    docs/protocol.md says what is tested, and how.

    task: the number of this machine, from 1, and of all that see the folder and share the runs. Then nothing is judged
    and no file but runs and comparison.json written; "task", "runs" and "mine" say how many runs there are, and how
    many were this task's. Raises Missing if what comes next depends on runs that others have not done yet.

    executor: "ray" trains each run as a task of a Ray cluster with `run_cpus` CPUs, and a GPU if that is the device.

    Raises UsageError if a model is unknown or `out` holds a different comparison, Interrupted after a signal; the same
    command then resumes.
    """
    check(resolved, models, rungs, pairs)
    with ExitStack() as stack:
        elsewhere: executors.Cluster | None = None
        if executor == "ray":
            elsewhere, device = stack.enter_context(
                executors.cluster(devices[0], cpus=run_cpus, ray_address=ray_address)
            )
            devices = [device]
        stack.enter_context(files.held(out, "shortcut compare", known=is_comparison, shared=task is not None))
        shards = Shards(files.place(resolved.data.shards))
        checksum = shards.manifest["checksum"]
        if unfinished := warning(files.place(resolved.data.shards), shards.manifest):
            report(Note(text=unfinished))
        vocabulary, scored = shards.tokenizer["vocabulary"], shards.split(resolved.eval.split).tokens
        runner = Runner(out, devices, report, checksum, vocabulary, task or (1, 1), scored, elsewhere, threads=run_cpus)
        kept = _check_same(out, resolved, match, checksum, rungs)
        planned = _planned(kept, seeds, most_seeds)
        runner.check_shards()
        first = resolved.train.seed
        numbers = range(first, first + seeds)
        with stop as asked:
            runner.asked = asked
            arms = plan(resolved, models, vocabulary, match, runner.step_seconds, rungs)
            named = _named(arms, pairs, rungs, report)
            _warn(arms, vocabulary, match, bool(rungs), report)
            files.write(out / COMPARISON, to_json(kept, indent=1) + "\n")  # a command that is wrong leaves nothing
            rates = list(lrs) or [resolved.train.lr]
            runner.expect([PlannedRun(arm, rates[0], seed) for seed in numbers for arm in _left(arms)])
            tried = choose(arms, rates, runner)
            named = [Named(one.arm, arms[one.arm].baselines[0], True) if one.matched else one for one in named]
            runs = [PlannedRun(arm, arm.lr, seed) for seed in numbers for arm in arms.values()]
            runner.run(runs, last=True)
        if task:
            return {"task": "/".join(map(str, task)), "runs": len(runs), "mine": len(runner.mine(runs))}
        rows = {label: runner.row(arm, numbers) for label, arm in arms.items()}
        if changed := differing(rows.values()):
            report(Note(text=f"the runs were not all trained under the same conditions: {changed}"))
        predictors = _floors(out, shards, resolved.eval.split, report)
        entrance = gate(rows, predictors)
        judge = Judge(arms, rows, match if rungs else None, margin)
        looked, spent = _look(kept, [one.name for one in named], seeds, planned)
        found = judged(judge, named, len(looked["family"]), spent, not entrance["open"])
        twin = Named("twin", LADDER if rungs else BASELINE)
        batch = resolved.train.batch_size * resolved.model.context
        result = {
            "schema_version": SCHEMA_VERSION,
            "recipe": resolved.model_dump(),
            "shards": checksum,
            "split": resolved.eval.split,
            "match": match,
            "ladder": judge.described(),
            "margin_nats": margin,
            "tokens_per_step": batch,
            "epochs": resolved.train.steps * batch / shards.split("train").tokens,
            "floors": predictors,
            "gate": entrance,
            "pilots": tried,
            "looks": looked,
            "arms": [{key: value for key, value in row.items() if key != "groups"} for row in rows.values()],
            "aa": judge.content(twin, *judge.test(twin)),
            **found,
        }
        result["notices"] = notices(result, judge.uneven())
        if entrance["open"]:
            files.write(
                out / COMPARISON, to_json((read(out / COMPARISON) or kept) | {"looks": looked}, indent=1) + "\n"
            )
        files.write(out / "compare.json", to_json(result, indent=1) + "\n")
        return result | (_page(out) if page else {})


def commands(out: Path) -> list[str]:
    """The commands that make samples of arms that have none, see `to_sample`."""
    return to_sample(out)


def _page(out: Path) -> dict[str, str]:
    """Write the page, see `attempted`."""
    return attempted(lambda: assemble.write([out])["report"])


def _named(
    arms: Mapping[str, Arm], pairs: Sequence[tuple[str, str]], rungs: Sequence[str], report: Report
) -> list[Named]:
    """The contrasts that are named before anything is trained, each once; a note says which was named again."""
    asked = [label for label, arm in arms.items() if arm.role == "asked"]
    every = [Named(label, LADDER) if rungs else Named(label, "", matched=True) for label in asked]
    named = {one.name: one for one in every}
    for pair in pairs:
        # That of an arm with its only baseline, as with --match none, has the arm's own name.
        only = [arm for arm, other in (pair, pair[::-1]) if arms[arm].baselines == [other]]
        one = Named(only[0], "", matched=True) if only else Named(*pair)
        if one.name in named:
            report(
                Note(text=f"--contrast {':'.join(pair)} is among the contrasts already ({one.name}): it counts once")
            )
        named.setdefault(one.name, one)
    return [*named.values()]


def _warn(arms: Mapping[str, Arm], vocabulary: int, match: Match, laddered: bool, report: Report) -> None:
    """Say, before anything is trained, which arms will be beyond the ladder. Seconds are not known before."""
    if not laddered or match == "time":
        return
    costs = {label: arm.size.of(match) for label, arm in arms.items()}
    rungs = [cost for label, cost in costs.items() if arms[label].role in ("plain", "rung")]
    for label, cost in costs.items():
        if not min(rungs) <= cost <= max(rungs):
            width = reaching(arms[BASELINE].recipe, vocabulary, match, cost, cost > max(rungs))
            report(
                Note(
                    text=f"{label} ({cost:,} {match}) will not be compared with the ladder, whose rungs have "
                    f"{min(rungs):,} to {max(rungs):,}: {f'add {width} to' if width else 'name others in'} --ladder"
                )
            )


def _planned(kept: dict[str, Any], seeds: int, most_seeds: int) -> int:
    """The largest number of seeds that this comparison may have, for the levels of its looks.

    Raises UsageError if verdicts were given under another plan.
    """
    check_seeds(seeds, most_seeds)
    before = kept.get("looks", {}).get("planned", 0)
    if before and most_seeds not in (0, before):
        raise UsageError(
            f"verdicts have been given under the plan of at most {before} seeds, not {most_seeds}",
            "leave --most-seeds out, or choose another --out",
        )
    return before or max(most_seeds, seeds)


def _look(
    kept: dict[str, Any], names: Sequence[str], seeds: int, planned: int
) -> tuple[dict[str, Any], Callable[[float], float]]:
    """The looks at this comparison with today's, the last one, and what part of a level it may use.

    The family is every contrast that was ever named, so that leaving some out makes no other test easier.
    """
    before = kept.get("looks", {})
    at = sorted({*before.get("seeds", []), seeds})
    family = [*dict.fromkeys([*before.get("family", []), *names])]
    found = {"planned": planned, "seeds": at, "family": family}
    return found, lambda level: looks.nominal(level, [count for count in at if count <= seeds], planned)


def _floors(out: Path, shards: Shards, split: str, report: Report) -> dict[str, Any]:
    """What simple predictors reach on the split: those kept in comparison.json, or new ones, which are kept there."""
    path, checksum = out / COMPARISON, shards.manifest["checksum"]
    inputs = kept_floors.made_from(checksum, checksum, split, floors.ORDER, floors.MOST_TOKENS)
    content = read(path) or {}
    found: dict[str, Any] = content.get("floors", {})
    if not kept_floors.is_usable(found, inputs):
        found = kept_floors.sealed(inputs, floors.measure(shards, shards, split, report))
        files.write(path, to_json(content | {"floors": found}, indent=1) + "\n")
    return found


def _check_same(out: Path, resolved: Recipe, match: Match, shards: str, rungs: Sequence[str]) -> dict[str, Any]:
    """The content of comparison.json. Raises UsageError if it is there with another recipe, match, ladder or shards.

    Models and seeds may be added. The keys of the recipe that count are those that determine the weights of a gpt of
    this shape, since it is in every comparison; the options of other architectures bind their own runs. Raises
    CheckFailed if comparison.json is damaged.
    """
    path = out / COMPARISON
    kept = read(path)
    plain = reading.with_settings(resolved, [f"model.name={BASELINE}"])
    inputs: dict[str, Any] = {"recipe": binding(plain.model_dump()), "match": match, "shards": shards}
    if rungs:
        shapes = [rung.model for rung in ladder(plain, rungs)]
        inputs["ladder"] = [f"{shape.layers}x{shape.width}" for shape in shapes]
    changes = [] if kept is None else differences(kept.get("inputs"), inputs)
    if changes:
        raise UsageError(
            f"{out} holds a different comparison\n" + "\n".join(f"  {line}" for line in changes),
            "choose another --out",
        )
    if not _are_looks((kept or {}).get("looks", {})):
        raise CheckFailed(f"{path} is damaged: its looks are no table", "move it away, then run the same command again")
    return kept or {"schema_version": SCHEMA_VERSION, "inputs": inputs}


def _are_looks(found: Any) -> bool:
    """Whether something has the form of what `_look` keeps; nothing has it too."""
    if not isinstance(found, dict):
        return False
    planned, seeds, family = found.get("planned", 1), found.get("seeds", []), found.get("family", [])
    return (
        isinstance(seeds, list)
        and all(type(count) is int and 0 < count < SEED for count in (planned, *seeds))
        and isinstance(family, list)
        and all(isinstance(name, str) for name in family)
    )


def _left(arms: Mapping[str, Arm]) -> list[Arm]:
    """The arms that are left after the pilots, as far as it is known: of several baselines of an arm the first."""
    used = {arm.baselines[0] for arm in arms.values() if arm.baselines}
    return [arm for label, arm in arms.items() if arm.role != "matched" or label in used]


def choose(arms: dict[str, Arm], rates: list[float], runner: Runner) -> dict[str, Any]:
    """Give each arm its learning rate, and of several baselines that match it one, by pilots; the others are dropped.

    Returns what the pilots showed, by arm: the sensitivity curves.
    """
    curves: dict[str, Curve] = {}

    def run(labels: Sequence[str], grid: Sequence[float]) -> dict[str, Curve]:
        runs = {label: {rate: pilots(arms[label], rate) for rate in grid} for label in labels}
        runner.run([one for by_rate in runs.values() for each in by_rate.values() for one in each])
        return {
            label: Curve({rate: [runner.result(one).validation for one in each] for rate, each in by_rate.items()})
            for label, by_rate in runs.items()
        }

    if len(set(rates)) > 1:
        curves = search(rates, lambda grid: run([*arms], grid), MOST_RATE)
    rivals = [label for arm in arms.values() if len(arm.baselines) > 1 for label in arm.baselines]
    if rivals and not curves:
        curves = run([*dict.fromkeys(rivals)], rates[:1])
    for label, arm in arms.items():
        arm.lr = curves[label].chosen() if len(set(rates)) > 1 else rates[0]
        if label in curves:
            arm.tried = {repr(rate): losses for rate, losses in curves[label].losses.items()}
    found = {label: _described(arms[label], curve) for label, curve in curves.items()}
    for arm in arms.values():
        if len(arm.baselines) > 1:
            arm.baselines.sort(key=lambda label: curves[label].lowest())
    left = {arm.label for arm in _left(arms)}
    for label in [label for label in arms if label not in left]:
        del arms[label]
    return found


def _described(arm: Arm, curve: Curve) -> dict[str, Any]:
    """A sensitivity curve for compare.json."""
    some = pilots(arm, arm.lr)
    return {
        "steps": some[0].recipe().train.steps,
        "seeds": [one.seed for one in some],
        "validation": {repr(rate): losses for rate, losses in sorted(curve.losses.items())},
        "chosen": arm.lr,
        "at_edge": len(curve.losses) > 1 and curve.edge() != 0,
    }
