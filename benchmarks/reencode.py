"""Sound at several shifts and speeds, so that a codec gives more tokens of the same recordings.

    python benchmarks/reencode.py OUT FILE... [--shifts 8] [--speeds 0.94,1,1.06] [--test 0.2] [--val 0.1]
        [--only-train FILE...]

Writes mono FLAC at the files' own rate to OUT/train, OUT/val and OUT/test. The split of a file follows from the hash of
its bytes. Only files of the training split are changed: each is played at each speed, pitch included (speed
perturbation, Ko et al. 2015), and begins 0, 1/n, 2/n ... of a frame of 1/75 s later, so that the frames fall elsewhere.
No copy of one file is in two splits. `--only-train` takes files of speakers that must not be tested: all files of one
speaker, for instance, of whom there is more than one.

    shortcut prepare audio OUT --recipe audio --set data.splits.train='["train"]' --set data.splits.val='["val"]' \\
        --set data.splits.test='["test"]'
"""

import argparse
import hashlib
from pathlib import Path

import soundfile
import soxr

FRAME = 1 / 75  # seconds of a frame of the codecs `mini` and encodec_24khz


def share(path):
    return int(hashlib.sha256(path.read_bytes()).hexdigest()[:8], 16) / 2**32


def copies(sound, rate, shifts, speeds):
    for speed in speeds:
        played = sound if speed == 1 else soxr.resample(sound, rate * speed, rate)
        for shift in range(shifts):
            yield f"{speed:g}-{shift}", played[round(shift / shifts * FRAME * rate) :]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--shifts", type=int, default=8)
    parser.add_argument("--speeds", default="0.94,1,1.06")
    parser.add_argument("--test", type=float, default=0.2)
    parser.add_argument("--val", type=float, default=0.1)
    parser.add_argument("--only-train", type=Path, nargs="+", default=[])
    given = parser.parse_args()
    speeds = [float(speed) for speed in given.speeds.split(",")]
    for split in ("train", "val", "test"):
        (given.out / split).mkdir(parents=True)
    counts = dict.fromkeys(("train", "val", "test"), 0)
    learned = set(given.only_train)
    for path in sorted({*given.files, *learned}):
        sound, rate = soundfile.read(path, dtype="float32", always_2d=True)
        mono = sound.mean(axis=1)
        place = share(path)
        split = "test" if place < given.test else "val" if place < given.test + given.val else "train"
        split = "train" if path in learned else split
        counts[split] += 1
        made = copies(mono, rate, given.shifts, speeds) if split == "train" else [("1-0", mono)]
        for name, part in made:
            soundfile.write(given.out / split / f"{path.stem}-{name}.flac", part, rate)
    print(counts)


if __name__ == "__main__":
    main()
