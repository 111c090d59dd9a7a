"""All sources of a corpus as tables that make one at a time, since ten million of them would not fit in memory."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from shortcut_cli.data import splits
from shortcut_cli.data.columns import Places, Rows
from shortcut_cli.data.documents import Assign, Source
from shortcut_cli.data.hashed import Input, Inputs
from shortcut_cli.tokenizers.encoding import Item
from shortcut_cli.tokenizers.scanning import Scans

Make = Callable[[Input, str], Source]  # of a file and a variant


class Some(Rows[Source]):
    """Some sources of a sequence."""

    def __init__(self, sources: Sequence[Source], numbers: Sequence[int]) -> None:
        self.sources, self.numbers = sources, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def row(self, place: int) -> Source:
        """One of them."""
        return self.sources[self.numbers[place]]


class Sources(Rows[Source]):
    """Sources of files, with their sizes and their places in the corpus if they were scanned."""

    def __init__(self, hashed: Inputs, make: Make, numbers: Places, scans: Scans | None = None) -> None:
        """numbers: of the files, and of their scans."""
        self.inputs, self.make, self.numbers = hashed, make, numbers
        self.found = scans
        self.starts = scans.starts() if scans else np.zeros(0, np.int64)

    @property
    def scans(self) -> Scans:
        """What was found in all files."""
        assert self.found is not None
        return self.found

    def __len__(self) -> int:
        return len(self.numbers)

    def row(self, place: int) -> Source:
        """The source of a file."""
        number = int(self.numbers[place])
        source = self.make(self.inputs[number], "")
        return replace(source, size=self.found.size[number], start=int(self.starts[number])) if self.found else source

    def only(self, numbers: Places) -> "Sources":
        """Those of some of the files."""
        found = copy.copy(self)
        found.numbers = numbers
        return found


class Variants(Rows[Source]):
    """The augmented forms of files, all those of a file after each other."""

    def __init__(self, hashed: Inputs, make: Make, numbers: Places, names: list[str]) -> None:
        """numbers: of the files. names: of the forms."""
        self.inputs, self.make, self.numbers, self.names = hashed, make, numbers, names

    def __len__(self) -> int:
        return len(self.numbers) * len(self.names)

    def row(self, place: int) -> Source:
        """A form of a file."""
        file, form = divmod(place, len(self.names))
        return self.make(self.inputs[int(self.numbers[file])], self.names[form])


class Work(Rows[Item]):
    """All that is written, in order: sources, and after each its augmented forms, which are for the training split."""

    def __init__(self, sources: Sources, assign: Assign, names: list[str], train: Places, scans: Scans) -> None:
        """names: of the forms. train: places of the sources that have them. scans: of `Variants`."""
        self.sources, self.assign, self.names, self.scans = sources, assign, sorted(names), scans
        # If there are forms: a source and the number of a form by name, or 0, in one number.
        self.step, self.entries = len(names) + 1, np.zeros(0, np.int64)
        if len(train):
            files, forms = np.divmod(np.flatnonzero(scans.found), len(names))
            ranks = np.array([1 + self.names.index(name) for name in names])
            alone = np.arange(len(sources)) * self.step
            self.entries = np.sort(np.concatenate([alone, train[files] * self.step + ranks[forms]]))
        self.train, self.forms = train, [names.index(name) for name in self.names]

    def __len__(self) -> int:
        return len(self.entries) if len(self.train) else len(self.sources)

    def _form(self, place: int, rank: int) -> int:
        """The number of the scan of a form."""
        return int(self.train.searchsorted(place)) * len(self.names) + self.forms[rank - 1]

    def sizes(self) -> npt.NDArray[Any]:
        """The size of each."""
        if not len(self.train):
            sizes: npt.NDArray[Any] = self.sources.scans.size.values[self.sources.numbers]
            return sizes
        places, ranks = np.divmod(self.entries, self.step)
        found: Places = self.sources.scans.size.values[self.sources.numbers[places]].astype(np.int64)
        for at in np.flatnonzero(ranks).tolist():
            found[at] = self.scans.size[self._form(int(places[at]), int(ranks[at]))]
        return found

    def row(self, at: int) -> Item:
        """A source or a form, with the names of the files that have its bytes."""
        place, rank = divmod(int(self.entries[at]), self.step) if len(self.train) else (at, 0)
        number = int(self.sources.numbers[place])
        file = self.sources.inputs[number]
        source, assign = self.sources[place], self.assign
        if rank:
            form = self.sources.make(file, self.names[rank - 1])
            source, assign = replace(form, size=self.scans.size[self._form(place, rank)]), splits.AllIn("train")
        return Item(source, assign, file.duplicates, self.sources.scans.records_empty[number])
