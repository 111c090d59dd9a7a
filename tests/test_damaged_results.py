"""Results and lists that lie in a folder, damaged or another program's: one panel, or made again; never a traceback."""

import contextlib
import copy
import io
import itertools
import json
import os
import shutil
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TEXT_SETTINGS, quiet, set_flags, shortcut
from test_reading_shards import rewrite

from shortcut_cli import files, registry
from shortcut_cli.cli import tables
from shortcut_cli.codec import dataset
from shortcut_cli.compare import contrasts, runner
from shortcut_cli.compare import table as arms_table
from shortcut_cli.config import reading
from shortcut_cli.data.shards import FolderWriter, Shards, source_paths_file
from shortcut_cli.errors import CheckFailed, ShortcutError, Unavailable
from shortcut_cli.events import Note
from shortcut_cli.inference.prompts import Given
from shortcut_cli.kept import scores
from shortcut_cli.kept.inputs import read
from shortcut_cli.stages import comparison, pipeline, proof, sampling
from shortcut_cli.training import conditions, device
from shortcut_cli.training.run_log import Log, read_log

# What a file can hold that is no JSON, or another program's.
FOREIGN = [
    *(b"", b"{", b"\0" * 99, b"\xff\xfe{}", b"[]", b"3", b"null", b'"text"', b"{}", b'{"a": 1}', b"NaN", b"1" * 5000),
    *(b"[" * 100_000, b'{"a":' * 900 + b"1" + b"}" * 900, b'{"\\ud800": "\\ud800"}', b"[" + b"{}," * 9 + b"{}]"),
]
STRANGE = (None, "x", "\ud800/\0", -1, 1e999, True, [], {}, [[1]], {"a": None}, 10**30, 10**400)


def mutants(content):
    """The text of every variant of a JSON value with one value at any depth replaced by a strange one, or missing."""
    places = [()]
    for place in places:
        inner = content
        for key in place:
            inner = inner[key]
        if isinstance(inner, dict | list):
            keys = list(inner) if isinstance(inner, dict) else range(min(2, len(inner)))
            places += [(*place, key) for key in keys]
    for place, strange in itertools.product(places[1:], (*STRANGE, "missing")):
        made = copy.deepcopy(content)
        inner = made
        for key in place[:-1]:
            inner = inner[key]
        if strange == "missing":
            del inner[place[-1]]
        else:
            inner[place[-1]] = strange
        yield json.dumps(made).encode()


def every(path):
    """Write everything that a .json file may hold, one after the other."""
    content = json.loads(path.read_bytes())
    for text in (*FOREIGN, *mutants(content)):
        path.write_bytes(text)
        yield text


@pytest.fixture
def run(text_run, tmp_path):
    """A finished run of a gpt, scored and sampled, beside its shards."""
    folder = shutil.copytree(text_run / "gpt", tmp_path / "gpt")
    if not (text_run / "gpt" / "eval.json").exists():
        pipeline.score(folder / "run.pt", None, "val", device="cpu", report=quiet)
    pipeline.draw(folder / "run.pt", None, Given(), ["sample.n=1", "sample.tokens=5"], None, device="cpu", report=quiet)
    return folder


def test_a_damaged_eval_json_gives_a_whole_score_or_none(run):
    content = json.loads((run / "eval.json").read_text())
    inputs = content["splits"]["val"]["inputs"]
    assert scores.find(run, inputs)
    for _ in every(run / "eval.json"):
        found = scores.find(run, inputs)
        if found:
            tables.scores("run", found)


def test_a_score_takes_the_place_of_any_damaged_eval_json(run):
    content = json.loads((run / "eval.json").read_text())
    score = content["splits"]["val"]
    sums = (run / "eval-val.npz").read_bytes()
    for _ in every(run / "eval.json"):
        scores.keep(run, copy.deepcopy(score), sums, own=True, report=quiet)
        assert scores.find(run, score["inputs"])["nats_per_token"] == score["nats_per_token"]
        for path in run.glob("eval.damaged-*"):
            path.unlink()


def test_a_strangers_json_in_samples_stops_nothing(run):
    (sidecar,) = (run / "samples").glob("*.json")
    config = reading.read("text-tiny", ["sample.n=1", "sample.tokens=5"]).sample
    wanted = pipeline._sampler_inputs(run / "run.pt", config, None, "cpu")
    whole = sidecar.read_bytes()
    for text in every(sidecar):
        pipeline._sampled(run / "samples", wanted)
        with contextlib.suppress(ShortcutError):
            reading.with_settings(reading.read("text-tiny"), sampling.like(sidecar, None, None).settings)
        pipeline._make_room(run / "samples", config, quiet, [])
        (moved,) = (run / "samples" / "earlier-1").glob("*.json")
        if not isinstance(_table(text).get("checkpoint"), str) and not isinstance(_table(text).get("prompt"), str):
            assert moved.read_bytes() == text
        shutil.rmtree(run / "samples")
        (run / "samples").mkdir()
    sidecar.write_bytes(whole)


def _table(text):
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def test_a_huge_json_and_one_that_is_no_file_are_not_read(tmp_path):
    path = tmp_path / "x.json"
    with open(path, "wb") as stream:
        stream.truncate(70_000_000)
    with pytest.raises(CheckFailed, match="70,000,000 bytes"):
        read(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckFailed, match="no regular file"):
        read(path)


def test_a_damaged_cost_json_is_whole_or_none(tmp_path):
    inputs = {"checkpoint_sha256": "a" * 64}
    path = tmp_path / "cost.json"
    path.write_text(json.dumps({"peak_mb": 5.5, "device": "cpu", "inputs": inputs}))
    for _ in every(path):
        cost = runner.cost_of(tmp_path, inputs)
        assert cost is None or isinstance(cost["device"], str)
        assert cost is None or cost["peak_mb"] is None or max(cost["peak_mb"], 0) >= 0


def test_a_damaged_comparison_json_is_refused(tmp_path):
    resolved = reading.read("text-tiny")
    kept = comparison._check_same(tmp_path, resolved, "params", "a" * 64, ())
    (tmp_path / "comparison.json").write_text(json.dumps(kept))
    for _ in every(tmp_path / "comparison.json"):
        with contextlib.suppress(ShortcutError):
            comparison._check_same(tmp_path, resolved, "params", "a" * 64, ())


LINE = b'{"step": 4, "loss": 1.5, "tokens": 9, "seconds": 0.5}\n'
LAST = b'{"step": 6, "validation": 1.25}\n'


@pytest.mark.parametrize("rest", [b"", b'{"step": 8, "lo', b"\0" * 4096, b"\0" * 9 + b'{"step": 9}\n', b"{"])
def test_a_half_line_and_zeros_at_the_end_of_a_log_are_dropped(tmp_path, rest):
    (tmp_path / "log.jsonl").write_bytes(LINE + LAST + rest)
    assert Log(tmp_path, False).cut(6) is None
    assert (tmp_path / "log.jsonl").read_bytes() == LINE + LAST


def test_zeros_before_a_line_are_dropped(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(LINE + b"\0" * 100 + LAST)
    assert Log(tmp_path, False).cut(6) is None
    assert (tmp_path / "log.jsonl").read_bytes() == LINE + LAST


WRONG = [
    b"half\n",
    b'{"step": "4"}\n',
    b"[1]\n",
    b'{"loss": 1}\n',
    b"[" * 99_999 + b"\n",
    b"\xff\n",
    b'{"step":4,"x":[]}\n',
]


@pytest.mark.parametrize("wrong", WRONG, ids=[wrong[:12] for wrong in WRONG])
def test_a_log_with_other_damage_is_kept_beside_the_lines_that_are_whole(tmp_path, wrong):
    path = tmp_path / "log.jsonl"
    path.write_bytes(LINE + wrong + LAST)
    with pytest.raises(CheckFailed, match="line 2 can't be read"):
        list(read_log(tmp_path))
    kept = Log(tmp_path, False).cut(6)
    assert kept.read_bytes() == LINE + wrong + LAST
    assert path.read_bytes() == LINE + LAST
    assert [line["step"] for line in read_log(tmp_path)] == [4, 6]


def test_any_lines_of_a_log_are_compared_or_refused(tmp_path):
    path = tmp_path / "log.jsonl"
    for text in mutants(json.loads(LINE) | {"validation": 1.0}):
        path.write_bytes(LINE + text + b"\n" + LINE)
        try:
            runner._speed(tmp_path)
            runner._curve([tmp_path])
        except CheckFailed:
            pass


def test_a_run_whose_log_is_damaged_goes_on_and_says_so(text_run, tmp_path):
    flags = ("--recipe", "text-tiny", *set_flags(*TEXT_SETTINGS, f"data.shards={text_run / 'shards'}"), "--out", "r")
    folder = shutil.copytree(text_run / "gpt", tmp_path / "r")
    shutil.copy(folder / "resume.prev.pt", folder / "resume.pt")
    log = folder / "log.jsonl"
    whole = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([whole[0], b"half of a li\n", *whole[1:]]))
    done = shortcut("train", *flags, "--model", "gpt", cwd=tmp_path)
    assert "log.damaged-1.jsonl" in done.stderr
    assert [line["step"] for line in read_log(folder)] == [json.loads(line)["step"] for line in whole]


def test_a_damaged_clips_json_is_refused(tmp_path):
    clips = [dataset.Clip("a.wav", "a" * 64, "train", 0, 4), dataset.Clip("b.wav", "b" * 64, "val", 0, 2)]
    content = {"format": 2, "request": {"x": 1}, "rejected": 0, "account": {}, "clips": [vars(clip) for clip in clips]}
    (tmp_path / "train.s16").write_bytes(bytes(8))
    (tmp_path / "val.s16").write_bytes(bytes(4))
    (tmp_path / "clips.json").write_text(json.dumps(content))
    assert dataset._load(tmp_path, {"x": 1}).clips == clips
    for _ in every(tmp_path / "clips.json"):
        try:
            found = dataset._load(tmp_path, {"x": 1})
            assert found.seconds("train") * 24_000 == 4
        except ShortcutError:
            pass


def test_damaged_lists_of_sources_and_documents_are_one_panel(text_run, tmp_path):
    shards = shutil.copytree(text_run / "shards", tmp_path / "shards")
    opened = Shards(shards)
    remembered = source_paths_file(opened.manifest)
    remembered.parent.mkdir(parents=True, exist_ok=True)

    def prove(paths):
        return proof.tokens(shards, paths, count=2, seed=1, report=quiet)

    for content in FOREIGN:
        remembered.write_bytes(content)
        with pytest.raises(ShortcutError):
            prove([])
    remembered.unlink()
    texts = [str(text_run / "texts")]
    assert not prove(texts)["different"]
    documents = shards / "documents.jsonl"
    first, *rest = documents.read_bytes().splitlines(keepends=True)
    for content in (*FOREIGN, *mutants(json.loads(first))):
        documents.write_bytes(content + b"\n" + b"".join(rest))
        with contextlib.suppress(ShortcutError):
            proof.tokens(shards, texts, count=len(rest) + 1, seed=1, report=quiet)


def test_a_sealed_manifest_with_strange_values_is_shown_or_refused(text_run, tmp_path):
    shards = shutil.copytree(text_run / "shards", tmp_path / "shards")
    whole = (shards / "manifest.json").read_bytes()
    content = json.loads(whole)
    content["files"] = dict(list(content["files"].items())[:1])
    for text in mutants(content):
        made = json.loads(text)
        rewrite(shards, lambda manifest, made=made: (manifest.clear(), manifest.update(made)))
        try:
            opened = Shards(shards)
            tables.shards(opened.manifest | {"path": "x"})
            list(tables.account(opened.manifest))
            opened.split("train")
        except ShortcutError:
            pass
        (shards / "manifest.json").write_bytes(whole)


# Ids


@pytest.mark.parametrize(("vocabulary", "wrong"), [(100, 100), (100, 65535), (70_000, 70_000), (70_000, -1)])
def test_an_id_outside_the_vocabulary_is_refused_with_its_shard_and_place(tmp_path, vocabulary, wrong):
    with FolderWriter(tmp_path, vocabulary, 1024, eos=0) as writer:
        for _ in range(3):
            writer.add("train", [np.arange(1000) % vocabulary], {}, {})
        fields = {"name": "x", "fingerprint": "f", "vocabulary": vocabulary, "end": 0, "unit": "byte"}
        writer.finish([], {"tokenizer": fields, "request": {}})
    path = tmp_path / "train-00001.bin"
    kind = "<u2" if vocabulary < 65500 else "<i4"
    ids = np.fromfile(path, kind)
    ids[7] = wrong
    ids.tofile(path)
    split = Shards(tmp_path).split("train")
    before = len(np.fromfile(tmp_path / "train-00000.bin", kind))
    assert len(split.read(0, before + 7)) == before + 7
    assert len(split.read(before + 8, 100)) == 100
    with pytest.raises(CheckFailed, match=rf"train-00001\.bin is damaged: its token 7 is {wrong:,}"):
        split.read(before - 5, 100)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_an_id_outside_the_vocabulary_is_one_panel_in_every_command(text_run, tmp_path, split):
    shards = shutil.copytree(text_run / "shards", tmp_path / "shards")
    ids = np.fromfile(shards / f"{split}-00000.bin", "<u2")
    ids[:] = 65_000
    ids.tofile(shards / f"{split}-00000.bin")
    ckpt = ("--ckpt", text_run / "shortcut", "--shards", shards)
    commands = [("eval", *ckpt, "--split", split)]
    if split != "train":
        commands += [("attention", *ckpt, "--split", split, "--out", "a")]
    if split != "test":
        flags = set_flags(*TEXT_SETTINGS, f"data.shards={shards}")
        commands += [("train", "--recipe", "text-tiny", *flags, "--out", "r")]
    for command in commands:
        done = shortcut(*command, cwd=tmp_path, check=4)
        assert f"{split}-00000.bin is damaged" in done.stderr.replace("│\n│ ", "")
        assert "Traceback" not in done.stderr
        assert done.stderr.count("╭") == 1


# Units


@pytest.mark.parametrize("units", [{}, {"byte": 0}])
def test_bits_per_unit_of_a_split_without_units_are_null_and_that_is_said(text_run, tmp_path, units):
    shards = shutil.copytree(text_run / "shards", tmp_path / "shards")
    rewrite(shards, lambda manifest: manifest["splits"]["val"].update(units=units))
    said = []
    copied = shutil.copytree(text_run / "gpt", tmp_path / "gpt")
    found = pipeline.score(copied / "run.pt", shards, "val", device="cpu", report=said.append)
    assert found["bits_per_unit"] is found["bits_per_unit_interval_95"] is None
    assert found["nats_per_token"] > 0
    assert [event.text for event in said if isinstance(event, Note)] == [
        f"the val split of {shards} has no bytes, so bits per byte are not known"
    ]
    done = shortcut("eval", "--ckpt", copied, "--shards", shards, "--split", "val", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["bits_per_unit"] is None
    done = shortcut("eval", "--ckpt", copied, "--shards", shards, "--split", "val", cwd=tmp_path)
    assert "the split has no bytes" in done.stdout
    assert scores.find(copied, found["inputs"])


def test_a_comparison_on_a_split_without_units_has_no_bits(tmp_path):
    for number in range(2):
        np.savez(tmp_path / f"{number}.npz", nats=np.array([1.0, 2.0, 3.0]) + number, tokens=np.ones(3))
    groups = [str(tmp_path / f"{number}.npz") for number in range(2)]
    row = {"nats_per_token": [1.0, 1.1], "bits_per_unit": [None, None], "groups": groups, "diverged": {}, "unit": "x"}
    rows = {"a": row | {"seeds": [1, 2]}, "b": row | {"nats_per_token": [1.2, 1.1]}}
    judge = contrasts.Judge({"a": SimpleNamespace(baselines=[])}, rows, None, 0.005)
    named = contrasts.Named("a", "b")
    more = judge.content(named, *judge.test(named))
    assert more["mean"] == pytest.approx(-0.1)
    assert more["bits_per_unit"] is more["bits_per_unit_interval_95"] is None
    cells = dict.fromkeys((key for _, key in arms_table.COLUMNS), 1)
    (shown,) = arms_table.rows({"arms": [row | cells]})
    assert shown[-1] is None


# Devices


@pytest.mark.parametrize(
    "name", ["meta", "meta:0", "cuda:99", "xla", "hpu", "vulkan", "mtia", "", "x", "cpu:x", "lazy"]
)
def test_a_device_that_can_not_compute_is_unavailable(name):
    with pytest.raises(Unavailable):
        device.choose(name)


def test_a_score_of_a_stranger_with_a_right_checksum_is_whole_or_none(run):
    whole = json.loads((run / "eval.json").read_text())
    inputs = whole["splits"]["val"]["inputs"]
    strange = (*STRANGE, 10**400, {"scores": {"x": 5}}, {"sources": ["a"], "by_head": []})
    places = [(key,) for key in whole["splits"]["val"] if key not in ("inputs", "groups", "score_sha256")]
    places += [("floors", key) for key in ("scores", "trained_tokens")]
    places += [("depth_weights",), ("rejects",), ("words",)]
    taken = 0
    for place, value in itertools.product(places, strange):
        content = copy.deepcopy(whole)
        score = content["splits"]["val"]
        inner = score["floors"] if len(place) == 2 else score
        inner[place[-1]] = value
        score["score_sha256"] = scores._digest(score)
        (run / "eval.json").write_text(json.dumps(content))
        if found := scores.find(run, inputs):
            tables.scores("run", found)
            taken += 1
    assert 0 < taken < len(places) * len(strange) / 2


@pytest.mark.parametrize("named", ["run.pt", "resume.pt", "eval-val.npz"])
@pytest.mark.parametrize("split", ["x/../../evil", "\ud800", "\0", None, 5])
def test_a_strangers_eval_json_moves_no_file_but_sums_within_its_folder(run, named, split):
    """A score that is kept besides the new one gives its sums another name; which, the stranger does not say."""
    content = json.loads((run / "eval.json").read_text())
    new, before = content["splits"]["val"], copy.deepcopy(content["splits"]["val"])
    before["inputs"]["stride"] += 1
    before |= {"split": split, "groups": {"file": named, "sha256": files.sha256(run / named)}}
    if split is None:
        del before["split"]
    before["score_sha256"] = scores._digest(before)
    content["splits"]["val"] = before
    (run / "eval.json").write_text(json.dumps(content))
    (run / "eval-x").mkdir()
    outside = {path.name for path in run.parent.iterdir()}
    kept = {path: path.read_bytes() for path in run.rglob("*.pt")}
    scores.keep(run, new, (run / "eval-val.npz").read_bytes(), own=True, report=quiet)
    assert {path: path.read_bytes() for path in run.rglob("*.pt")} == kept
    assert {path.name for path in run.parent.iterdir()} == outside


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("nats.npy", "w") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "<f8", "fortran_order": False, "shape": (2**22,)})
        for _ in range(32):
            stream.write(bytes(1 << 20))


def claims(path):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("nats.npy", stream.getvalue())
        archive.writestr("tokens.npy", stream.getvalue())


@pytest.mark.parametrize(
    "write",
    [
        bomb,
        claims,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04" + bytes(99)),
        lambda path: np.savez(path, nats=np.ones(3)),
        lambda path: np.savez(path, nats=np.ones(3), tokens=np.ones(4)),
        lambda path: np.savez(path, nats=np.ones(3), tokens=np.zeros(3)),
        lambda path: np.savez(path, nats=np.ones((3, 1)), tokens=np.ones(3)),
        lambda path: np.savez(path, nats=np.array([{}]), tokens=np.ones(1)),
        lambda path: np.savez(path, nats=np.ones(3, "U4"), tokens=np.ones(3)),
    ],
)
def test_sums_of_a_stranger_are_those_of_a_score_or_damaged(tmp_path, write):
    path = tmp_path / "eval-val.npz"
    write(path)
    with pytest.raises(CheckFailed, match="does not hold the sums"):
        contrasts.sums(path)


def test_sums_of_other_documents_are_not_compared(tmp_path):
    for name, tokens in (("a", [1.0, 2.0]), ("b", [1.0, 3.0])):
        np.savez(tmp_path / f"{name}.npz", nats=np.ones(2), tokens=np.array(tokens))
    rows = [{"groups": [str(tmp_path / f"{name}.npz")]} for name in "ab"]
    with pytest.raises(CheckFailed, match="is of other documents"):
        contrasts.by_document([(rows[0], 1.0), (rows[1], -1.0)])
    nats, tokens = contrasts.by_document([(rows[0], 1.0), (rows[0], -0.25)])
    assert (nats.tolist(), tokens.tolist()) == ([[0.75, 0.75]], [1.0, 2.0])


@pytest.mark.parametrize("part", [{"device": torch.ones(2)}, {5: 1}, {"a": {"b": 1}}, {"a": "x" * 201}, {"a": [1]}])
def test_conditions_of_a_stranger_that_can_not_be_shown_are_none(part):
    here = conditions.now("cpu")
    assert conditions.parts([{conditions.FROM_STEP: 0, **here}]) == [{conditions.FROM_STEP: 0, **here}]
    assert conditions.parts([part]) == []


LONG = "x" * 100_000  # of which a panel is not to be full
NOT_UTF8 = b'{"trained_on": "' + LONG.encode() + b'\xff"}'


@pytest.mark.parametrize("domain", [None, *registry.TOKENIZERS])
def test_a_panel_about_bytes_that_are_not_utf8_does_not_hold_the_file(tmp_path, domain):
    (tmp_path / ("tokenizer.json" if domain else "manifest.json")).write_bytes(NOT_UTF8)
    kind = domain and registry.load(registry.TOKENIZERS, domain)
    options = domain and reading.read(registry.DEFAULT_RECIPES[domain]).tokenizer
    with pytest.raises(CheckFailed, match="can't decode byte 0xff in position 100016") as raised:
        kind.load(options, tmp_path) if domain else Shards(tmp_path)
    assert len(raised.value.message) < 1000


def test_a_panel_about_a_prompt_that_is_no_unicode_does_not_hold_it(tmp_path):
    (tmp_path / "run.pt").write_bytes(b"run")
    made = {"checkpoint": "run.pt", "checkpoint_sha256": files.sha256(tmp_path / "run.pt"), "sampler": {}, "number": 0}
    made |= {"device": "cpu", "prompt": None, "prompt_text": LONG + "\ud800", "prompt_sha256": "0" * 64}
    (tmp_path / "a.txt.json").write_text(json.dumps(made))
    with pytest.raises(CheckFailed, match="surrogates not allowed") as raised:
        sampling.like(tmp_path / "a.txt.json", None, None)
    assert len(raised.value.message) < 1000
