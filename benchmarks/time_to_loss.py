"""Time to nanoGPT's final loss: nanoGPT, nanochat and `shortcut train` on the same ids, each run in its own process.

    python benchmarks/time_to_loss.py letters FILE --nanogpt FOLDER --nanochat FOLDER --out FOLDER
    python benchmarks/time_to_loss.py shards FOLDER --nanogpt FOLDER --nanochat FOLDER --out FOLDER --recipe NAME

The folders are checkouts of github.com/karpathy/nanoGPT and github.com/karpathy/nanochat; their code is imported from
there, and none of it is in this project.

`letters` is nanoGPT's own example for a CPU (its README, "I only have a macbook"): characters of tinyshakespeare, of
which FILE is the text, the first 90 % for training; its train.py with config/train_shakespeare_char.py and the
README's flags. `shards` takes any prepared shards, and a model of 6 layers and width 192 with a context of 256;
nanoGPT's train.py has its defaults, but for size, batch, length, a warm-up of a tenth of the steps, and the learning
rate, of which the best of --rates counts. It computes in fp32 on a CPU.

nanoGPT runs first, at each rate (min_lr is a tenth of it); its losses are the goals. nanochat's model and optimizer
have the hyperparameters and the schedules of its scripts/base_train.py, scaled to batch and model as that script does,
times each factor in --nanochat-rates. `shortcut train` has the recipe with the settings of SHORT (how they were found:
docs/experiments.md) or those of --ours, in each of --precisions; loss and times of a length are means over --seeds.
Lengths of both grow by a quarter until a goal is reached, at most to as many tokens as nanoGPT sees, and are then
narrowed down to 3 %; or they are --lengths, shortest first. The time of a goal is that of the whole shortest run that
reaches it, from its first step to its last.

All train on the ids of the same training split, have the same layers, width, heads and context (parameters are
printed) and are scored by the same code on the same windows of the validation split, spread evenly over it. Validation
and imports are not in the times, nor is what torch.compile takes for nanochat; a run's saving of its weights is. CPU
seconds are those of all threads: on a machine that others use too, they say more than the wall clock.
"""

import argparse
import ast
import json
import math
import multiprocessing
import os
import pickle
import platform
import runpy
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from shortcut_cli.config import reading
from shortcut_cli.data.shards import Shards
from shortcut_cli.data.workers import keep_freed_memory
from shortcut_cli.inference import runs
from shortcut_cli.kernels import bf16
from shortcut_cli.models.loss import loss as cross_entropy
from shortcut_cli.stages.preparation import prepare
from shortcut_cli.stages.training import train
from shortcut_cli.training.trainer import Trainer, validation_starts

README_STEPS = 2000
README_FLAGS = [
    *("--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1", "--block_size=64", "--batch_size=12"),
    *(
        "--n_layer=4",
        "--n_head=4",
        "--n_embd=128",
        f"--max_iters={README_STEPS}",
        f"--lr_decay_iters={README_STEPS}",
        "--dropout=0.0",
    ),
]
NANOCHAT_OPTIONS = (  # of scripts/base_train.py, whose defaults are used
    *("unembedding_lr", "embedding_lr", "matrix_lr", "scalar_lr"),
    *("weight_decay", "warmup_steps", "warmdown_ratio", "final_lr_frac"),
)
SETTINGS = [
    *("train.optimizer=muon", "train.schedule=wsd", "train.decay=1", "train.min_lr=0", "train.momentum_warmup=200"),
    *("model.init=fan_in", "model.qk_norm=false"),
]
PIECES = [
    *("train.lr=0.016", "train.matrix_lr=2.5", "train.batch_size=4", "train.momentum=0.9", "train.beta1=0.8"),
    *("train.warmup=10", "model.tied=false", "model.activation=gelu"),
]
SHORT = {  # settings of short runs, by what is learned
    "letters": [
        *("train.lr=0.016", "train.matrix_lr=2.5", "train.batch_size=16", "train.momentum=0.85", "train.beta1=0.8"),
        *("train.warmup=20", "model.tied=false", "model.activation=relu2"),
    ],
    "text": PIECES,
    "midi": PIECES,
    "audio": [
        *(
            "train.lr=0.1",
            "train.matrix_lr=0.375",
            "train.batch_size=3",
            "train.momentum=0.8",
            "train.momentum_warmup=1",
        ),
        *("train.beta1=0.8", "train.warmup=3", "model.tied=true", "model.activation=relu2"),
    ],
}
GROWTH, NARROW = 1.25, 0.03  # of the lengths that are tried
NANOCHAT_BATCH = 2**19  # tokens: B_REF of scripts/base_train.py
SCORED_TOKENS = 2**17  # of the validation split, at most


@dataclass
class Task:
    """What all have in common."""

    shards: str
    layers: int
    width: int
    heads: int
    context: int
    batch: int  # windows per step
    threads: int
    peer_flags: list[str]  # of nanoGPT's train.py
    recipe: str

    def settings(self):
        """Size, data and batch, as settings of a recipe."""
        made = Shards(Path(self.shards)).manifest["request"]["tokenizer"]
        return [
            *(reading.Setting(f"tokenizer.{key}", value, key) for key, value in made.items() if key != "name"),
            "model.name=gpt",
            f"model.layers={self.layers}",
            f"model.width={self.width}",
            f"model.heads={self.heads}",
            f"model.ffn={4 * self.width}",
            f"model.context={self.context}",
            "model.dropout=0.0",
            f"eval.stride={self.context}",
            f"data.shards={self.shards}",
            f"train.batch_size={self.batch}",
        ]


@dataclass
class Clock:
    """Wall-clock and CPU seconds of this process, validation excluded."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    since: tuple[float, float] | None = field(default=None, repr=False)

    def go(self):
        if self.since is None:
            self.since = time.perf_counter(), time.process_time()

    def stop(self):
        if self.since is not None:
            self.wall_s += time.perf_counter() - self.since[0]
            self.cpu_s += time.process_time() - self.since[1]
            self.since = None

    @contextmanager
    def running(self):
        self.go()
        yield
        self.stop()


def score(logits, task):
    """Nats per token over the windows of the validation split. logits: of inputs (B, T) -> (B, T, V)."""
    split = Shards(Path(task.shards)).split("val")
    starts = validation_starts(split, task.context, SCORED_TOKENS // task.context)
    total = 0.0
    with torch.no_grad():
        for first in range(0, len(starts), 16):
            part = starts[first : first + 16]
            ids = torch.from_numpy(np.stack([split.read(start, task.context + 1) for start in part]))
            total += cross_entropy(logits(ids[:, :-1].contiguous()), ids[:, 1:]).item() * len(part)
    return total / len(starts)


def result(task, clock, logits, model, steps):
    parameters = sum(p.numel() for p in model.parameters())
    return {"loss": score(logits, task), "wall_s": clock.wall_s, "cpu_s": clock.cpu_s} | {
        "steps": steps,
        "tokens": steps * task.batch * task.context,
        "parameters": parameters,
    }


# nanoGPT


def nanogpt(task, folder, rate):
    """Run its own train.py, unaltered, in a folder with the ids as it wants them."""
    clock, peer = Clock(), Path(folder).resolve()
    sys.path.insert(0, str(peer))
    import model as peer_model

    # Its estimate_loss calls eval() first and train() last.
    whole, back = peer_model.GPT.eval, peer_model.GPT.train

    def to_eval(self):
        clock.stop()
        return whole(self)

    def to_train(self, mode=True):
        if mode:
            clock.go()
        return back(self, mode)

    peer_model.GPT.eval, peer_model.GPT.train = to_eval, to_train
    with tempfile.TemporaryDirectory() as scratch:
        _nanogpt_folder(Path(scratch), peer, task)
        os.chdir(scratch)
        own = [] if rate is None else [f"--learning_rate={rate!r}", f"--min_lr={rate / 10!r}"]
        sys.argv = ["train.py", *task.peer_flags, "--dataset=ids", "--out_dir=out", *own]
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), clock.running():
            end = runpy.run_path(str(peer / "train.py"), run_name="__main__")
        os.chdir("/")
    trained = end["raw_model"].eval()
    found = result(task, clock, lambda x: trained(x, x)[0], trained, end["iter_num"])
    return found | {"rate": end["learning_rate"], "warmup": end["warmup_iters"]}


def _nanogpt_folder(scratch, peer, task):
    for name in ("configurator.py", "config"):
        (scratch / name).symlink_to(peer / name)
    data, shards = scratch / "data" / "ids", Shards(Path(task.shards))
    data.mkdir(parents=True)
    for name in ("train", "val"):
        split = shards.split(name)
        split.read(0, split.tokens).astype(np.uint16).tofile(data / f"{name}.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": shards.tokenizer["vocabulary"]}))


# nanochat


def nanochat(task, folder, factor, steps, compiled):
    """Its model, optimizer and schedules; data as nanoGPT draws them: windows at random places."""
    os.environ["NANOCHAT_DTYPE"] = "float32"
    sys.path.insert(0, str(Path(folder).resolve()))
    from nanochat.gpt import GPT, GPTConfig

    shards = Shards(Path(task.shards))
    vocabulary, split = shards.tokenizer["vocabulary"], shards.split("train")
    defaults, schedules = _base_train(Path(folder) / "scripts" / "base_train.py")

    def build(layers, width, heads, context):
        config = GPTConfig(context, vocabulary, layers, heads, heads, width, "L")
        with torch.device("meta"):
            return GPT(config)

    def scaling(model):
        counts = model.num_scaling_params()
        return counts["transformer_matrices"] + counts["lm_head"]

    with redirect_stdout(sys.stderr):
        reference = build(12, 768, 6, 2048)
        torch.manual_seed(1337)
        model = build(task.layers, task.width, task.heads, task.context).to_empty(device="cpu")
        model.init_weights()
        batch_ratio = task.batch * task.context / NANOCHAT_BATCH
        decay = defaults["weight_decay"] * math.sqrt(batch_ratio) * scaling(reference) / scaling(model)
        rates = {name: defaults[name] * math.sqrt(batch_ratio) * factor for name in NANOCHAT_OPTIONS[:4]}
        at = schedules(num_iterations=steps, weight_decay_scaled=decay)
        _nanochat_steps(model, rates, decay, at, _draw(split, task, 3), compiled)  # so that all is compiled
        clock, batches = Clock(), _draw(split, task, steps)
        model.init_weights()
        with clock.running():
            _nanochat_steps(model, rates, decay, at, batches, compiled)
    model.eval()
    return result(task, clock, model, model, steps) | {"rate": factor, "rates": rates, "weight_decay": decay}


def _draw(split, task, steps):
    ids, generator = split.read(0, split.tokens), np.random.default_rng(1337)
    for _ in range(steps):
        starts = generator.integers(0, len(ids) - task.context, task.batch)
        rows = torch.from_numpy(np.stack([ids[start : start + task.context + 1] for start in starts]))
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def _nanochat_steps(model, rates, decay, at, batches, compiled):
    optimizer = model.setup_optimizer(**rates, weight_decay=decay)
    forward = torch.compile(model, dynamic=False) if compiled else model
    for number, (x, y) in enumerate(batches):
        forward(x, y).backward()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * at["get_lr_multiplier"](number)
            if group["kind"] == "muon":
                group["momentum"] = at["get_muon_momentum"](number)
                group["weight_decay"] = at["get_weight_decay"](number)
        optimizer.step()
        model.zero_grad(set_to_none=True)


def _base_train(path):
    """The defaults of its options, and its schedules as functions of their globals, out of a script without main."""
    tree = ast.parse(path.read_text())
    defaults = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            name = ast.literal_eval(node.args[0]).strip("-").replace("-", "_")
            if name in NANOCHAT_OPTIONS:
                (value,) = (word.value for word in node.keywords if word.arg == "default")
                defaults[name] = ast.literal_eval(value)
    names = ("get_lr_multiplier", "get_muon_momentum", "get_weight_decay")
    wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    code = compile(ast.Module(wanted, []), str(path), "exec")

    def schedules(**names):
        space = {"math": math, "args": argparse.Namespace(**defaults), **names}
        exec(code, space)
        return space

    return defaults, schedules


# ours


def ours(task, settings, steps):
    """`shortcut train` itself; the only validation is at the end."""
    clock, forward = Clock(), Trainer.validation_loss

    def without_clock(trainer):
        clock.stop()
        try:
            return forward(trainer)
        finally:
            clock.go()

    Trainer.validation_loss = without_clock
    own = [f"train.steps={steps}", f"train.eval_every={steps}", "train.eval_windows=1", f"train.threads={task.threads}"]
    recipe = reading.read(task.recipe, [*task.settings(), *settings, *own])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        with clock.running():
            train(
                recipe,
                folder,
                device="cpu",
                resume="never",
                report=lambda _: None,
                stop=nullcontext(lambda: None),
            )
        run = runs.open_run(folder / "run.pt", "cpu")
    task = Task(**{**asdict(task), "batch": recipe.train.batch_size})
    return result(task, clock, run.model, run.model, steps) | {"rate": recipe.train.lr}


# the comparison


def begin(threads):
    torch.set_num_threads(threads)


def one(function, task, *arguments):
    """The result of one run, in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, begin, (task.threads,)) as pool:
        return pool.submit(function, task, *arguments).result()


def show(who, found):
    print(
        f"{who:<10}{found['rate']:>10.4g}{found['steps']:>8,}{found['tokens']:>12,}{found['parameters']:>11,}"
        f"{found['loss']:>9.4f}{found['wall_s']:>9.1f}{found['cpu_s']:>9.1f}"
        f"{'  ' * ('losses' in found)}{', '.join(f'{loss:.4f}' for loss in found.get('losses', []))}",
        flush=True,
    )
    return found | {"who": who}


def search(who, goals, lengths, run):
    """Train at ever more steps until all goals are reached; returns every run."""
    found = []
    for steps in lengths:
        found.append(show(who, run(steps)))
        if found[-1]["loss"] <= min(goals.values()):
            break
    return found


def narrowed(who, goals, last, run):
    """The same at steps that grow up to `last`; those that reach a goal are narrowed down."""
    found = {}

    def reaches(steps, goal):
        if steps not in found:
            found[steps] = show(who, run(steps))
        return found[steps]["loss"] <= goal

    for goal in sorted(goals.values(), reverse=True):
        low, high = 0, max(1, last // 10)
        while not reaches(high, goal) and high < last:
            low, high = high, min(last, math.ceil(high * GROWTH))
        while reaches(high, goal) and high - low > max(1, NARROW * high):
            middle = (low + high) // 2
            low, high = (low, middle) if reaches(middle, goal) else (middle, high)
    return list(found.values())


def over_seeds(task, settings, steps, seeds):
    """Means over the seeds, whose own losses are kept."""
    found = [one(ours, task, [*settings, f"train.seed={seed}"], steps) for seed in range(1, seeds + 1)]
    means = {name: statistics.mean(run[name] for run in found) for name in ("loss", "wall_s", "cpu_s")}
    return found[0] | means | {"losses": [run["loss"] for run in found]}


def letters(path, out, threads):
    """nanoGPT's example: every character of the file is a letter of the alphabet; 90 % for training, the rest to
    validate."""
    text = Path(path).read_text(encoding="utf-8")
    held = len(text) - int(len(text) * 0.9)
    settings = {
        "tokenizer.algorithm": "chars",
        "tokenizer.alphabet": "".join(sorted(set(text))),
        "data.split": "contiguous",
        "data.val": held / len(text),
        "data.test": 1e-12,  # nothing
        "data.shards": str(out / "letters"),
    }
    given = [reading.Setting(key, value, key) for key, value in settings.items()]
    recipe = reading.read("text", given)
    prepare(recipe, [path], out / "letters", n_workers=1, max_bad="0", report=lambda _: None)
    return Task(
        str(out / "letters"), 4, 128, 4, 64, 12, threads, ["config/train_shakespeare_char.py", *README_FLAGS], "text"
    )


def from_shards(options):
    batch, context, steps = options.batch, 256, options.steps
    flags = [
        f"--{key}={value}"
        for key, value in {
            "device": "cpu",
            "compile": False,
            "gradient_accumulation_steps": 1,
            "batch_size": batch,
            "block_size": context,
            "n_layer": 6,
            "n_head": 6,
            "n_embd": 192,
            "max_iters": steps,
            "lr_decay_iters": steps,
            "warmup_iters": steps // 10,
            "eval_interval": steps,
            "eval_iters": 1,
        }.items()
    ]
    return Task(options.path, 6, 192, 6, context, batch, options.threads, flags, options.recipe)


def numbers(text):
    return [float(part) for part in text.split(",")]


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["letters", "shards"])
    parser.add_argument("path", help="the text, or the shards folder")
    parser.add_argument("--nanogpt", metavar="FOLDER")
    parser.add_argument("--nanochat", metavar="FOLDER")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="for the letters' shards and result.json")
    parser.add_argument("--recipe", default="text", help="shards: the recipe that they were prepared with")
    parser.add_argument(
        "--ours", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the recipe in place of those of SHORT"
    )
    usual = ["fp32", "bf16"] if bf16.native() else ["fp32"]
    parser.add_argument("--precisions", nargs="*", default=usual, choices=["fp32", "bf16"], help="of ours")
    parser.add_argument("--seeds", type=int, default=2, help="of ours")
    parser.add_argument("--rates", type=numbers, help="nanoGPT's; default: its own, 2 and 4 times that")
    parser.add_argument("--nanochat-rates", type=numbers, default=[1.0], help="factors on its own rates")
    parser.add_argument("--lengths", type=numbers, help="steps of ours; default: searched for")
    parser.add_argument("--nanochat-lengths", type=numbers, help="default: --lengths, or searched for")
    parser.add_argument("--steps", type=int, default=200, help="shards: nanoGPT's")
    parser.add_argument("--batch", type=int, default=8, help="shards: nanoGPT's windows per step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eager", action="store_true", help="nanochat's model without torch.compile")
    parser.add_argument("--goal", type=float, help="nats per token, in place of running nanoGPT")
    options = parser.parse_args()
    if not options.nanogpt and options.goal is None:
        parser.error("--nanogpt FOLDER or --goal NATS")
    return options


def main():
    options = parse()
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    options.path = str(Path(options.path).resolve())
    task = letters(options.path, out, options.threads) if options.task == "letters" else from_shards(options)
    recipe = reading.read(task.recipe, task.settings())
    domain = "letters" if options.task == "letters" else recipe.tokenizer.name
    settings = options.ours or [*SETTINGS, *SHORT[domain]]
    tokens = task.batch * (README_STEPS if options.task == "letters" else options.steps)  # in windows
    last = tokens // reading.read(task.recipe, [*task.settings(), *settings]).train.batch_size
    print(
        f"torch {torch.__version__}, {options.threads} threads, {torch.backends.cpu.get_cpu_capability()}, "
        f"{platform.machine()}, load {os.getloadavg()[0]:.1f}"
    )
    print(f"nanoGPT: train.py {' '.join(task.peer_flags)}")
    print(f"ours: {' '.join([*(each for each in task.settings() if isinstance(each, str)), *settings])}")
    print(f"{'':<10}{'rate':>10}{'steps':>8}{'tokens':>12}{'parameters':>11}{'loss':>9}{'wall s':>9}{'CPU s':>9}")
    own_rate = 1e-3 if options.task == "letters" else 6e-4
    peers = [
        show("nanoGPT", one(nanogpt, task, options.nanogpt, rate))
        for rate in (options.rates or [own_rate, 2 * own_rate, 4 * own_rate])
        if options.goal is None
    ]
    goals = {"goal": options.goal} if not peers else {"first rate": peers[0]["loss"]}
    if peers:
        goals["best rate"] = min(run["loss"] for run in peers)
    found = list(peers)

    def tried(who, lengths, last, run):
        found.extend(search(who, goals, map(int, lengths), run) if lengths else narrowed(who, goals, last, run))

    for factor in options.nanochat_rates if options.nanochat else []:
        chat = (options.nanochat, factor)
        lengths = options.nanochat_lengths or options.lengths
        tried(
            *("nanochat", lengths, tokens // task.batch),
            lambda n, chat=chat: one(nanochat, task, *chat, n, not options.eager),
        )
    for precision in options.precisions:
        given = [*settings, f"train.precision={precision}"]
        who = "shortcut" if precision == "fp32" else "in bf16"
        tried(who, options.lengths, last, lambda n, given=given: over_seeds(task, given, n, options.seeds))
    summary = conclude(goals, peers, found)
    made = {"task": asdict(task) | {"shards": Path(task.shards).name}, "ours": settings, "runs": found}
    (out / "result.json").write_text(json.dumps(made | summary, indent=1))


def conclude(goals, peers, found):
    """For each goal, the quickest run of each that reaches it, beside nanoGPT's own."""
    times = {}
    for name, goal in goals.items():
        reference = min(peers, key=lambda run: run["loss"]) if name == "best rate" else peers[0] if peers else None
        at = f", nanoGPT at {reference['rate']:g}" if reference else ""
        print(f"\n{goal:.4f} nats per token ({name}{at})")
        times[name] = {}
        for who in dict.fromkeys(run["who"] for run in found):
            reached = [run for run in found if run["who"] == who and run["loss"] <= goal]
            quickest = reference if who == "nanoGPT" else min(reached, key=lambda run: run["cpu_s"], default=None)
            times[name][who] = quickest
            if quickest is None:
                print(f"  {who:<10}not reached")
                continue
            ratio = f", {quickest['cpu_s'] / reference['cpu_s']:.2f} of nanoGPT's CPU" if reference else ""
            ratio += f", {quickest['wall_s'] / reference['wall_s']:.2f} of its wall time" if reference else ""
            print(
                f"  {who:<10}{quickest['wall_s']:8.1f} s wall,{quickest['cpu_s']:8.1f} s CPU, "
                f"{quickest['steps']:,} steps at {quickest['rate']:g}{ratio}"
            )
    return {"goals": goals, "times": times}


if __name__ == "__main__":
    keep_freed_memory()
    main()
