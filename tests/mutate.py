"""Mutation testing: plant faults in a module one at a time, and see whether its tests notice.

    python tests/mutate.py metrics compare       these modules of [tool.mutation.modules] in pyproject.toml; none: all
    python tests/mutate.py --again metrics       what survived the last run, with the tests as they are now
    python tests/mutate.py --report              what the runs so far gave, as the table of docs/testing.md

Cosmic Ray (`pip install -e ".[test,mutation]"`) makes the mutants and keeps their results: a session a module in
build/mutation, which its own cr-report and cr-html read. A run that was stopped goes on. Two faults are planted at a
time, each in a copy of the checkout. The tests of each run in a fork of a process that has imported PyTorch, the tests
that noticed a fault in the same function before first, then quick ones before slow ones, until one fails.
"""

import argparse
import ast
import difflib
import hashlib
import importlib
import json
import os
import queue
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import ClassVar

import pytest

ROOT = Path(__file__).parent.parent
SESSIONS = ROOT / "build" / "mutation"
PACKAGE = "shortcut_cli"
COPIES = 2  # of the checkout, each with a process at work
PREPARED = ("torch._dynamo", "scipy.stats", "hypothesis", "pydantic", "miditok", "sentencepiece", "soundfile", "soxr")
LOG = ".mutation.log"  # what pytest printed last, in a copy
QUICK_S = (0.05, 0.5, 2.0, 10.0)  # tests are sorted by these steps, and stay in their order within one


def settings() -> dict:
    """[tool.mutation] of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutation"]


def own_operators() -> dict:
    """Faults that Cosmic Ray has no operators for, by name: what is left out, and one name for another."""
    import parso
    from cosmic_ray.operators.operator import Operator

    class Own(Operator):
        """An operator that puts other text in the place of a node; `other` gives it, or None."""

        def mutation_positions(self, node):
            if self.other(node) is not None:
                yield node.start_pos, node.end_pos

        def mutate(self, node, index):  # noqa: ARG002
            return parso.python.tree.Name(node.get_first_leaf().prefix + self.other(node), node.start_pos)

        @classmethod
        def examples(cls):
            return ()

    class DropCall(Own):
        """A call for its effect alone is left out."""

        def other(self, node):
            return "pass" if _is_call(node) and node.parent.type == "simple_stmt" else None

    class DropKeyword(Own):
        """An argument with a name is left out."""

        def other(self, node):
            named = node.type == "argument" and node.children[1] == "=" and node.parent.type == "arglist"
            return "**{}" if named else None

    class DropAssignment(Own):
        """What is added to, or set on, an object that was there before is left as it is."""

        def other(self, node):
            if node.type != "expr_stmt":
                return None
            sign = node.children[1].get_code().strip()  # "=", "+=" ..., or an annotation with its value
            changed = sign.endswith("=") if sign != "=" else node.children[0].type in ("power", "atom_expr")
            return "pass" if changed else None

    class SwapName(Own):
        """The other of two that are easily mistaken."""

        pairs = "min max, any all, argmin argmax, amin amax, floor ceil, median mean, mean sum, log2 log, sf cdf"
        names: ClassVar = {a: b for pair in pairs.split(", ") for a, b in (pair.split(), pair.split()[::-1])}

        def other(self, node):
            if node.type != "name" or not _is_used(node):
                return None
            other = self.names.get(node.value)
            method = node.get_previous_leaf() == "."
            return other if method or other in ("min", "max", "any", "all") else None

    class SwapArguments(Own):
        """The first two arguments of a call in each other's place."""

        def other(self, node):
            if node.type != "arglist" or node.parent.type != "trailer":
                return None
            parts = [child for child in node.children if child.type != "operator"]
            called = getattr(node.get_previous_leaf().get_previous_leaf(), "value", "")
            if len(parts) < 2 or called in ("min", "max") or any(part.type == "argument" for part in parts[:2]):
                return None
            a, b = (part.get_code().strip() for part in parts[:2])
            rest = [part.get_code().strip() for part in parts[2:]]
            return ", ".join([b, a, *rest]) if a != b else None

    return {kind.__name__: kind for kind in (DropCall, DropKeyword, DropAssignment, SwapName, SwapArguments)}


def _is_call(node) -> bool:
    last = node.children[-1] if node.type in ("power", "atom_expr") else None
    return last is not None and last.type == "trailer" and last.children[0] == "("


def _is_used(node) -> bool:
    """Whether a name stands for a function or a value, and is not being given one."""
    before, after = node.get_previous_leaf(), node.get_next_leaf()
    return after != "=" and before not in ("def", "import", "for", ",") and after not in ("in", ":")


def mutants(path: Path, operators: list[str], most: int, seed: int) -> tuple[list, int]:
    """Up to `most` mutants of a file, drawn with a seed, and how many there are before what follows is left out.

    What changes annotations alone, does not compile, or is the same as another.
    """
    from cosmic_ray.commands.init import init
    from cosmic_ray.work_db import WorkDB

    wanted, source = re.compile("|".join(operators)), path.read_text()
    with closing(WorkDB(":memory:", WorkDB.Mode.create)) as db:
        init([path], db, {})
        items = [item for item in db.work_items if wanted.fullmatch(item.mutations[0].operator_name.split("/")[1])]
    random.Random(seed).shuffle(items)
    seen, found = {_bare(source)}, []
    for item in items:
        with suppress(SyntaxError):
            bare = _bare(mutated(source, item.mutations[0]))
            if bare not in seen:
                seen.add(bare)
                found.append(item)
        if len(found) == most:
            break
    return found, len(items)


def mutated(source: str, mutation) -> str:
    """The code of a mutant."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    code = mutate_code(source, get_operator(mutation.operator_name)(), mutation.occurrence)
    assert code is not None, mutation
    return code


class _Bare(ast.NodeTransformer):
    """Without annotations."""

    def visit_arg(self, node):
        node.annotation = None
        return node

    def visit_FunctionDef(self, node):
        node.returns = None
        self.generic_visit(node)
        return node

    def visit_AnnAssign(self, node):
        node.annotation = ast.Constant(0)
        self.generic_visit(node)
        return node


def _bare(code: str) -> str:
    return ast.dump(_Bare().visit(ast.parse(code)))


def change(mutation) -> tuple[str, str]:
    """The lines that a mutant takes out of its file, and those that it puts there."""
    source = (ROOT / mutation.module_path).read_text()
    code = mutated(source, mutation)
    lines = list(difflib.unified_diff(source.splitlines(), code.splitlines(), n=0, lineterm=""))[3:]
    sides = [" ".join(line[1:].strip() for line in lines if line[0] == sign) for sign in "-+"]
    return sides[0], sides[1]


class Copy:
    """A copy of the checkout and a process that runs its tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.refresh()
        # CI: hypothesis then draws the same examples every time.
        environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "CI": "true"}
        command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def refresh(self) -> None:
        """Take over what changed in the checkout."""
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0"):
            if name and (ROOT / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, self.folder / name)

    def test(self, arguments: list[str], first: list[str], seconds: dict[str, float], timeout_s: float) -> dict:
        """Run tests until one fails: {"code": exit code of pytest, or -9, "failed": [...], "seconds": {...}}."""
        result = self.folder / ".mutation.json"
        result.unlink(missing_ok=True)
        job = {"arguments": arguments, "first": first, "known": seconds, "result": str(result)}
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        group = int(self.process.stdout.readline())
        in_time, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)  # what it started and left, or all of it
        code = int(self.process.stdout.readline())
        found = json.loads(result.read_text()) if in_time and result.exists() else {"failed": [], "seconds": {}}
        return {"code": code, **found}

    def close(self) -> None:
        """End the process."""
        self.process.communicate(timeout=60)


class _Order:
    """A plugin of pytest: tests that failed before first, then quick ones; notes what fails and how long each takes."""

    def __init__(self, first: list[str], known: dict[str, float]) -> None:
        self.first, self.known = first, known
        self.failed: list[str] = []
        self.seconds: dict[str, float] = defaultdict(float)

    def pytest_collection_modifyitems(self, items: list) -> None:
        def place(item):
            late = self.first.index(item.nodeid) if item.nodeid in self.first else len(self.first)
            takes = sum(self.known.get(name, 0) for name in (item.nodeid, *item.fixturenames))
            return late, sum(takes > step for step in QUICK_S)

        items.sort(key=place)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        began = time.monotonic()
        result = yield
        self.seconds[fixturedef.argname] = max(self.seconds[fixturedef.argname], time.monotonic() - began)
        return result

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call":
            self.seconds[report.nodeid] = report.duration
        if report.failed:
            self.failed.append(report.nodeid)


def serve() -> None:
    """Run jobs, lines of JSON on stdin, in forks of this process; answer each with its process and its exit code."""
    import gc

    sys.dont_write_bytecode = True  # two mutants of a file can be of one second and of one size
    sys.path.insert(0, str(Path.cwd()))
    for name in PREPARED:
        importlib.import_module(name)
    gc.freeze()
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if not child:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            said = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            for descriptor in (1, 2):
                os.dup2(said, descriptor)
            order = _Order(job["first"], job["known"])
            flags = [
                "-o",
                "addopts=",
                "-q",
                "-x",
                "-n",
                "0",
                "-p",
                "no:cacheprovider",
                "--tb",
                "short",
                "--assert",
                "plain",
            ]
            code = pytest.main([*flags, *job["arguments"]], plugins=[order])
            Path(job["result"]).write_text(json.dumps({"failed": order.failed, "seconds": order.seconds}))
            os._exit(int(code))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


class Run:
    """The session of one module."""

    def __init__(self, module: str) -> None:
        from cosmic_ray.work_db import WorkDB

        self.module, self.keys = module, settings()
        self.path = Path(PACKAGE) / f"{module}.py"
        self.arguments = self.keys["modules"][module]
        source = hashlib.sha256((ROOT / self.path).read_bytes()).hexdigest()[:12]
        SESSIONS.mkdir(parents=True, exist_ok=True)
        self.session = SESSIONS / f"{module.replace('/', '.')}-{source}.sqlite"
        self.db = WorkDB(self.session, WorkDB.Mode.create)
        self.killers: dict[str | None, list[str]] = defaultdict(list)

    def plan(self) -> None:
        """Choose the mutants, where that was not done before."""
        if self.db.num_work_items:
            return
        most = sys.maxsize if self.module in self.keys["whole"] else self.keys["sample"]
        found, count = mutants(self.path, self.keys["operators"], most, self.keys["seed"])
        self.db.add_work_items(found)
        self.session.with_suffix(".json").write_text(json.dumps({"mutants": count}))

    def execute(self, copies: "queue.Queue[Copy]", again: bool) -> None:
        """Test every mutant that has no result; again: those that survived, too."""
        from cosmic_ray.work_item import TestOutcome

        self.plan()
        survived = {job for job, result in self.db.results if result.test_outcome == TestOutcome.SURVIVED}
        done = {job for job, _ in self.db.results} - (survived if again else set())
        left = [item for item in self.db.work_items if item.job_id not in done]
        if not left:
            return
        for copy in [copies.get() for _ in range(COPIES)]:
            copy.refresh()
            copies.put(copy)
        copy, began = copies.get(), time.monotonic()
        whole = copy.test(self.arguments, [], {}, 3600)
        copies.put(copy)
        if whole["code"]:
            sys.exit(f"the tests of {self.module} fail without any fault:\n{(copy.folder / LOG).read_text()[-4000:]}")
        seconds, limit_s = whole["seconds"], 20 + 3 * (time.monotonic() - began)
        with ThreadPoolExecutor(COPIES) as pool:
            results = pool.map(lambda item: (item, self._test(item, copies, seconds, limit_s)), left)
            for number, (item, result) in enumerate(results, 1):
                self.db.set_result(item.job_id, result)
                print(f"\r{self.module}: {number} of {len(left)}", end="", file=sys.stderr, flush=True)
        print(f"\n{self.row()}  {time.monotonic() - began:,.0f} s", file=sys.stderr)

    def _test(self, item, copies: "queue.Queue[Copy]", seconds: dict[str, float], limit_s: float):
        from cosmic_ray.mutating import use_mutation
        from cosmic_ray.plugins import get_operator
        from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

        (mutation,) = item.mutations
        killers, copy = self.killers[mutation.definition_name], copies.get()
        try:
            operator = get_operator(mutation.operator_name)()
            with use_mutation(copy.folder / mutation.module_path, operator, mutation.occurrence):
                found = copy.test(self.arguments, killers, seconds, limit_s)
        finally:
            copies.put(copy)
        killers[:0] = [test for test in found["failed"] if test not in killers]
        outcome = TestOutcome.KILLED if found["code"] else TestOutcome.SURVIVED
        how = found["failed"][0] if found["failed"] else f"exit {found['code']}"
        was, now = change(mutation)
        return WorkResult(WorkerOutcome.NORMAL, how, outcome, f"- {was}\n+ {now}")

    def survivors(self) -> Iterator[tuple[str, str]]:
        """(lines as they are, lines as they would be) of the mutants that no test noticed."""
        results = dict(self.db.results)
        for item in sorted(self.db.work_items, key=lambda item: item.mutations[0].start_pos):
            result = results.get(item.job_id)
            if result and not result.is_killed:
                was, now = result.diff.split("\n")
                yield was.removeprefix("- "), now.removeprefix("+ ")

    def row(self) -> str:
        """A line of the table."""
        count = json.loads(self.session.with_suffix(".json").read_text())["mutants"]
        listed, alive = equivalent(), list(self.survivors())
        same = sum(not differs(self.module, *pair, listed) for pair in alive)
        tested = self.db.num_results
        killed = tested - len(alive)
        share = f"{100 * killed / max(1, tested - same):.0f} %"
        return f"| {self.module} | {count} | {tested} | {killed} | {same} | {len(alive) - same} | {share} |"


def equivalent() -> list[dict]:
    """What docs/testing.md lists of mutants that no test can tell from the code: module or "*", code, now, why."""
    text = (ROOT / "docs" / "testing.md").read_text()
    blocks = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    return [entry for block in blocks for entry in tomllib.loads(block)["equivalent"]]


def differs(module: str, was: str, now: str, listed: list[dict]) -> bool:
    """Whether a mutant is none of those that are listed as equivalent; space does not count."""
    was, now = bare(was), bare(now)
    for entry in listed:
        code = bare(entry["code"])
        if entry["module"] not in ("*", module):
            continue
        places = [found.start() for found in re.finditer(re.escape(code), was)]
        same = (was[:place] + bare(other) + was[place + len(code) :] for place in places for other in entry["now"])
        if now in same:
            return False
    return True


def bare(code: str) -> str:
    """Without spaces."""
    return re.sub(r"\s", "", code)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="of [tool.mutation.modules]; none: all")
    parser.add_argument("--again", action="store_true", help="test those that survived once more, too")
    parser.add_argument("--report", action="store_true", help="test nothing; print the table and what survived")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        return serve()
    known = settings()["modules"]
    if unknown := [module for module in asked.modules if module not in known]:
        parser.error(
            f"{', '.join(unknown)}: not in [tool.mutation.modules] of pyproject.toml, which has {', '.join(known)}"
        )
    try:
        from cosmic_ray.plugins import OPERATOR_PROVIDERS
    except ModuleNotFoundError:
        parser.error("Cosmic Ray is not installed: pip install -e '.[test,mutation]'")
    OPERATOR_PROVIDERS["own"] = own_operators()
    os.chdir(ROOT)
    modules = asked.modules or list(known)
    if asked.report:
        return report(modules)
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        copies: queue.Queue[Copy] = queue.Queue()
        for number in range(COPIES):
            copies.put(Copy(Path(folder) / str(number)))
        for module in modules:
            Run(module).execute(copies, asked.again)
        while not copies.empty():
            with closing(copies.get()):
                pass
    return report(modules)


def report(modules: list[str]) -> None:
    """Print the table of docs/testing.md, and the survivors that it does not list as equivalent."""
    listed = equivalent()
    print("| module | mutants | tested | killed | equivalent | survived | killed of those that differ |")
    print("|---|---|---|---|---|---|---|")
    runs = [run for run in map(Run, modules) if run.db.num_results]
    for run in runs:
        print(run.row())
    for run in runs:
        for was, now in run.survivors():
            if differs(run.module, was, now, listed):
                print(f"\n{run.module}\n  - {was}\n  + {now}")


if __name__ == "__main__":
    main()
