"""Sampling speed: the loop of `shortcut sample` with two models, and Hugging Face's `generate` on a GPT-2 like them.

    python benchmarks/sample.py [--tokens 2000] [--rounds 3] [--streams 1 16 64] [--arms gpt "gpt bf16" transformers]

Shape: 6 layers, width 256, 8 heads, context 4,096, vocabulary 1,024, random weights, temperature 1, fp32; rows "bf16"
with `sample.precision = "bf16"`. The arms alternate in one process. Printed for each, medians over the rounds: tokens/s
of all streams together, by the clock and by CPU seconds (others may use the machine); how many times the tokens/s of
`generate` that is, by CPU seconds; CPU milliseconds of a step, mean of tokens 75 to 125 and of the last 50; and the
second divided by the first. Without `transformers` installed, its row is left out.
"""

import argparse
import statistics
import time

import torch

from shortcut_cli import registry
from shortcut_cli.config import reading
from shortcut_cli.inference import decoding, generate

CONTEXT, VOCABULARY, PEER = 4096, 1024, "transformers"


def ours(name, tokens, streams, precision="fp32"):
    """A function that samples and returns when each token was done: by the clock, and in CPU seconds."""
    settings = ["layers=6", "width=256", "heads=8", "ffn=1024", f"context={CONTEXT}", "activation=gelu", "tied=true"]
    settings += ["qk_norm=false", "init=gpt2", "shortcut.map_width=1024"]
    config = reading.read("music", [f"model.{s}" for s in settings] + [f"model.name={name}", f"eval.stride={CONTEXT}"])
    model = registry.load(registry.MODELS, name)(config.model, VOCABULARY, 1).eval()
    sampler = config.sample.model_copy(update={"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0})

    def run():
        times = [now()]
        with decoding.prepared(model, streams, precision):
            generate.generate(
                model,
                torch.zeros(streams, 1, dtype=torch.int64),
                tokens,
                config=sampler,
                eos=-1,
                progress=lambda _: times.append(now()),
            )
        return times

    return run


def now():
    """The clock and the CPU seconds of this process."""
    return time.perf_counter(), time.process_time()


def hugging_face(tokens, streams):
    """The same for transformers' GPT-2 and its own `generate`."""
    from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessor, LogitsProcessorList

    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=256, n_layer=6, n_head=8, bos_token_id=0, eos_token_id=None
    )
    model = GPT2LMHeadModel(config).eval()

    class Clock(LogitsProcessor):
        def __call__(self, _, scores):
            times.append(now())
            return scores

    times = []

    def run():
        times.clear()
        prompt = torch.zeros(streams, 1, dtype=torch.int64)
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            top_k=0,
            max_new_tokens=tokens + 1,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([Clock()]),
        )
        return list(times)

    return run


def compare(streams, tokens, rounds, chosen):
    """Print a row for each arm."""
    arms = {
        "gpt": ours("gpt", tokens, streams),
        "gpt bf16": ours("gpt", tokens, streams, "bf16"),
        "shortcut": ours("shortcut", tokens, streams),
        "shortcut bf16": ours("shortcut", tokens, streams, "bf16"),
    }
    try:
        arms[PEER] = hugging_face(tokens, streams)
    except ModuleNotFoundError as error:
        print(f"{PEER} is left out: {error}")
    arms = {name: run for name, run in arms.items() if not chosen or name in chosen}
    found = {name: [] for name in arms}
    for _ in range(rounds):
        for name, run in arms.items():
            clock, cpu = zip(*run(), strict=True)
            rates = (streams * (len(times) - 1) / (times[-1] - times[0]) for times in (clock, cpu))
            early, late = (1000 * (cpu[end] - cpu[end - 50]) / 50 for end in (125, len(cpu) - 1))
            found[name].append((*rates, early, late, late / early))
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    peer = medians.get(PEER, [0, float("nan")])[1]
    for name, (rate, by_cpu, early, late, growth) in medians.items():
        values = f"{rate:>10,.0f}{by_cpu:>10,.0f}{by_cpu / peer:>8.2f}{early:>10.2f}{late:>10.2f}{growth:>8.2f}"
        print(f"{streams:>7} {name:<14}{values}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="+", default=[1])
    parser.add_argument("--arms", nargs="+", default=[])
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.tokens} tokens")
    late = f"at {options.tokens:,}"
    rest = f"{'tokens/s':>10}{'by CPU s':>10}{'x peer':>8}{'ms at 100':>10}{late:>10}{'ratio':>8}"
    print(f"{'streams':>7} {'arm':<14}{rest}")
    for streams in options.streams:
        compare(streams, options.tokens, options.rounds, options.arms)


if __name__ == "__main__":
    main()
