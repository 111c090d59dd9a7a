"""The sampling stage: what it writes, the .json beside it, and how a sample is made again from that."""

import hashlib
import json
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import quiet
from test_generate import Exact, plain_row
from test_models import make

from shortcut_cli import cleanup, files
from shortcut_cli.config import reading
from shortcut_cli.config.schema import SampleConfig
from shortcut_cli.errors import CheckFailed, Rejected, UsageError
from shortcut_cli.events import Progress
from shortcut_cli.inference import decoding, runs
from shortcut_cli.inference.prompts import Prompt
from shortcut_cli.stages import sampling
from shortcut_cli.stages.sampling import like, sample
from shortcut_cli.tokenizers.base import Constraint, Written
from shortcut_cli.training import conditions

VOCABULARY, EOS, CONTEXT = 12, 3, 8  # EOS is neither the first nor the last id


class Varied(Constraint):
    """EOS only after two ids, and no id next to itself or a neighbor."""

    def __init__(self):
        self.needed, self.pushed = 2, []

    def allowed(self, left):  # noqa: ARG002
        mask = (np.arange(VOCABULARY) != EOS) | (self.needed == 0)
        for token in self.pushed[-1:]:
            mask &= abs(np.arange(VOCABULARY) - token) > 1
        return mask

    def push(self, token):
        self.pushed.append(token)
        self.needed = max(0, self.needed - 1)


class Marks:
    """A tokenizer of files whose bytes are ids."""

    eos, extension, suffixes = EOS, ".marks", (".marks",)

    def __init__(self):
        self.constraints = []

    def constraint(self):
        self.constraints.append(Varied())
        return self.constraints[-1]

    def prompt(self, path, limit=None):  # noqa: ARG002
        ids = np.frombuffer(path.read_bytes(), np.uint8)
        if (ids >= VOCABULARY).any():
            raise Rejected("has a byte that is no mark")
        return ids.astype(np.int64)

    def decode(self, ids, path):
        text = bytes(ids)
        path.write_bytes(text[: text.index(EOS)] if EOS in ids else text)
        return {"mark": path.stat().st_size, "half": path.stat().st_size / 2}

    def decode_after(self, ids, path, count, *, recorded=None, only_new=False):
        assert recorded is None
        before, zero = {"mark": count}, {"mark": 0}
        units = self.decode(ids[count:] if only_new else ids, path)
        return Written(units, *((zero, before) if only_new else (before, zero)))

    def whole(self, count):
        return count


def config(**given):
    return SampleConfig(**({"n": 5, "tokens": 12, "seed": 7, "temperature": 1.2, "top_k": 9} | given))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with a model and a tokenizer that are small and exact."""
    monkeypatch.setattr(sampling, "batch_rows", lambda _: 256)
    monkeypatch.setattr(sampling, "prepared", lambda *_: nullcontext())  # it is no module
    path = tmp_path / "runs" / "run.pt"
    path.parent.mkdir()
    path.write_bytes(b"weights")
    tokenizer = Marks()
    name = SimpleNamespace(model=SimpleNamespace(name="some-arm"))
    model = Exact(CONTEXT, VOCABULARY)
    return SimpleNamespace(path=path, tokenizer=lambda: tokenizer, marks=tokenizer, model=model, recipe=name)


@pytest.fixture
def prompt(tmp_path):
    path = tmp_path / "prompts" / "first.marks"
    path.parent.mkdir()
    path.write_bytes(bytes([5, 0, 11, 2, 2]))
    return path


def plain(run, sampler, start):
    """The new ids and forced steps of each sample after `start`, which begins with EOS."""
    rows = []
    for number in range(sampler.n):
        constraint = Varied()
        for token in start[1:]:
            constraint.push(token)
        rows.append(
            plain_row(
                run.model.logits,
                start,
                sampler.tokens,
                config=sampler,
                number=number,
                eos=EOS,
                context=CONTEXT,
                constraint=constraint,
            )
        )
    return rows


def sidecar(path):
    return json.loads(path.with_name(path.name + ".json").read_text())


def by_name(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What is written


@pytest.mark.parametrize("prompted", [False, True])
def test_samples_and_their_json_are_those_of_a_plain_loop(run, prompt, tmp_path, prompted):
    """Ids begin with EOS, then the prompt, which is written too; every field of the .json is checked."""
    filters = {"top_p": 0.95, "min_p": 0.01} if prompted else {"top_p": 1.0, "min_p": 0.0}
    folder, sampler, events = tmp_path / "out" / "deep", config(**filters), []
    given = [5, 0, 11, 2, 2] if prompted else []
    paths = sample(
        run,
        folder,
        sampler,
        prompt=Prompt(prompt) if prompted else None,
        device="cpu:0" if prompted else "cpu",
        report=events.append,
    )
    assert paths == [folder / f"sample-7-00{number}.marks" for number in range(5)]
    assert sorted(by_name(folder)) == sorted(name for path in paths for name in (path.name, path.name + ".json"))
    expected = plain(run, sampler, [EOS, *given])
    for number, (path, (ids, forced)) in enumerate(zip(paths, expected, strict=True)):
        ended = ids[-1] == EOS
        content = bytes(given + ids[: len(ids) - ended])
        assert path.read_bytes() == content
        assert sidecar(path) == {
            "schema_version": 2,
            "checkpoint": "../../runs/run.pt",
            "checkpoint_sha256": hashlib.sha256(b"weights").hexdigest(),
            "model": "some-arm",
            "sampler": {"n": 5, "tokens": 12, "temperature": 1.2, "top_k": 9, "precision": "fp32", "seed": 7} | filters,
            "number": number,
            "device": "cpu:0" if prompted else "cpu",
            "conditions": conditions.now("cpu"),
            "prompt": "../../prompts/first.marks" if prompted else None,
            "prompt_sha256": hashlib.sha256(bytes(given)).hexdigest() if prompted else None,
            "prompt_tokens": len(given),
            "prompt_text": None,
            "prompt_limit": None,
            "only_new": False,
            "seam": None,
            "new_begins": {"token": 5, "mark": 5} if prompted else None,
            "left_out": {"token": 0, "mark": 0} if prompted else None,
            "tokens": len(ids),
            "ended": ended,
            "forced_steps": forced,
            "units": {"mark": len(content), "half": len(content) / 2},
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    lengths = [len(ids) for ids, _ in expected]
    assert len(set(lengths)) > 1
    assert {ids[-1] == EOS for ids, _ in expected} == {False, True}
    assert len({forced for _, forced in expected}) > 2
    assert events == [
        Progress(task="sample", done=done, total=12, unit="tokens") for done in (*range(1, max(lengths) + 1), 12)
    ]
    # A constraint gets the ids of the prompt, then those of its sample without EOS.
    pushed = [given + ids[: len(ids) - (ids[-1] == EOS)] for ids, _ in expected]
    assert [constraint.pushed for constraint in run.marks.constraints] == [given, *pushed]  # the first is asked alone


def test_rows_are_sampled_on_the_device_of_the_run(run, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def refuse(model, rows, tokens, **_):
        raise Seen(model, rows.device.type, tuple(rows.shape), tokens)

    monkeypatch.setattr(sampling, "generate", refuse)
    with pytest.raises(Seen) as seen:
        sample(run, tmp_path / "out", config(), prompt=None, device="meta", report=quiet)
    assert seen.value.args == (run.model, "meta", (5, 1), 12)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_products_are_in_bf16_while_sampling_only_if_the_recipe_says_so(run, tmp_path, monkeypatch, precision):
    seen = []
    run.model = make("gpt", {}, context=CONTEXT)
    monkeypatch.setattr(sampling, "prepared", decoding.prepared)
    real = sampling.generate

    def generate(model, *args, **kwargs):
        narrow = (
            isinstance(part, decoding.Rounded) or getattr(part, "dtype", None) == torch.bfloat16
            for part in model.modules()
        )
        seen.append(any(narrow))
        return real(model, *args, **kwargs)

    monkeypatch.setattr(sampling, "generate", generate)
    run.marks.constraint = lambda: SimpleNamespace(
        needed=1, push=lambda _: None, allowed=lambda _: np.arange(run.model.vocabulary) < VOCABULARY
    )
    (path,) = sample(run, tmp_path, config(n=1, precision=precision), prompt=None, device="cpu", report=quiet)
    assert seen == [precision == "bf16"]
    assert sidecar(path)["sampler"]["precision"] == precision


@pytest.mark.parametrize("number", [0, 2, 4])
def test_one_sample_alone_has_the_same_bytes_as_among_all(run, prompt, tmp_path, number):
    every = sample(run, tmp_path / "all", config(), prompt=Prompt(prompt), device="cpu", report=quiet)
    (one,) = sample(run, tmp_path / "one", config(), prompt=Prompt(prompt), device="cpu", report=quiet, only=number)
    assert one == tmp_path / "one" / every[number].name
    name = one.name
    assert by_name(tmp_path / "one") == {name: every[number].read_bytes(), name + ".json": one_json(every[number])}
    assert len({path.read_bytes() for path in every}) == 5


def one_json(path):
    return path.with_name(path.name + ".json").read_bytes()


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_samples_that_are_drawn_in_batches_are_the_same(run, prompt, tmp_path, monkeypatch, rows):
    whole = sample(run, tmp_path / "whole", config(), prompt=Prompt(prompt), device="cpu", report=quiet)
    monkeypatch.setattr(sampling, "batch_rows", lambda _: rows)
    drawn, generate = [], sampling.generate

    def counted(model, start, *rest, **options):
        drawn.append((options["first"], len(start)))
        return generate(model, start, *rest, **options)

    monkeypatch.setattr(sampling, "generate", counted)
    parts = sample(run, tmp_path / "parts", config(), prompt=Prompt(prompt), device="cpu", report=quiet)
    assert drawn == [(first, min(rows, 5 - first)) for first in range(0, 5, rows)]
    for one, other in zip(whole, parts, strict=True):
        assert one.read_bytes() == other.read_bytes()
        assert sampling.sidecar_path(one).read_bytes() == sampling.sidecar_path(other).read_bytes()
    drawn.clear()
    sample(run, tmp_path / "one", config(), prompt=Prompt(prompt), device="cpu", report=quiet, only=3)
    assert drawn == [(3 // rows * rows, min(rows, 5 - 3 // rows * rows))]  # the others of its batch, and no more
    assert (tmp_path / "one" / whole[3].name).read_bytes() == whole[3].read_bytes()


@pytest.mark.parametrize(("context", "expected"), [(8, 256), (10_000, 18), (10**9, 1)])
def test_only_as_many_samples_are_drawn_at_once_as_have_room(context, expected):
    model = SimpleNamespace(
        config=SimpleNamespace(context=context),
        head=SimpleNamespace(weight=torch.zeros(1000, 2)),
        cache_bytes_per_token=lambda: 400,
    )
    assert sampling.batch_rows(model) == expected


def test_samples_of_another_seed_have_other_names_and_differ(run, tmp_path):
    paths = [
        path
        for seed in (7, 8, 12345)
        for path in sample(run, tmp_path / "out", config(seed=seed, n=2), prompt=None, device="cpu", report=quiet)
    ]
    assert [path.name for path in paths] == [
        f"sample-{seed}-00{number}.marks" for seed in (7, 8, 12345) for number in (0, 1)
    ]
    assert len({path.read_bytes() for path in paths}) == 6


def test_a_thousand_and_one_samples_have_names_of_their_own(run, tmp_path):
    run.model.logits = lambda _: np.eye(VOCABULARY, dtype=np.float32)[EOS]
    run.marks.constraint = Constraint
    paths = sample(run, tmp_path / "out", config(n=1001, tokens=1), prompt=None, device="cpu", report=quiet, only=1000)
    assert [path.name for path in paths] == ["sample-7-1000.marks"]


@pytest.mark.parametrize("there", [0, 3, 4])
def test_no_sample_is_overwritten(run, tmp_path, there):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / f"sample-7-00{there}.marks").write_bytes(b"mine")
    before = by_name(folder)
    with pytest.raises(UsageError, match=rf"sample-7-00{there}\.marks exists already") as raised:
        sample(run, folder, config(), prompt=None, device="cpu", report=quiet)
    assert "--seed" in raised.value.hint
    assert "--out" in raised.value.hint
    assert by_name(folder) == before
    assert not run.model.calls


@pytest.mark.parametrize("content", ["mine", "{}", '{"number": 0}', "[]"])
def test_no_json_of_someone_else_is_overwritten(run, tmp_path, content):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "sample-7-003.marks.json").write_text(content)
    before = by_name(folder)
    with pytest.raises(UsageError, match=r"sample-7-003\.marks\.json exists already"):
        sample(run, folder, config(), prompt=None, device="cpu", report=quiet)
    assert by_name(folder) == before
    assert not run.model.calls


def test_one_sample_is_written_beside_the_others_but_not_over_itself(run, tmp_path):
    every = sample(run, tmp_path / "out", config(), prompt=None, device="cpu", report=quiet)
    before = by_name(tmp_path / "out")
    with pytest.raises(UsageError, match="sample-7-001"):
        sample(run, tmp_path / "out", config(), prompt=None, device="cpu", report=quiet, only=1)
    every[1].unlink()
    sample(run, tmp_path / "out", config(), prompt=None, device="cpu", report=quiet, only=1)
    assert by_name(tmp_path / "out") == before


def test_too_few_tokens_are_refused_before_a_folder_is_made(run, prompt, tmp_path):
    with pytest.raises(UsageError, match="1 tokens are too few") as raised:
        sample(run, tmp_path / "out", config(tokens=1), prompt=None, device="cpu", report=quiet)
    assert raised.value.hint == "--tokens 2, or more"
    assert not (tmp_path / "out").exists()
    assert not run.model.calls
    sample(run, tmp_path / "two", config(tokens=2), prompt=None, device="cpu", report=quiet)
    # The prompt counts: after one id of it one more is needed, after two none.
    for content in ([5], [5, 8]):
        prompt.write_bytes(bytes(content))
        folder = tmp_path / f"prompted-{len(content)}"
        paths = sample(run, folder, config(tokens=1), prompt=Prompt(prompt), device="cpu", report=quiet)
        assert {path.stat().st_size - len(content) for path in paths} <= {0, 1}
        assert [sidecar(path)["tokens"] for path in paths] == [1] * 5


def test_a_sample_whose_last_token_is_eos_has_ended(run, tmp_path):
    # EOS is the most probable, but not allowed for the first two; next are 11 and 9.
    run.model.logits = lambda _: np.where(np.arange(VOCABULARY) == EOS, 99, np.arange(VOCABULARY)).astype(np.float32)
    for tokens, ended in ((2, False), (3, True), (4, True)):
        folder, sampler = tmp_path / str(tokens), config(n=1, tokens=tokens, temperature=0)
        (path,) = sample(run, folder, sampler, prompt=None, device="cpu", report=quiet)
        said = sidecar(path)
        assert (said["tokens"], said["ended"], said["forced_steps"]) == (min(tokens, 3), ended, 2)
        assert path.read_bytes() == bytes([11, 9])


def test_paths_in_the_json_are_relative_to_its_folder_wherever_the_command_ran(run, prompt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run.path = run.path.relative_to(tmp_path)
    relative = prompt.relative_to(tmp_path)
    (path, *_) = sample(run, run.path.parent / "samples", config(), prompt=Prompt(relative), device="cpu", report=quiet)
    assert (sidecar(path)["checkpoint"], sidecar(path)["prompt"]) == ("../run.pt", "../../prompts/first.marks")
    found = like(tmp_path / (str(path) + ".json"), None, None)
    assert found.checkpoint.samefile(run.path)
    assert found.prompt.path.samefile(relative)


def test_a_real_run_continues_its_prompt_as_a_loop_without_cache_would(text_run, tmp_path):
    """Real weights, a real tokenizer and its constraint, beyond the context: the new text is what was drawn.

    The loop follows the ids of the sample, since training, and so what is drawn, may differ between machines.
    """
    run = runs.open_run(text_run / "shortcut" / "run.pt", "cpu")
    alphabet = "\n abcdefghijklmnopqrstuvwxyz0123456789"
    context, eos = run.recipe.model.context, len(alphabet)
    text = (text_run / "texts" / "000.txt").read_text()[: context - 1]  # full with EOS before it
    (tmp_path / "prompt.txt").write_text(text)
    sampler = SampleConfig(n=2, tokens=40, seed=3, temperature=0.8)
    paths = sample(run, tmp_path / "out", sampler, prompt=Prompt(tmp_path / "prompt.txt"), device="cpu", report=quiet)
    for number, path in enumerate(paths):
        said, written = sidecar(path), path.read_text()
        assert written.startswith(text)
        new = [*map(alphabet.index, written[len(text) :]), *[eos] * said["ended"]]
        assert said["units"] == {"byte": len(written)}
        assert (said["prompt_tokens"], said["tokens"]) == (len(text), len(new))
        assert len(new) == 40 or said["ended"]
        generator = torch.Generator().manual_seed(3_000_009 + number)
        seen = [eos, *map(alphabet.index, text)]
        for token in new:
            with torch.inference_mode():
                z = run.model(torch.tensor([seen]))[0, -1].double() / 0.8
            borders = z.softmax(0).cumsum(0)
            u = torch.rand(1, dtype=torch.float64, generator=generator)
            # With and without a cache, the sums of probabilities differ by less than 1e-5.
            assert (borders[token - 1] if token else 0) - 1e-5 <= u < borders[token] + 1e-5
            seen = [*seen[-(context // 2 - 1) :], token] if len(seen) == context else [*seen, token]
    assert paths[0].read_text() != paths[1].read_text()


# Made again


@pytest.fixture
def made(run, prompt, tmp_path):
    """The .json of a sample with a prompt."""
    path = sample(run, tmp_path / "out", config(), prompt=Prompt(prompt), device="cpu", report=quiet)[2]
    return path.with_name(path.name + ".json")


def changed(made, **fields):
    content = json.loads(made.read_text())
    made.write_text(json.dumps(content | fields))


def test_a_json_says_how_its_sample_is_made_again(run, prompt, made, tmp_path):
    changed(made, device="cuda")
    found = like(made, None, None)
    assert found.checkpoint.resolve() == run.path
    assert found.prompt.path.resolve() == prompt
    assert (found.number, found.device) == (2, "cuda")


def test_a_sample_without_prompt_is_made_again_without_one(run, prompt, tmp_path):
    path = sample(run, tmp_path / "out", config(), prompt=None, device="cpu", report=quiet)[0]
    made = path.with_name(path.name + ".json")
    assert like(made, None, None).prompt is None
    with pytest.raises(CheckFailed, match=r"first\.marks is not the file") as raised:
        like(made, None, prompt)
    assert "--prompt" in raised.value.hint


@pytest.mark.parametrize(
    "given",
    [
        {"n": 7, "tokens": 33, "temperature": 0.7, "top_k": 5, "top_p": 0.875, "min_p": 0.0625, "seed": 2**40 + 1},
        {"n": 1, "tokens": 1, "temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 0},
        {"temperature": 1 / 3, "top_p": 1e-5, "min_p": 1e-17},
        {"temperature": 1e6},
        {"temperature": 1e-6, "seed": 2**63 - 1},
    ],
)
def test_every_setting_of_the_sampler_survives_the_json(run, made, given):
    """Through `like` and `with_settings`, as the command passes them."""
    wanted = config(**given)
    changed(made, sampler=wanted.model_dump())
    base = reading.read("text-tiny", [])
    assert base.sample != wanted
    again = reading.with_settings(base, like(made, None, None).settings).sample
    assert again == wanted
    assert {key: type(value) for key, value in again} == {key: type(value) for key, value in wanted}
    assert reading.with_settings(base, like(made, None, None).settings).model == base.model


def test_moved_files_are_found_through_the_flags(run, prompt, made, tmp_path):
    weights, start = run.path.rename(tmp_path / "moved.pt"), prompt.rename(tmp_path / "moved.marks")
    for named, missing, flag in (
        ((None, start), run.path.name, "--ckpt"),
        ((weights, None), prompt.name, "--prompt"),
        ((tmp_path / "nowhere.pt", start), "nowhere.pt", "--ckpt"),
        ((weights, tmp_path / "nowhere.marks"), "nowhere.marks", "--prompt"),
        ((tmp_path, start), tmp_path.name, "--ckpt"),
    ):
        with pytest.raises(UsageError, match=f"{missing}, which .*does not exist") as raised:
            like(made, *named)
        assert flag in raised.value.hint
    found = like(made, weights, start)
    assert (found.checkpoint, found.prompt.path) == (weights, start)


def test_a_folder_that_is_moved_as_a_whole_keeps_its_samples(made, tmp_path, tmp_path_factory):
    new = tmp_path_factory.mktemp("other") / "place"
    os.rename(tmp_path, new)
    found = like(new / "out" / made.name, None, None)
    assert found.checkpoint.samefile(new / "runs" / "run.pt")
    assert found.prompt.path.samefile(new / "prompts" / "first.marks")


@pytest.mark.parametrize("by_flag", [False, True])
@pytest.mark.parametrize(("which", "flag"), [(0, "--ckpt"), (1, "--prompt")])
def test_a_checkpoint_or_prompt_with_other_bytes_is_refused(run, prompt, made, tmp_path, which, flag, by_flag):
    path, named = (run.path, prompt)[which], [None, None]
    if by_flag:
        path = named[which] = tmp_path / "other"
        path.write_bytes((run.path, prompt)[which].read_bytes())
        like(made, *named)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckFailed, match=f"{path.name} is not the file that .* was made with") as raised:
        like(made, *named)
    assert flag in raised.value.hint


@pytest.mark.parametrize(
    "field", ["checkpoint", "checkpoint_sha256", "prompt", "prompt_sha256", "sampler", "number", "device"]
)
def test_a_json_that_lacks_a_field_is_refused_by_its_name(made, field):
    content = json.loads(made.read_text())
    del content[field]
    made.write_text(json.dumps(content))
    with pytest.raises(CheckFailed, match=f"is not the .json of a sample: .*{field}"):
        like(made, None, None)


@pytest.mark.parametrize(
    "fields",
    [
        {"sampler": [1]},
        {"number": "two"},
        {"number": None},
        {"number": [2]},
        {"number": float("inf")},
        {"number": float("nan")},
        {"checkpoint": 5},
        {"prompt": 5},
    ],
)
def test_a_json_with_fields_of_the_wrong_type_is_refused(made, fields):
    changed(made, **fields)
    with pytest.raises(CheckFailed, match=r"is not the \.json of a sample"):
        like(made, None, None)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe{}", b'{"number": 1}', b"[" * 100_000])
def test_a_damaged_json_is_refused(made, content):
    made.write_bytes(content)
    with pytest.raises(CheckFailed, match=r"is not the \.json of a sample"):
        like(made, None, None)


def test_a_device_that_is_not_a_name_is_left_for_the_command_to_refuse(made):
    changed(made, device=["cpu"])
    assert like(made, None, None).device == "['cpu']"


def test_a_json_that_is_missing_or_a_folder_is_refused(made, tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UsageError, match="can't be read"):
            like(path, None, None)


# The prompt


def test_a_prompt_is_read_by_the_tokenizer(prompt):
    found = Prompt(prompt).ids(Marks())
    assert found.tolist() == [5, 0, 11, 2, 2]
    assert found.dtype == np.int64


def test_a_prompt_that_cannot_be_used_is_refused_with_the_reason(run, prompt, tmp_path):
    prompt.write_bytes(bytes([5, 200]))
    reason = "prompt .*first.marks can't be used: has a byte that is no mark"
    with pytest.raises(UsageError, match=reason):
        Prompt(prompt).ids(Marks())
    with pytest.raises(UsageError, match=reason):
        sample(run, tmp_path / "out", config(), prompt=Prompt(prompt), device="cpu", report=quiet)
    assert not (tmp_path / "out").exists()


# A process that is killed


def killed_after(run, folder, monkeypatch, calls, before=lambda: None):
    """Sample in a process that dies after sample number `calls`, before its .json is in place."""
    child = os.fork()
    if not child:
        left = [calls]

        def sha256(path):
            left[0] -= path != run.path
            if not left[0]:
                before()
                os._exit(9)
            return hashlib.sha256(path.read_bytes()).hexdigest()

        monkeypatch.setattr(files, "sha256", sha256)
        sample(run, folder, config(), prompt=None, device="cpu", report=quiet)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("calls", [1, 3])
def test_a_sample_that_a_killed_process_left_without_its_json_is_taken_over(run, tmp_path, monkeypatch, calls):
    sample(run, tmp_path / "whole", config(), prompt=None, device="cpu", report=quiet)
    folder = tmp_path / "out"
    killed_after(run, folder, monkeypatch, calls)
    left = {path.name for path in folder.glob("[!.]*")}
    assert left == {f"sample-7-00{n}.marks{end}" for n in range(calls) for end in ("", ".json")} - {
        f"sample-7-00{calls - 1}.marks.json"
    }
    have = [folder / f"sample-7-00{number}.marks" for number in range(calls - 1)]
    sample(run, folder, config(), prompt=None, device="cpu", report=quiet, have=have)
    assert by_name(folder) == by_name(tmp_path / "whole")


def test_a_signal_leaves_a_sample_with_its_json_or_neither(run, tmp_path, monkeypatch):
    sample(run, tmp_path / "whole", config(), prompt=None, device="cpu", report=quiet)
    folder = tmp_path / "out"
    killed_after(run, folder, monkeypatch, 2, before=cleanup.leave)
    assert sorted(by_name(folder)) == ["sample-7-000.marks", "sample-7-000.marks.json"]
    sample(run, folder, config(), prompt=None, device="cpu", report=quiet, have=[folder / "sample-7-000.marks"])
    assert by_name(folder) == by_name(tmp_path / "whole")


def test_neither_a_sample_nor_its_json_is_left_if_one_of_them_fails(run, tmp_path, monkeypatch):
    def full(path):
        if path.name.endswith("1.marks"):
            raise OSError(28, "No space left on device")
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(files, "sha256", full)
    with pytest.raises(OSError, match="No space"):
        sample(run, tmp_path / "out", config(), prompt=None, device="cpu", report=quiet)
    assert sorted(by_name(tmp_path / "out")) == ["sample-7-000.marks", "sample-7-000.marks.json"]


@pytest.mark.parametrize("told", [True, False, 0, -1, 10**9, 1.5, "2", None, [2]])
def test_a_number_of_threads_that_is_none_is_not_known(told):
    found = sampling.Like(Path("run.pt"), None, [], 0, "cpu", {"threads": told})
    assert found.threads == 0
    with conditions.threads(found.threads):
        pass
