"""Prompts: how one is read, how much of it is given, where what is new begins, and text that is shown while drawn."""

import hashlib
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import mido
import numpy as np
import pytest
import sentencepiece
import soundfile
import symusic
from conftest import quiet, shortcut
from hypothesis import given as given_by
from hypothesis import settings
from hypothesis import strategies as st

from shortcut_cli.config.schema import SampleConfig
from shortcut_cli.demo import material
from shortcut_cli.errors import CheckFailed, Rejected, UsageError
from shortcut_cli.events import Progress, Sampled
from shortcut_cli.inference import prompts, runs
from shortcut_cli.inference.prompts import Given, Prompt, found
from shortcut_cli.stages import sampling
from shortcut_cli.stages.sampling import sample
from shortcut_cli.tokenizers import audio
from shortcut_cli.tokenizers.audio import AudioOptions, AudioTokenizer
from shortcut_cli.tokenizers.midi import MidiOptions, MidiTokenizer
from shortcut_cli.tokenizers.text import TextOptions, TextTokenizer

# What is meant


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a file and a folder whose names could be texts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spring").write_text("a file")
    (tmp_path / "summer").mkdir()
    os.mkfifo(tmp_path / "autumn")
    (tmp_path / "winter").symlink_to("nowhere")
    return tmp_path


@pytest.mark.parametrize(
    "said", ["Once upon a time", "Spring", "a\nb", "x" * 5000, "the end.", "--prompt", "caf\u00e9"]
)
def test_what_is_no_file_and_looks_like_none_is_a_text(place, said):
    assert found(Given(said), TextTokenizer) == Prompt(None, said)
    with pytest.raises(UsageError, match="does not exist$"):
        found(Given(said), MidiTokenizer)


@pytest.mark.parametrize(
    "said", ["summer", "autumn", "winter", "either/or", "./x", "my.txt", "my.TXT", "a b.md", "x.jsonl.gz", "."]
)
def test_what_could_be_a_path_and_a_text_is_refused_with_both_readings(place, said):
    with pytest.raises(UsageError, match="looks too much like a path to be a text") as raised:
        found(Given(said), TextTokenizer)
    assert raised.value.message.startswith(f"prompt {said} ")
    assert "printf %s TEXT | shortcut sample --prompt -" in raised.value.hint


def test_a_file_is_meant_whatever_its_name_looks_like(place):
    for kind in (TextTokenizer, MidiTokenizer, AudioTokenizer):
        assert found(Given("spring"), kind).path.name == "spring"
    assert found(Given(), TextTokenizer) is None
    assert found(Given("spring"), TextTokenizer).seam is None
    assert found(Given("spring"), AudioTokenizer).seam == {
        "prompt": "as recorded",
        "crossfade": "equal power",
        "crossfade_s": 0.03,
    }
    assert found(Given("spring", only_new=True), AudioTokenizer).seam is None


def test_standard_input_is_read_for_text_alone():
    def read():
        return "\u00e9\n".encode()

    assert found(Given("-", read, tokens=2, only_new=True), TextTokenizer) == Prompt(
        None, "\u00e9\n", {"tokens": 2}, True
    )
    for kind in (MidiTokenizer, AudioTokenizer):
        with pytest.raises(UsageError, match="only text is read from it") as raised:
            found(Given("-", lambda: 1 / 0), kind)
        assert raised.value.hint == f"--prompt FILE{kind.extension}"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "standard input is empty"),
        (b"ab\xff", "standard input is not UTF-8: byte 0xff at offset 2"),
        (b"a" * (prompts.MOST_BYTES + 1), "standard input has over 1,048,576 bytes"),
    ],
)
def test_input_that_is_no_text_is_refused(content, reason):
    with pytest.raises(UsageError, match=reason):
        found(Given("-", lambda: content), TextTokenizer)


def test_an_argument_that_is_no_text_is_refused():
    with pytest.raises(UsageError, match="--prompt is empty"):
        found(Given(""), TextTokenizer)
    with pytest.raises(UsageError, match="--prompt is not UTF-8: byte 0xe9 at offset 3"):
        found(Given("caf\udce9"), TextTokenizer)
    with pytest.raises(UsageError) as raised:
        found(Given("a/" * 9000), TextTokenizer)
    assert len(raised.value.message) < 400


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens": 3}, "--prompt-tokens is given without --prompt"),
        ({"seconds": 3.0}, "--prompt-seconds is given without --prompt"),
        ({"only_new": True}, "--only-new is given without --prompt"),
        ({"prompt": "x", "tokens": 3, "seconds": 1.0}, "both say how much"),
        *(
            ({"prompt": "x", "seconds": bad}, "is not above 0, or not finite")
            for bad in (0.0, -1.0, math.inf, math.nan)
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        Given(**options)


# How much of it is given


class Frames(SimpleNamespace):
    """A tokenizer of frames of three ids, two of which are a second."""

    extension = ".frames"

    def prompt(self, path):
        return np.frombuffer(path.read_bytes(), np.uint8).astype(np.int64)

    def whole(self, count):
        return count // 3 * 3

    def first(self, ids, seconds):
        if seconds > len(ids) / 6:
            raise Rejected("has only that")
        return int(seconds * 2) * 3


def test_as_much_is_given_as_was_asked_for(tmp_path):
    path = tmp_path / "x.frames"
    path.write_bytes(bytes(range(12)))

    def ids(**limit):
        return Prompt(path, None, limit).ids(Frames()).tolist()

    assert ids() == [*range(12)]
    assert ids(tokens=9) == [*range(9)]
    assert ids(tokens=12) == ids(seconds=2.0) == [*range(12)]
    assert ids(seconds=1.7) == [*range(9)]
    for count, hint in ((4, 3), (11, 9), (2, 3)):
        with pytest.raises(UsageError, match=f"^{count} tokens of prompt .* end within a frame") as raised:
            ids(tokens=count)
        assert raised.value.hint == f"--prompt-tokens {hint}"
    with pytest.raises(UsageError, match="has only 12 tokens") as raised:
        ids(tokens=15)
    assert raised.value.hint == "--prompt-tokens 12, or fewer"
    with pytest.raises(UsageError, match=r"x.frames can't be used: has only that"):
        ids(seconds=2.5)
    with pytest.raises(UsageError, match=r"can't be used: has no whole token in its first 0\.1 s"):
        ids(seconds=0.1)


def test_a_text_has_tokens_and_no_seconds(tmp_path):
    tokenizer = TextTokenizer(TextOptions(name="text", algorithm="chars", alphabet="abc"))
    assert Prompt(None, "abcab", {"tokens": 4}).ids(tokenizer).tolist() == [0, 1, 2, 0]
    with pytest.raises(UsageError, match="the prompt can't be used: has no seconds, only tokens"):
        Prompt(None, "abcab", {"seconds": 1.0}).ids(tokenizer)
    with pytest.raises(UsageError, match="the prompt can't be used: has the character 'x' at byte 2"):
        Prompt(None, "abx").ids(tokenizer)
