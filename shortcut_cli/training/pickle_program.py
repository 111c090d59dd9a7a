"""What the pickle in a PyTorch file describes, found without unpickling.

A pickle is a program for a stack machine that can import and call. This one carries out only the operations that
`torch.save` writes for dictionaries, lists, tuples, strings, numbers, None and tensors, and calls nothing: a tensor is
described, not made. An OrderedDict becomes a dictionary, which keeps its order too. Everything is bounded, whatever the
file says: memory by LONGEST and MOST_OBJECTS, time by MOST_OPERATIONS, depth by DEEPEST.
"""

import math
import pickle
import pickletools
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from shortcut_cli.training.zip_directory import Malformed

LONGEST = 64 << 20  # bytes of a program
MOST_OPERATIONS = 1 << 22  # six times those of the resume.pt of 512 layers; under 3 s
MOST_OBJECTS = 1 << 20  # dictionaries, lists, tuples and tensors
MOST_CHARACTERS = 1 << 18  # bytes of a string
MOST_REPEATED = 1 << 24  # characters and items of what the program refers to again
DEEPEST = 32
MOST_AXES = 8
MOST_USES = 2  # of an element: an embedding is the output head too if they are tied
DTYPES = {  # name of the dtype in `torch` and bytes of an element, by the name of the storage class
    "DoubleStorage": ("float64", 8),
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
}


@dataclass(frozen=True)
class Storage:
    """The elements of one or more tensors: the record data/`key`."""

    key: str
    dtype: str  # its name in `torch`
    element_bytes: int
    elements: int


@dataclass(frozen=True, eq=False)
class Described:
    """A tensor: contiguous, from element `first` of its storage."""

    storage: Storage
    first: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Global:
    """A name that the program asks for; it is not imported."""

    name: str


ORDERED = _Global("collections OrderedDict")
REBUILD = _Global("torch._utils _rebuild_tensor_v2")
GLOBALS = {one.name: one for one in (ORDERED, REBUILD, *(_Global(f"torch {name}") for name in DTYPES))}


def read(program: bytes | memoryview, sizes: Mapping[str, int]) -> Any:
    """The value that a program describes, with a `Described` for each tensor.

    sizes: bytes of the records data/KEY, by KEY. Each must belong to a tensor, and be as long as its storage.

    Raises Malformed if the program does anything that `torch.save` does not, or if a bound is exceeded.
    """
    if len(program) > LONGEST:
        raise Malformed(f"its data.pkl is longer than {LONGEST:,} bytes")
    machine = _Machine(bytes(program))
    value = machine.run()
    _check_storages(machine.tensors, sizes)
    _check_depth(value)
    return value


def _check_storages(tensors: list[Described], sizes: Mapping[str, int]) -> None:
    """Each storage is a whole record, and its tensors together have at most MOST_USES times its elements."""
    needed: Counter[Storage] = Counter()
    for tensor in tensors:
        needed[tensor.storage] += math.prod(tensor.shape)
    if sorted(storage.key for storage in needed) != sorted(sizes):
        raise Malformed("its tensors and its records are not the same")
    for storage, elements in needed.items():
        if storage.elements * storage.element_bytes != sizes[storage.key]:
            raise Malformed(f"data/{storage.key} does not have the size that its tensor says")
        if elements > MOST_USES * storage.elements:
            raise Malformed(f"its tensors need more than data/{storage.key} holds")


def _check_depth(value: Any, depth: int = 0) -> None:
    if depth > DEEPEST:
        raise Malformed(f"it is nested more than {DEEPEST} deep")
    if isinstance(value, dict):
        value = value.values()
    elif isinstance(value, Storage | _Global):
        raise Malformed("it holds a storage or a name that belongs to no tensor")
    elif not isinstance(value, list | tuple):
        return
    for item in value:
        _check_depth(item, depth + 1)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_counts(value: Any) -> bool:
    return type(value) is tuple and len(value) <= MOST_AXES and all(map(_is_count, value))


def _constant(value: Any) -> "Callable[[_Machine], None]":
    return lambda machine: machine.stack.append(value)


def _tuple_of(count: int) -> "Callable[[_Machine], None]":
    return lambda machine: machine._made(tuple(machine._pop(count)))


class _Machine:
    """The stack machine: one method for each operation that it carries out."""

    def __init__(self, program: bytes) -> None:
        self.program, self.place = program, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: list[Any] = []  # what the program can refer to again
        self.tensors: list[Described] = []  # one as often as it is used
        self.objects = self.repeated = 0

    def run(self) -> Any:
        """Carry out the program; returns the value that it leaves."""
        if self._take(2) != pickle.PROTO + b"\x02":
            raise Malformed("its data.pkl is not a pickle of protocol 2")
        operations = self.OPERATIONS
        try:
            for _ in range(MOST_OPERATIONS):
                code = self.program[self.place]
                self.place += 1
                if code == pickle.STOP[0]:
                    return self._end()
                operations[code](self)
        except KeyError:
            names = [operation.name for operation in pickletools.opcodes if operation.code == chr(code)]
            raise Malformed(f"it asks for {names[0] if names else f'operation {code}'}") from None
        except IndexError:
            raise Malformed("its data.pkl is truncated or refers to something that is not there") from None
        raise Malformed(f"its data.pkl has more than {MOST_OPERATIONS:,} operations")

    def _end(self) -> Any:
        if len(self.stack) != 1 or self.marks or self.place != len(self.program):
            raise Malformed("its data.pkl does not describe one value")
        return self.stack[0]

    def _take(self, size: int) -> bytes:
        """The next bytes of the program."""
        part = self.program[self.place : self.place + size]
        if len(part) < size:
            raise IndexError(size)
        self.place += size
        return part

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _pop(self, count: int = 1) -> list[Any]:
        """The topmost values, none from below the last mark."""
        first = len(self.stack) - count
        if first < (self.marks[-1] if self.marks else 0):
            raise IndexError(count)
        found = self.stack[first:]
        del self.stack[first:]
        return found

    def _pop_to_mark(self) -> list[Any]:
        return self._pop(len(self.stack) - self.marks[-1])

    def _made(self, value: Any) -> None:
        """Push a new object."""
        self.objects += 1
        if self.objects > MOST_OBJECTS:
            raise Malformed(f"it describes more than {MOST_OBJECTS:,} objects")
        self.stack.append(value)

    # Numbers and strings

    def _short(self) -> None:
        self.stack.append(self._number(1))

    def _two_bytes(self) -> None:
        self.stack.append(self._number(2))

    def _four_bytes(self) -> None:
        self.stack.append(int.from_bytes(self._take(4), "little", signed=True))

    def _long(self) -> None:
        size = self._number(1)
        value = int.from_bytes(self._take(size), "little", signed=True)
        if not -(2**63) <= value < 2**64:
            raise Malformed("it has an integer of more than 64 bits")
        self.stack.append(value)

    def _float(self) -> None:
        self.stack.append(struct.unpack(">d", self._take(8))[0])

    def _string(self) -> None:
        size = self._number(4)
        if size > MOST_CHARACTERS:
            raise Malformed(f"it has a string of more than {MOST_CHARACTERS:,} bytes")
        try:
            self.stack.append(self._take(size).decode())
        except UnicodeDecodeError:
            raise Malformed("it has a string that is not UTF-8") from None

    # Containers

    def _mark(self) -> None:
        self.marks.append(len(self.stack))
        if len(self.marks) > 4 * DEEPEST:
            raise Malformed(f"it is nested more than {DEEPEST} deep")

    def _empty_dict(self) -> None:
        self._made({})

    def _empty_list(self) -> None:
        self._made([])

    def _tuple(self) -> None:
        items = self._pop_to_mark()
        self.marks.pop()
        self._made(tuple(items))

    def _append(self) -> None:
        self._add_to_list(self._pop())

    def _appends(self) -> None:
        items = self._pop_to_mark()
        self.marks.pop()
        self._add_to_list(items)

    def _add_to_list(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) is not list:
            raise Malformed("it appends to something that is not a list")
        target += items

    def _set_item(self) -> None:
        self._add_to_dict(self._pop(2))

    def _set_items(self) -> None:
        items = self._pop_to_mark()
        self.marks.pop()
        self._add_to_dict(items)

    def _add_to_dict(self, items: list[Any]) -> None:
        target, names = self._top(), items[::2]
        if type(target) is not dict or len(items) % 2:
            raise Malformed("it sets items of something that is not a dictionary")
        if not all(type(name) is str or (_is_count(name) and name < 2**31) for name in names):
            raise Malformed("it has a key that is neither a string nor a small number")
        before = len(target)
        target.update(zip(names, items[1::2], strict=True))
        if len(target) != before + len(names):
            raise Malformed("it has a key twice")

    def _top(self) -> Any:
        """The topmost value, which stays."""
        (value,) = self._pop()
        self.stack.append(value)
        return value

    # References. What can change is referred to by nothing else, so that no container holds itself or another's parts.

    def _put(self, size: int) -> None:
        if self._number(size) != len(self.memo):
            raise Malformed("its data.pkl numbers its objects out of order")
        self.memo.append(self._top())

    def _put_short(self) -> None:
        self._put(1)

    def _put_long(self) -> None:
        self._put(4)

    def _get(self, size: int) -> None:
        value = self.memo[self._number(size)]
        if isinstance(value, Described):
            self.tensors.append(value)
        elif isinstance(value, str):
            self.repeated += len(value)
        elif type(value) is tuple and all(type(item) in (str, int, float, bool, type(None)) for item in value):
            self.repeated += sum(len(item) if type(item) is str else 1 for item in value)
        elif not isinstance(value, _Global):
            raise Malformed("it refers twice to one list, dictionary or nested tuple")
        if self.repeated > MOST_REPEATED:
            raise Malformed("it repeats too much")
        self.stack.append(value)

    def _get_short(self) -> None:
        self._get(1)

    def _get_long(self) -> None:
        self._get(4)

    # Tensors

    def _global(self) -> None:
        end = self.program.find(b"\n", self.program.find(b"\n", self.place, self.place + 200) + 1, self.place + 200)
        name = self._take(end - self.place + 1)[:-1].replace(b"\n", b" ").decode(errors="replace") if end > 0 else "?"
        if name not in GLOBALS:
            raise Malformed(f"it asks for {name}")
        self.stack.append(GLOBALS[name])

    def _storage(self) -> None:
        """The storage that a persistent id names: ("storage", class, key, device, elements)."""
        (named,) = self._pop()
        if type(named) is not tuple or len(named) != 5 or named[0] != "storage":
            raise Malformed("it asks for something that is not a storage")
        _, kind, key, device, elements = named
        if not isinstance(kind, _Global) or type(key) is not str or type(device) is not str or not _is_count(elements):
            raise Malformed("it describes a storage as PyTorch does not")
        name = kind.name.removeprefix("torch ")
        if name not in DTYPES:
            raise Malformed(f"it asks for a storage of {kind.name}")
        self.stack.append(Storage(key, *DTYPES[name], elements))

    def _call(self) -> None:
        called, arguments = self._pop(2)
        if called is ORDERED and arguments == ():
            self._made({})
        elif called is REBUILD and type(arguments) is tuple and len(arguments) == 6:
            self._tensor(*arguments)
        else:
            raise Malformed("it asks for a call that PyTorch does not write")

    def _tensor(self, storage: Any, first: Any, shape: Any, strides: Any, gradient: Any, hooks: Any) -> None:
        """As `_rebuild_tensor_v2`. Whether the tensor wants a gradient is not kept."""
        right = isinstance(storage, Storage) and _is_count(first) and type(gradient) is bool and hooks == {}
        if not right or not _are_counts(shape) or not _are_counts(strides) or len(shape) != len(strides):
            raise Malformed("it describes a tensor as PyTorch does not")
        if (
            first + math.prod(shape) > storage.elements
            or max(map(math.prod, (shape, [n or 1 for n in shape]))) >= 2**48
        ):
            raise Malformed(f"a tensor reaches beyond data/{storage.key}")
        if math.prod(shape) and not _is_contiguous(shape, strides):
            raise Malformed("it has a tensor that is not contiguous")
        self._made(Described(storage, first, shape))
        self.tensors.append(self.stack[-1])

    def _build(self) -> None:
        """The version numbers of modules, which `nn.Module.state_dict` leaves in `_metadata`; they are not kept."""
        (state,) = self._pop()
        if type(self._top()) is not dict or type(state) is not dict or state.keys() != {"_metadata"}:
            raise Malformed("it sets attributes")

    OPERATIONS: ClassVar[dict[int, "Callable[[_Machine], None]"]] = {
        ord(code): operation
        for code, operation in {
            pickle.NONE: _constant(None),
            pickle.NEWTRUE: _constant(True),
            pickle.NEWFALSE: _constant(False),
            pickle.BININT1: _short,
            pickle.BININT2: _two_bytes,
            pickle.BININT: _four_bytes,
            pickle.LONG1: _long,
            pickle.BINFLOAT: _float,
            pickle.BINUNICODE: _string,
            pickle.MARK: _mark,
            pickle.EMPTY_DICT: _empty_dict,
            pickle.EMPTY_LIST: _empty_list,
            pickle.EMPTY_TUPLE: _tuple_of(0),
            pickle.TUPLE1: _tuple_of(1),
            pickle.TUPLE2: _tuple_of(2),
            pickle.TUPLE3: _tuple_of(3),
            pickle.TUPLE: _tuple,
            pickle.APPEND: _append,
            pickle.APPENDS: _appends,
            pickle.SETITEM: _set_item,
            pickle.SETITEMS: _set_items,
            pickle.BINPUT: _put_short,
            pickle.LONG_BINPUT: _put_long,
            pickle.BINGET: _get_short,
            pickle.LONG_BINGET: _get_long,
            pickle.GLOBAL: _global,
            pickle.BINPERSID: _storage,
            pickle.REDUCE: _call,
            pickle.BUILD: _build,
        }.items()
    }


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """As PyTorch has it: the last axis is the fastest, and no stride counts that is not needed to find an element."""
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length > 1 and stride != expected:
            return False
        expected *= length
    return True
