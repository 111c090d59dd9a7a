"""Tokenize hashed files: scan, drop duplicates, split, fit, write.

Worker processes scan the files for documents; documents are assigned to splits; the tokenizer learns from the training
split, if it needs to; then one pass writes all ids in a canonical order. What a scan has staged survives a kill.
"""

import copy
import hashlib
import json
import shutil
from array import array
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shortcut_cli import __version__, files
from shortcut_cli.config.schema import Recipe
from shortcut_cli.data import duplicates, executors, splits, workers
from shortcut_cli.data.assembly import PartWriter, ShardMaker, laid_out
from shortcut_cli.data.columns import Places
from shortcut_cli.data.documents import Assign, Document, Source, check_unchanged
from shortcut_cli.data.given import PREFERRED, check_filled
from shortcut_cli.data.hashed import Input, Inputs
from shortcut_cli.data.hashes import in_threads
from shortcut_cli.data.rejects import Reject, all_rejected, passing_rejects
from shortcut_cli.data.shards import FolderWriter
from shortcut_cli.errors import Missing, Rejected, ShortcutError, TooManyRejects, UsageError
from shortcut_cli.events import Note, Progress, Report
from shortcut_cli.formatting import to_json
from shortcut_cli.tokenizers.base import Tokenizer
from shortcut_cli.tokenizers.encoding import Item, PartEncoder, encoded, parts
from shortcut_cli.tokenizers.scanning import Scanned, Scanner, Scans, rejected_records
from shortcut_cli.tokenizers.sources import Some, Sources, Variants, Work

PART_SIZE = 1 << 24  # bytes of text, or tokens, that a process encodes at once if the write pass is divided
WORTH_PARTS = 8  # from this many on, starting processes here costs little beside them
WRITE_TIMES = 16  # a part has many files, but no more than this much of the work of the largest that is allowed


class Tokenization:
    """The steps of one preparation."""

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: Tokenizer,
        kind: str,
        folder: Path,
        rejects: list[Reject],
        *,
        n_workers: int,
        report: Report,
        merge: bool = False,
        execute: executors.Executor | None = None,
    ) -> None:
        self.recipe = recipe
        self.execute = execute
        self.merge = merge
        self.folder = folder
        self.n_workers = n_workers
        self.report = report
        self.given = tokenizer, kind, rejects
        self._begin([])
        key = json.dumps([__version__, recipe.tokenizer.model_dump(), tokenizer.depends_on], sort_keys=True)
        self.staging = folder / ".staging" / hashlib.sha256(key.encode()).hexdigest()[:16]
        files.make_folder(self.staging)
        data = recipe.data
        self.scanner = Scanner(tokenizer, data.val, data.test, data.duplicates == "drop", keep=execute is not None)

    def _begin(self, changed: list[Reject]) -> None:
        """Forget what an earlier try found. changed: files that must not be used any more."""
        tokenizer, self.kind, rejects = self.given
        self.tokenizer = copy.copy(tokenizer) if tokenizer.needs_fit else tokenizer  # `fit` changes it
        self.rejects = [*rejects, *changed]
        self.dropped = duplicates.Dropped()

    def run(self, hashed: Inputs, request: dict[str, Any]) -> dict[str, Any]:
        """Scan, drop duplicates, split, fit and write; returns the manifest.

        If a file could be scanned, and has changed when it is read again, splits and vocabulary have seen what it was.
        So all is done again without it, and it is a reject that may pass: what is written is what a preparation of the
        other files writes.

        If that fails because of the files, rejects.jsonl is there even so, beside no manifest.
        """
        left, changed = hashed, list[Reject]()
        try:
            while True:
                try:
                    return self._run(hashed, left, request)
                except Rejected as reason:
                    found = self._changed(left)
                    if not found:
                        raise ShortcutError(f"a file {reason}", "run the same command again") from reason
                    left, changed = left.without(found), [*changed, *found.values()]
                    first = next(iter(found.values()))
                    self.report(Note(text=f"{first.source} {first.reason}; preparing the other files again"))
                    self._begin(changed)
        except (UsageError, TooManyRejects):
            lines = self._reject_lines(hashed, [])
            files.write(self.folder / "rejects.jsonl", "".join(to_json(line) + "\n" for line in lines))
            raise
        finally:
            with suppress(OSError):  # there is something in them
                self.staging.rmdir()
                self.staging.parent.rmdir()

    def scan_part(self, hashed: Inputs) -> None:
        """Scan files, and the variants of those that the training split gets if no split is empty; keep the results."""
        self.scanner = replace(self.scanner, keep=True)
        sources = self._sources(hashed)
        scans = self._scan(sources, "scan", self._tally())
        if self.kind != "contiguous" and self.tokenizer.variants:
            train = [number for number in np.flatnonzero(scans.found).tolist() if self._trains(hashed, scans, number)]
            self._scan(self._variants_of(sources, np.array(train, np.int64)), "augment")

    def _trains(self, hashed: Inputs, scans: Scans, number: int) -> bool:
        """Whether the training split gets a source, as far as its name or hash tells."""
        if self.kind == "given":
            return hashed.split(number) == "train"
        return splits.split_of(scans.only(number), *self._shares) == "train"

    @property
    def _shares(self) -> tuple[float, float]:
        return self.recipe.data.val, self.recipe.data.test

    def _tally(self) -> splits.Tally:
        return splits.Tally(*self._shares)

    def _changed(self, hashed: Inputs) -> dict[int, Reject]:
        """The files whose bytes are not those any more that were hashed, by their numbers."""

        def check(number: int) -> Reject | None:
            file = hashed[number]
            try:
                check_unchanged(file.path, file.sha256)
            except Rejected as reason:
                return Reject(file.relative, file.sha256, str(reason), passing=True)
            return None

        with ThreadPoolExecutor(self.n_workers) as pool:
            checked = enumerate(in_threads(pool, check, len(hashed)))
            return {number: reject for number, reject in checked if reject}

    def _run(self, hashed: Inputs, left: Inputs, request: dict[str, Any]) -> dict[str, Any]:
        """One try. hashed: all files; left: those to be used."""
        total = self._tally()
        scans = self._scan(self._sources(left), "scan", total)
        if not total.documents:
            raise all_rejected([reject for reject in self.rejects if reject.bad], self._rejects_path)
        everything = self._sources(left, scans)
        scanned = self._without_duplicates(everything)
        assign = self._assign(scanned, replace(total, size=total.size - self.dropped.size))
        if self.tokenizer.needs_fit:
            self.report(Note(text="training the tokenizer on the training split"))
            note = self.tokenizer.fit(scanned, assign)
            if note:
                self.report(Note(text=note))
        work = Work(scanned, assign, *self._variants(scanned, assign))
        vocabulary, eos = self.tokenizer.vocabulary, self.tokenizer.eos
        with FolderWriter(self.folder, vocabulary, self.recipe.data.shard_tokens, eos=eos) as writer:
            self._write(writer, work)
            fields = {"request": request, "split": self.kind, **self._manifest_fields(hashed, total)}
            bad = everything.only(np.flatnonzero(scans.records_rejected.values))
            manifest = writer.finish(self._reject_lines(hashed, bad), fields)
        if not manifest["unfinished"]:
            shutil.rmtree(self.folder / ".staging", ignore_errors=True)  # it may be a link to another disk
        self._say_if_uneven(manifest)
        return manifest

    def fails_again(self, hashed: Inputs) -> bool:
        """Whether all files that an earlier preparation could not read because of the machine still can't be read.

        Then its folder is what another preparation of the same files would write, too.
        """
        before, lines = len(self.rejects), list(passing_rejects(self.folder))
        unread = {line["source"] for line in lines if not line["sha256"]}
        if unread != {reject.source for reject in self.rejects if reject.passing}:
            return False  # what could not be hashed then is gone or rejected now
        lines = [line for line in lines if line["sha256"]]
        known = {file.sha256: file for _, file in hashed.of({line["sha256"] for line in lines})}
        if any(line["sha256"] not in known for line in lines):
            return False
        wanted = [self._source(known[line["sha256"]], line.get("variant", "")) for line in lines]
        read = self._scan(wanted, "try again").found.any()
        again = self.rejects[before:]
        del self.rejects[before:]
        return not read and all(reject.passing for reject in again)

    def _without_duplicates(self, everything: Sources) -> Sources:
        """Find the documents to drop; returns the sources without those that hold no others."""
        if self.recipe.data.duplicates == "keep":
            return everything
        order, starts, sizes = everything.numbers, everything.starts, everything.scans.size.values
        if self.kind == "given":
            ranks = np.array([PREFERRED.index(everything.inputs.split(number)) for number in order.tolist()], np.uint8)
            order = order[np.argsort(ranks, kind="stable")]
        self.dropped = everything.scans.dropped(starts, order)
        if not self.dropped.documents:
            return everything
        begins = starts[everything.numbers]
        ends = begins + sizes[everything.numbers]
        left = self.dropped.befores(ends) - self.dropped.befores(begins) < ends - begins
        for source in everything.only(everything.numbers[~left]):
            check_unchanged(source.path, source.sha256)  # nobody reads it again
            reason = "all of its documents are duplicates of others"
            self.rejects.append(Reject(source.relative, source.sha256, reason, bad=False))
        return everything.only(everything.numbers[left])

    def _assign(self, scanned: Sources, total: splits.Tally) -> Assign:
        """How documents are divided; total: of all that are left. Sets `kind` to the kind of split that it comes to."""
        if self.kind == "documents" and total.distinct < splits.ENOUGH:
            self.report(Note(text="fewer than three different documents: the corpus is cut into train, val and test"))
            self.kind = "contiguous"
        if self.kind == "contiguous":
            assign = splits.contiguous(total)
        elif self.kind == "given":
            begins = scanned.starts[scanned.numbers]
            given = [scanned.inputs.split(number) for number in scanned.numbers.tolist()]
            check_filled(given, "no document that can be used")
            assign = splits.as_given(begins - self.dropped.befores(begins), given)
        else:
            assign = splits.by_document(total) if self.kind == "documents" else splits.AllIn("test")
        return splits.without(self.dropped, assign)

    def _say_if_uneven(self, manifest: dict[str, Any]) -> None:
        """Say if a split is empty, or larger than the training split."""
        if self.kind == "test":
            return
        tokens = {name: split["tokens"] for name, split in manifest["splits"].items()}
        for name in ("val", "test"):
            if not tokens[name]:
                self.report(Note(text=f"the {name} split is empty"))
            elif tokens[name] > tokens["train"]:
                sizes = f"{tokens[name]:,} tokens, train has {tokens['train']:,}"
                self.report(Note(text=f"the {name} split is larger than the training split: {sizes}"))

    def _source(self, file: Input, variant: str = "") -> Source:
        # The suffix says how the bytes are read.
        suffix = max(filter(file.relative.lower().endswith, self.tokenizer.suffixes), key=len, default="")
        name = f"{file.sha256}{suffix}{'.' + variant if variant else ''}.ids"
        return Source(file.path, file.relative, file.sha256, self.staging / name, variant)

    def _sources(self, hashed: Inputs, scans: Scans | None = None) -> Sources:
        """Sources of files: all, or those in which a scan has found something."""
        numbers = np.arange(len(hashed)) if scans is None else np.flatnonzero(scans.found)
        return Sources(hashed, self._source, numbers, scans)

    def _scan(
        self, sources: Sequence[Source], task: str, total: splits.Tally | None = None, own: Collection[str] = ()
    ) -> Scans:
        """Scan in worker processes what no other process has; rejected sources are recorded.

        total: see `Scans`. own: hashes of sources whose scans were nobody else's to leave.
        """
        scans = Scans(len(sources), total, only=bool(total and self.tokenizer.variants))
        rejected, done = dict[int, Rejected](), 0

        def note(number: int, result: Scanned | Rejected) -> None:
            nonlocal done
            done += 1
            if isinstance(result, Rejected):
                rejected[number] = result
            else:
                scans.put(number, result)

        missing = array("Q")
        staged = any(self.staging.iterdir())
        for number, source in enumerate(sources):
            if staged and (result := self.scanner.kept(source)) is not None:
                note(number, result)
            else:
                missing.append(number)
        if self.merge:
            _check_none([n for n in missing if sources[n].sha256 not in own], sources)
        at_once, groups = deque[Sequence[int]](), Some(sources, missing)
        every: Iterable[Sequence[int]] = self.tokenizer.group(groups, self.n_workers)
        while True:
            broken = list[int]()
            jobs = _noted(groups, every, at_once)
            for group, results in self._in_workers(jobs, len(groups)):
                numbers = at_once.popleft()
                if isinstance(results, Rejected):
                    if len(group) > 1:
                        broken += numbers  # one of them crashed the process; scanning each on its own will tell which
                        continue
                    if self.scanner.keep:
                        self.scanner.leave(group[0], results)
                for number, result in zip(
                    numbers, [results] if isinstance(results, Rejected) else results, strict=True
                ):
                    note(number, result)
                self.report(Progress(task=task, done=done, total=len(sources), unit="files"))
            if not broken:
                break
            groups, every = Some(sources, broken), ([place] for place in range(len(broken)))
        for number in sorted(rejected):
            source, reason = sources[number], rejected[number]
            text, passing = str(reason), reason.passing
            self.rejects.append(Reject(source.relative, source.sha256, text, source.variant, passing=passing))
        return scans

    def _in_workers(self, groups: Iterable[list[Source]], most: int) -> Iterator[tuple[list[Source], Any]]:
        if not most:
            return iter(())
        return (self.execute or workers.in_order)(
            self.scanner,
            groups,
            (),
            workers=min(self.n_workers, most),
            timeout_s=self.recipe.data.file_timeout_s,
            memory_mb=self.recipe.data.file_memory_mb,
        )

    @property
    def _rejects_path(self) -> Path | None:
        """Where a user finds the reasons; None if the folder is a temporary one."""
        return None if self.kind == "test" else self.folder / "rejects.jsonl"

    def _variants(self, scanned: Sources, assign: Assign) -> tuple[list[str], Places, Scans]:
        """The augmented forms of the training documents, scanned: their names, see `Work`."""
        names = self.tokenizer.variants
        if not names:
            return [], np.zeros(0, np.int64), Scans(0)
        if self.kind == "contiguous":
            raise UsageError("augmentation needs at least three different files and data.split = 'documents'")
        scans = scanned.scans
        train, moved = array("q"), set[str]()
        for place, source in enumerate(scanned):
            number = int(scanned.numbers[place])
            if assign(Document(scans.only(number), source.start, source.size)) == [("train", source.size)]:
                train.append(place)
                # A document that fills a split that would be empty has variants that no task could know of.
                if self.kind != "given" and not self._trains(scanned.inputs, scans, number):
                    moved.add(source.sha256)
        chosen = np.array(train, np.int64)
        return names, chosen, self._scan(self._variants_of(scanned, chosen), "augment", own=moved)

    def _variants_of(self, sources: Sources, places: Places) -> Variants:
        return Variants(sources.inputs, self._source, sources.numbers[places], self.tokenizer.variants)

    def _write(self, writer: FolderWriter, work: Work) -> None:
        """Write all ids."""
        divided = parts(work.sizes(), PART_SIZE) if self.n_workers > 1 or self.execute else []
        if len(divided) > (1 if self.execute else WORTH_PARTS):
            self._assemble(writer, work, divided)
        else:
            for done, item in enumerate(work, 1):
                for one in encoded(self.tokenizer, item, self.n_workers):
                    writer.add(one.split, one.ids, one.units, one.record)
                self.report(Progress(task="write", done=done, total=len(work), unit="files"))
        self.tokenizer.save(writer.partial / "tokenizer")

    def _assemble(self, writer: FolderWriter, work: Work, divided: list[tuple[int, int]]) -> None:
        """Write all ids in worker processes: parts of the corpus first, then shards."""
        writer.leave_shards()
        made = PartWriter(writer.partial / "parts", self.tokenizer.vocabulary)
        files.make_folder(made.folder)
        jobs = ((number, _within(work[first:last])) for number, (first, last) in enumerate(divided))
        done = 0
        for (_, items), result in self._writing(PartEncoder(self.tokenizer, made), jobs, len(divided)):
            if isinstance(result, Rejected):
                raise result
            done += len(items)
            self.report(Progress(task="write", done=done, total=len(work), unit="files"))
        shards = laid_out(made, len(divided), self.recipe.data.shard_tokens, writer.place)
        for shard, result in self._writing(ShardMaker(writer.partial, made), shards, len(divided)):
            if isinstance(result, Rejected):
                raise ShortcutError(f"{shard.name}.bin could not be written: {result}", "run the same command again")
            writer.hashes[f"{shard.name}.bin"] = result
        shutil.rmtree(made.folder)

    def _writing(self, work: Callable[..., Any], jobs: Iterable[Any], most: int) -> Iterator[tuple[Any, Any]]:
        data = self.recipe.data
        return (self.execute or workers.in_order)(
            work,
            jobs,
            (),
            workers=min(self.n_workers, most),
            timeout_s=WRITE_TIMES * data.file_timeout_s,
            memory_mb=data.file_memory_mb,
        )

    def _manifest_fields(self, hashed: Inputs, total: splits.Tally) -> dict[str, Any]:
        """What the manifest says about the tokenizer, the files and their documents."""
        unread = sum(reject.sha256 is None for reject in self.rejects)
        return {
            "tokenizer": {
                "name": self.recipe.tokenizer.name,
                "fingerprint": self.tokenizer.fingerprint,
                "vocabulary": self.tokenizer.vocabulary,
                "end": self.tokenizer.eos,
                "stride": self.tokenizer.stride,
                "unit": self.tokenizer.unit,
                **self.tokenizer.description,
            },
            "inputs": len(hashed) + hashed.equal + unread,
            "duplicates": hashed.equal,
            "documents_duplicated": self.dropped.documents,
            "rejected": sum(reject.bad and not reject.variant for reject in self.rejects),
            "unfinished": sum(reject.passing for reject in self.rejects),
            "outside_splits": sum(reject.sha256 is None and not reject.bad for reject in self.rejects),
            "variants_rejected": sum(bool(reject.variant) for reject in self.rejects),
            "records": total.records,
            "records_rejected": total.records_rejected,
        }

    def _reject_lines(self, hashed: Inputs, bad: Iterable[Source]) -> Iterator[dict[str, Any]]:
        """The lines of rejects.jsonl: files, records (of the sources `bad`), variants, files that were not wanted."""
        rejected = hashed.of({reject.sha256 for reject in self.rejects if reject.sha256})
        equal = {file.sha256: list(file.duplicates) for _, file in rejected if file.duplicates}
        yield from self._file_lines(equal, lambda reject: reject.bad and not reject.variant)
        for source in bad:
            with open(rejected_records(source), encoding="utf-8") as stream:
                yield from ({"source": source.relative, **json.loads(line)} for line in stream)
        yield from self._file_lines(equal, lambda reject: bool(reject.variant))
        yield from self._file_lines(equal, lambda reject: not reject.bad)

    def _file_lines(self, equal: dict[str, list[str]], wanted: Callable[[Reject], bool]) -> list[dict[str, Any]]:
        lines = [reject.line() for reject in self.rejects if wanted(reject)]
        for line in lines:
            if "variant" not in line and line["sha256"] in equal:
                line["duplicates"] = equal[line["sha256"]]
        return sorted(lines, key=json.dumps)


def _noted(sources: Some, groups: Iterable[Sequence[int]], at_once: deque[Sequence[int]]) -> Iterator[list[Source]]:
    """The sources of each group of places, once the numbers of its sources are appended to `at_once`."""
    for places in groups:
        at_once.append([sources.numbers[place] for place in places])
        yield [sources[place] for place in places]


def _check_none(missing: list[int], sources: Sequence[Source]) -> None:
    """Raise Missing, with the first three names, if there are scans that no task has left."""
    if missing:
        first = [sources[number] for number in missing[:3]]
        names = "".join(f"\n  {one.relative}{' ' + one.variant if one.variant else ''}" for one in first)
        raise Missing(
            f"no task has scanned {len(missing):,} of {len(sources):,} files{names}",
            "run the tasks that were killed again, or leave out --merge: then this process scans them",
        )


def _within(items: list[Item]) -> list[Item]:
    """Consecutive items whose assignment knows no other documents, so that it is small enough for another process."""
    own = [item.source for item in items if not isinstance(item.assign, splits.AllIn)]
    if not own:
        return items
    division = next(item.assign for item in items if item.source is own[0])
    assert isinstance(division, splits.Division), division
    known = division.within(own[0].start, own[-1].start + own[-1].size)
    return [item if isinstance(item.assign, splits.AllIn) else replace(item, assign=known) for item in items]
