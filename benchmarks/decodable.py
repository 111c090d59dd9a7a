"""Sample from untrained models at adversarial settings; every sample has to be a valid, non-empty file.

    python benchmarks/decodable.py [--samples 200] [--tokens 200]

For each MIDI tokenization (scheme, with and without programs, tempos, BPE), for sound with 1 and 4 codebooks, and for
text: a random model at temperature 5, constrained only by the tokenizer. Half of the samples have the fewest tokens
that can hold a note or a frame. symusic and mido open the MIDI files, soundfile the sound.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import mido
import numpy as np
import soundfile
import symusic
import torch

from shortcut_cli import registry
from shortcut_cli.config import reading
from shortcut_cli.demo import material
from shortcut_cli.inference import generate
from shortcut_cli.stages.preparation import prepare


def quiet(*_, **__):
    pass


def tokenizers(work):
    """(label, tokenizer) of every tokenization."""
    material.write_midi(work / "midi", pieces=12, seed=1)
    kind = registry.load(registry.TOKENIZERS, "midi")
    for scheme, programs, tempos in itertools.product(("REMI", "TSD", "MIDILike"), (False, True), (True, False)):
        options = kind.Options(name="midi", scheme=scheme, programs=programs, tempos=tempos, time_signatures=tempos)
        yield f"midi {scheme} programs={programs} tempos={tempos}", kind(options)
    for scheme in ("REMI", "TSD", "MIDILike"):
        settings = [f"tokenizer.scheme={scheme}", "tokenizer.bpe=1600", f"data.shards={work / scheme}"]
        resolved = reading.read("music-tiny", settings)
        prepare(resolved, [str(work / "midi")], work / scheme, n_workers=1, max_bad="0", report=quiet)
        yield f"midi {scheme} BPE", kind.load(resolved.tokenizer, work / scheme / "tokenizer")
    kind = registry.load(registry.TOKENIZERS, "audio")
    for codebooks in (1, 4):
        yield f"audio {codebooks}", kind(kind.Options(name="audio", weights="untrained:0", codebooks=codebooks))
    kind = registry.load(registry.TOKENIZERS, "text")
    yield "text chars", kind(kind.Options(name="text", algorithm="chars"))


def is_whole(path):
    """Whether other programs open a file and find something in it."""
    if path.suffix == ".mid":
        notes = sum(message.type == "note_on" for message in mido.MidiFile(path))
        return notes > 0 and symusic.Score(path).note_num() > 0
    if path.suffix == ".wav":
        samples, rate_hz = soundfile.read(path)
        return rate_hz == 24_000 and len(samples) > 0 and bool(np.isfinite(samples).all())
    return len(path.read_text(encoding="utf-8")) > 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=200)
    options = parser.parse_args()
    config = reading.read("music-tiny", ["model.context=64", "eval.stride=64"])
    wild = config.sample.model_copy(update={"temperature": 5.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0})
    failures = 0
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        for label, tokenizer in tokenizers(work):
            model = registry.load(registry.MODELS, "gpt")(config.model, tokenizer.vocabulary, 1).eval()
            whole = forced = 0
            for batch, tokens in enumerate((options.tokens, tokenizer.constraint().needed)):
                made = generate.generate(
                    model,
                    torch.full((options.samples // 2, 1), tokenizer.eos),
                    tokens,
                    config=wild.model_copy(update={"seed": batch}),
                    eos=tokenizer.eos,
                    constraints=[tokenizer.constraint() for _ in range(options.samples // 2)],
                )
                forced += sum(made.forced)
                for ids in made.ids:
                    path = work / f"sample{tokenizer.extension}"
                    units = tokenizer.decode(ids, path)
                    whole += is_whole(path) and not units.get("dropped")
            failures += whole < options.samples
            print(f"{label}: {whole} of {options.samples} whole, {forced} forced steps", flush=True)
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
