"""Mutation testing: plant faults in a module one at a time, and see whether its tests notice.

    python tests/mutate.py metrics compare       these modules of [tool.mutation.modules] in pyproject.toml; none: all
    python tests/mutate.py --again metrics       test the survivors of the last run again, with the tests of now
    python tests/mutate.py --report              print the results so far, as the table of docs/testing.md

Cosmic Ray (`pip install -e ".[test,mutation]"`) makes the mutants and stores their results, one session for each module
in build/mutation, which its cr-report and cr-html can read. The same command resumes a run that was stopped. Two
mutants are tested at a time, each in a copy of the checkout and in a fork of a process that has imported PyTorch. Tests
that caught a mutant of the same function run first, then quick ones before slow ones, until one fails.
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
from contextlib import ExitStack, closing, suppress
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import pytest

ROOT = Path(__file__).parent.parent
SESSIONS = ROOT / "build" / "mutation"
PACKAGE = "shortcut_cli"
COPIES = 2  # of the checkout, each with a process that runs tests
PREPARED = ("torch", "scipy.stats", "hypothesis", "pydantic", "miditok", "sentencepiece", "soundfile", "soxr")
LOG = ".mutation.log"  # in a copy: the output of its last pytest
QUICK_S = (0.05, 0.5, 2.0, 10.0)  # tests are sorted into these classes, and keep their order within one


def settings() -> dict:
    """[tool.mutation] of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutation"]


def own_operators() -> dict:
    """Operators that Cosmic Ray lacks, by name: they leave something out, or exchange two names or arguments."""
    import parso
    from cosmic_ray.operators.operator import Operator

    class Own(Operator):
        """An operator that replaces a node by the text that `other` returns, or leaves it alone if that is None."""

        def mutation_positions(self, node):
            if self.other(node) is not None:
                yield node.start_pos, node.end_pos

        def mutate(self, node, index):  # noqa: ARG002
            return parso.python.tree.Name(node.get_first_leaf().prefix + self.other(node), node.start_pos)

        @classmethod
        def examples(cls):
            return ()

    class DropCall(Own):
        """Leave out a call whose result is not used."""

        def other(self, node):
            return "pass" if _is_call(node) and node.parent.type == "simple_stmt" else None

    class DropKeyword(Own):
        """Leave out a keyword argument."""

        def other(self, node):
            named = node.type == "argument" and node.children[1] == "=" and node.parent.type == "arglist"
            return "**{}" if named else None

    class DropAssignment(Own):
        """Leave out an augmented assignment, or one to an attribute or an item."""

        def other(self, node):
            if node.type != "expr_stmt":
                return None
            sign = node.children[1].get_code().strip()  # "=", "+=" ..., or an annotation and its value
            changed = sign.endswith("=") if sign != "=" else node.children[0].type in ("power", "atom_expr")
            return "pass" if changed else None

    class SwapName(Own):
        """Replace a name by one that is easily mistaken for it."""

        pairs = "min max, any all, argmin argmax, amin amax, floor ceil, median mean, mean sum, log2 log, sf cdf"
        names: ClassVar = {a: b for pair in pairs.split(", ") for a, b in (pair.split(), pair.split()[::-1])}

        def other(self, node):
            if node.type != "name" or not _is_used(node):
                return None
            other = self.names.get(node.value)
            method = node.get_previous_leaf() == "."
            return other if method or other in ("min", "max", "any", "all") else None

    class SwapArguments(Own):
        """Exchange the first two arguments of a call."""

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
    """Whether a name is read, not bound."""
    before, after = node.get_previous_leaf(), node.get_next_leaf()
    return after != "=" and before not in ("def", "import", "for", ",") and after not in ("in", ":")


def mutants(path: Path, operators: list[str], most: int, seed: int) -> tuple[list, int]:
    """Up to `most` mutants of a file, drawn with a seed, and the number of places that they are drawn from.

    Mutants that do not compile, change nothing but annotations, or equal an earlier one are skipped.
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


def _place(item) -> tuple[str, int]:
    (mutation,) = item.mutations
    return mutation.operator_name, mutation.occurrence


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


def change(source: str, mutation) -> tuple[str, str]:
    """The lines that a mutant removes from the source, and those that it adds."""
    code = mutated(source, mutation)
    lines = list(difflib.unified_diff(source.splitlines(), code.splitlines(), n=0, lineterm=""))[3:]
    sides = [" ".join(line[1:].strip() for line in lines if line[0] == sign) for sign in "-+"]
    return sides[0], sides[1]


class Copy:
    """A copy of the checkout and a process that runs its tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.refresh()
        # In CI hypothesis draws the same examples every time.
        environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "CI": "true"}
        command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def refresh(self) -> None:
        """Copy the checkout as it is now."""
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
            os.killpg(group, signal.SIGKILL)  # after a timeout the tests, else the processes that they left behind
        code = int(self.process.stdout.readline())
        found = json.loads(result.read_text()) if in_time and result.exists() else {"failed": [], "seconds": {}}
        return {"code": code, **found}

    def close(self) -> None:
        """End the process."""
        self.process.communicate(timeout=60)


class _Order:
    """A pytest plugin: runs `first` first, then quick tests before slow ones; records failures and durations."""

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
    """Run jobs, lines of JSON on stdin, in forks of this process; answer each with its process id and its exit code."""
    import gc

    sys.dont_write_bytecode = True  # a .pyc is valid for another mutant of the same second and size
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
            flags = ["-q", "-x", "-n0", "-oaddopts=", "-pno:cacheprovider", "--tb=short", "--assert=plain"]
            code = pytest.main([*flags, *job["arguments"]], plugins=[order])
            Path(job["result"]).write_text(json.dumps({"failed": order.failed, "seconds": order.seconds}))
            os._exit(int(code))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


class Run:
    """The session of one module."""

    def __init__(self, module: str) -> None:
        self.module, self.config = module, settings()
        self.path = Path(PACKAGE) / f"{module}.py"
        self.source = (ROOT / self.path).read_text()
        self.arguments = self.config["modules"][module]
        digest = hashlib.sha256(self.source.encode()).hexdigest()[:12]
        self.session = SESSIONS / f"{module.replace('/', '.')}-{digest}.sqlite"
        self.killers: dict[str | None, list[str]] = defaultdict(list)

    @cached_property
    def db(self):
        """The mutants and their results, as Cosmic Ray stores them."""
        from cosmic_ray.work_db import WorkDB

        return WorkDB(self.session, WorkDB.Mode.create)

    def plan(self) -> None:
        """Choose the mutants, and add those that the session lacks."""
        found, count = mutants(self.path, self.config["operators"], self.config["sample"], self.config["seed"])
        SESSIONS.mkdir(parents=True, exist_ok=True)
        self.session.with_suffix(".json").write_text(json.dumps({"mutants": count}))
        has = {_place(item) for item in self.db.work_items}
        self.db.add_work_items(item for item in found if _place(item) not in has)

    def execute(self, copies: "queue.Queue[Copy]", again: bool) -> None:
        """Test every mutant that has no result; again: and those that survived and are not listed as equivalent."""
        from cosmic_ray.work_item import TestOutcome

        self.plan()
        listed, survived = equivalent(), set()
        for job, result in self.db.results if again else ():
            alive = result.test_outcome == TestOutcome.SURVIVED
            if alive and differs(self.module, *_sides(result.diff), listed):
                survived.add(job)
        done = {job for job, _ in self.db.results} - survived
        left = [item for item in self.db.work_items if item.job_id not in done]
        if not left:
            return
        for copy in [copies.get() for _ in range(COPIES)]:
            copy.refresh()  # code and tests may have changed since the module before
            copies.put(copy)
        copy, began = copies.get(), time.monotonic()
        whole = copy.test(self.arguments, [], {}, 3600)
        copies.put(copy)
        if whole["code"]:
            said = (copy.folder / LOG).read_text()[-4000:]
            sys.exit(f"the tests of {self.module} fail on the code as it is (exit {whole['code']}):\n{said}")
        seconds, limit_s = whole["seconds"], 20 + 3 * (time.monotonic() - began)
        with (
            ThreadPoolExecutor(COPIES) as pool,
            closing(pool.map(lambda item: (item, self._test(item, copies, seconds, limit_s)), left)) as results,
        ):
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
        was, now = change(self.source, mutation)
        return WorkResult(WorkerOutcome.NORMAL, how, outcome, f"- {was}\n+ {now}")

    def survivors(self) -> Iterator[tuple[str, str]]:
        """(lines of the code, lines of the mutant) of the mutants that no test noticed."""
        results = dict(self.db.results)
        for item in sorted(self.db.work_items, key=lambda item: item.mutations[0].start_pos):
            result = results.get(item.job_id)
            if result and not result.is_killed:
                yield _sides(result.diff)

    def row(self) -> str:
        """A line of the table."""
        count = json.loads(self.session.with_suffix(".json").read_text())["mutants"]
        listed, alive = equivalent(), list(self.survivors())
        same = sum(not differs(self.module, *pair, listed) for pair in alive)
        tested = self.db.num_results
        killed = tested - len(alive)
        share = f"{100 * killed / max(1, tested - same):.1f} %"
        return f"| {self.module} | {count} | {tested} | {killed} | {same} | {len(alive) - same} | {share} |"


def _sides(diff: str) -> tuple[str, str]:
    was, now = diff.split("\n")
    return was.removeprefix("- "), now.removeprefix("+ ")


def equivalent() -> list[dict]:
    """The mutants that docs/testing.md lists as equivalent: module or "*", code, now, why, and line if need be."""
    text = (ROOT / "docs" / "testing.md").read_text()
    blocks = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    return [entry for block in blocks for entry in tomllib.loads(block)["equivalent"]]


def differs(module: str, was: str, now: str, listed: list[dict]) -> bool:
    """Whether a mutant is not listed as equivalent; spaces do not count."""
    was, now = bare(was), bare(now)
    for entry in listed:
        code = bare(entry["code"])
        if entry["module"] not in ("*", module) or bare(entry.get("line", "")) not in was:
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
    parser.add_argument("--again", action="store_true", help="also test those that survived again")
    parser.add_argument("--report", action="store_true", help="test nothing; print the table and the survivors")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        with suppress(KeyboardInterrupt):
            serve()
        return
    known = settings()["modules"]
    if unknown := [module for module in asked.modules if module not in known]:
        parser.error(f"not in [tool.mutation.modules] of pyproject.toml: {', '.join(unknown)}")
    try:
        from cosmic_ray.plugins import OPERATOR_PROVIDERS
    except ModuleNotFoundError:
        parser.error('Cosmic Ray is not installed: pip install -e ".[test,mutation]"')
    OPERATOR_PROVIDERS["own"] = own_operators()
    os.chdir(ROOT)
    modules = asked.modules or list(known)
    if not asked.report:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the copies are removed
        try:
            execute(modules, asked.again)
        except KeyboardInterrupt:
            sys.exit("\nstopped; the same command resumes")
    report(modules)


def execute(modules: list[str], again: bool) -> None:
    """Test the mutants of modules, in copies of the checkout that are removed at the end."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder, ExitStack() as stack:
        copies: queue.Queue[Copy] = queue.Queue()
        for number in range(COPIES):
            copies.put(stack.enter_context(closing(Copy(Path(folder) / str(number)))))
        for module in modules:
            Run(module).execute(copies, again)


def report(modules: list[str]) -> None:
    """Print the table of docs/testing.md, and the survivors that are not listed there as equivalent."""
    listed = equivalent()
    print("| module | mutants | tested | killed | equivalent | survived | killed of those that differ |")
    print("|---|---|---|---|---|---|---|")
    runs = [run for run in map(Run, modules) if run.session.exists() and run.db.num_results]
    for run in runs:
        print(run.row())
    for run in runs:
        for was, now in run.survivors():
            if differs(run.module, was, now, listed):
                print(f"\n{run.module}\n  - {was}\n  + {now}")


if __name__ == "__main__":
    main()
