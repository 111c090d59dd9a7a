"""Sampling speed: the loop of `shortcut sample` with two models, and Hugging Face's `generate` on a GPT-2 like them.

    python benchmarks/sample.py [--tokens 2000] [--rounds 3]

Shape: 6 layers, width 256, 8 heads, context 4,096, vocabulary 1,024, random weights, temperature 1, one sample, fp32.
The arms alternate in one process. Printed for each: tokens/s over all tokens, and the time of the last 50 tokens
divided by that of tokens 75 to 125. Without `transformers` installed, its row is left out.
"""

import argparse
import statistics
import time

import torch

from shortcut_cli import registry
from shortcut_cli.config import reading
from shortcut_cli.inference import generate

CONTEXT, VOCABULARY = 4096, 1024


def ours(name, tokens):
    """A function that samples and returns the times at which each token was done, in seconds."""
    settings = ["layers=6", "width=256", "heads=8", "ffn=1024", f"context={CONTEXT}", "activation=gelu"]
    config = reading.read("music", [f"model.{s}" for s in settings] + [f"model.name={name}", f"eval.stride={CONTEXT}"])
    model = registry.load(registry.MODELS, name)(config.model, VOCABULARY, 1).eval()
    sampler = config.sample.model_copy(update={"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0})

    def run():
        times = [time.perf_counter()]
        generate.generate(
            model,
            torch.zeros(1, 1, dtype=torch.int64),
            tokens,
            config=sampler,
            eos=-1,
            progress=lambda _: times.append(time.perf_counter()),
        )
        return times

    return run


def hugging_face(tokens):
    """The same for transformers' GPT-2 and its own `generate`."""
    from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessor, LogitsProcessorList

    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=256, n_layer=6, n_head=8, bos_token_id=0, eos_token_id=None
    )
    model = GPT2LMHeadModel(config).eval()

    class Clock(LogitsProcessor):
        def __call__(self, _, scores):
            times.append(time.perf_counter())
            return scores

    times = []

    def run():
        times.clear()
        prompt = torch.zeros(1, 1, dtype=torch.int64)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    arms = {"gpt": ours("gpt", options.tokens), "shortcut": ours("shortcut", options.tokens)}
    try:
        arms["transformers"] = hugging_face(options.tokens)
    except ModuleNotFoundError as error:
        print(f"transformers is left out: {error}")
    rates, growth = {name: [] for name in arms}, {name: [] for name in arms}
    for _ in range(options.rounds):
        for name, run in arms.items():
            times = run()
            rates[name].append((len(times) - 1) / (times[-1] - times[0]))
            growth[name].append((times[-1] - times[-51]) / (times[125] - times[75]))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.tokens} tokens")
    print(f"{'arm':<14}{'tokens/s':>10}{f'token {options.tokens} / token 100':>26}")
    for name in arms:
        print(f"{name:<14}{statistics.median(rates[name]):>10,.0f}{statistics.median(growth[name]):>26.2f}")


if __name__ == "__main__":
    main()
