"""Legacy checkpoints (`.ckpt`, `.bin`): read as data; no pickle is ever executed.

A torch file is a zip: one pickle that describes the tensors, and an uncompressed entry for each
storage. The pickle is interpreted here with the standard library's tokenizer. Calls and globals
become inert records, so nothing in the file can import or run; the tensors' bytes are then read by
range like those of a safetensors file.
"""

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from sdd_lora.errors import BadInput
from sdd_lora.io.safetensors import DTYPES, Header, TensorInfo, open_input

#: SD 1.x with EMA copies and optimizer states describes itself in 2 MB.
MAX_PICKLE_BYTES = 8 << 20
MAX_OPCODES = 1_000_000
MAX_READ_BYTES = 4 << 20  # of zip directories
MAX_NESTING = 4
#: Names that trainers give to a model's tensors among other things.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params", "unet")

_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "Float8_e4m3fnStorage": "F8_E4M3",
    "Float8_e5m2Storage": "F8_E5M2",
}  # fmt: skip
_TORCH_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64",
    "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ENCRYPTED = 1  # a bit of an entry's flags


@dataclass(frozen=True)
class StridedInfo(TensorInfo):
    """A tensor that isn't stored row by row; `start` to `end` is the part of the file it spans."""

    strides: tuple[int, ...]

    def gather(self, span: bytes) -> np.ndarray:
        """The tensor, row by row, from the bytes it spans."""
        flat = np.frombuffer(span, DTYPES[self.dtype])
        steps = [stride * flat.itemsize for stride in self.strides]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, self.shape, steps))


@dataclass(frozen=True)
class PickleHeader(Header):
    """A legacy file's tensors; their offsets count from the file's beginning.

    `left_out` names entries that aren't tensors of the model (epochs, optimizers, callbacks);
    `refused` the globals that the pickle asked for and did not get.
    """

    left_out: tuple[str, ...]
    refused: tuple[str, ...]


def is_pickle(path: Path) -> bool:
    """Whether a file is a zip or a bare pickle, by its first bytes and not by its name."""
    with open_input(path) as file:
        start = file.read(4)
    return start[:2] == b"PK" or (start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5")


def read_header(path: Path) -> PickleHeader:
    """Names, dtypes, shapes and offsets of a torch file's tensors.

    A model within `state_dict`s, or other names that trainers use, is found. Raises BadInput where
    the file is damaged, hostile, written before torch 1.6, or holds no tensors by name, or two
    models.
    """
    with open_input(path) as file:
        if file.read(2) != b"PK":
            raise BadInput(
                f"{path}: expected a zip as torch has written since 1.6, found a bare pickle; "
                "load it with a torch you trust it to, and save it again"
            )
    try:
        return _read_archive(path)
    except OSError as error:
        raise BadInput(f"{path}: can't be read, or damaged: {error.strerror or error}") from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise BadInput(f"{path}: damaged or no torch file: {error}") from error


class _BoundedFile(io.FileIO):
    """Reads no more at once than a zip's directory may take, whatever its sizes claim."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = MAX_READ_BYTES
        if size > MAX_READ_BYTES:
            raise ValueError(f"its directory would take {size:,} bytes")
        return super().read(size) or b""


def _read_archive(path: Path) -> PickleHeader:
    with _BoundedFile(str(path)) as file:
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            if len(entries) != len(archive.infolist()):
                raise ValueError("two entries of one name")
        description = _description_of(entries)
        root = description.filename.removesuffix("data.pkl")
        size = file.seek(0, 2)

        def locate(name: str) -> tuple[int, int]:
            if name not in entries:
                raise ValueError(f"no entry {name}")
            return _entry_range(file, entries[name], size)

        start, end = locate(description.filename)
        if f"{root}byteorder" in entries:
            _require_little_endian(file, *locate(f"{root}byteorder"))
        file.seek(start)
        pickle = b"".join(iter(lambda: file.read(min(MAX_READ_BYTES, end - file.tell())), b""))
        machine = _Machine()
        state, left_out = _find_state(machine.run(pickle))
        tensors = {}
        for name, value in state.items():
            if isinstance(value, _Tensor):
                tensors[name] = value.info(*locate(f"{root}data/{value.storage.name}"))
            else:
                left_out.append(str(name))
    if not tensors:
        raise ValueError("no tensors by name in it")
    return PickleHeader(tensors, {}, 0, tuple(left_out), tuple(sorted(machine.refused)))


def _description_of(entries: dict[str, zipfile.ZipInfo]) -> zipfile.ZipInfo:
    found = [
        e for name, e in entries.items() if name.count("/") == 1 and name.endswith("/data.pkl")
    ]
    if len(found) != 1:
        raise ValueError(f"expected one */data.pkl in the zip, found {len(found)}")
    if found[0].file_size > MAX_PICKLE_BYTES:
        raise ValueError(f"its pickle is {found[0].file_size:,} bytes long")
    return found[0]


def _entry_range(file: io.FileIO, entry: zipfile.ZipInfo, size: int) -> tuple[int, int]:
    """Where an entry's bytes lie in the file."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise ValueError(f"{entry.filename} is compressed, which torch's files never are")
    if entry.flag_bits & _ENCRYPTED:
        raise ValueError(f"{entry.filename} is encrypted")
    if not 0 <= entry.header_offset <= size:  # a zip64's may be more than a seek takes
        raise ValueError(f"{entry.filename} lies outside the file")
    file.seek(entry.header_offset)
    mark, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    start = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if mark != b"PK\3\4" or start + entry.file_size > size:
        raise ValueError(f"{entry.filename} lies outside the file")
    return start, start + entry.file_size


def _require_little_endian(file: io.FileIO, start: int, end: int) -> None:
    file.seek(start)
    if (order := file.read(min(end - start, 16))) != b"little":
        raise ValueError(f"its byte order is {order!r}; only little-endian files are read")


def _find_state(value: Any) -> tuple[dict[Any, Any], list[str]]:
    """The outermost dictionary of parameters, and the names of the entries around it.

    Raises ValueError where there is none, or a second one of the same parameters.
    """
    left_out: list[str] = []
    for _ in range(MAX_NESTING):
        if not isinstance(value, dict):
            break
        wrapped = [name for name in _WRAPPERS if isinstance(value.get(name), dict)]
        models = [value, *(value[name] for name in wrapped)]
        named = [names for names in map(_parameter_names, models) if names]
        if any(2 * len(named[0] & other) >= len(named[0]) for other in named[1:]):
            raise ValueError("it holds two models, one of which is to be given alone")
        if not wrapped or _parameter_names(value):
            return value, left_out
        left_out += [str(name) for name in value if name != wrapped[0]]
        value = value[wrapped[0]]
    raise ValueError("expected a state_dict: names and tensors")


def _parameter_names(state: dict[Any, Any]) -> set[str]:
    """Names of tensors with a module before the dot: trainers put bare numbers beside a model."""
    return {name for name, value in state.items() if "." in name and isinstance(value, _Tensor)}


# The pickle machine: a stack of plain data and inert records.


@dataclass(frozen=True)
class _Global:
    module: str
    name: str


@dataclass(frozen=True)
class _Call:
    """What the pickle wanted to construct, and was not."""

    function: Any


@dataclass(frozen=True)
class _Storage:
    dtype: str | None  # None: untyped
    name: str


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def info(self, start: int, end: int) -> TensorInfo:
        """Where the tensor lies, its storage being at `start` to `end`. Raises ValueError."""
        itemsize = DTYPES[self.dtype].itemsize
        count = math.prod(self.shape)
        span = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        first = start + self.offset * itemsize
        last = first + (span if count else 0) * itemsize
        if last > end or count * itemsize > end - start:
            raise ValueError(
                f"a tensor {self.shape} reaches beyond its storage {self.storage.name}"
            )
        if count == 0 or self._is_contiguous():
            return TensorInfo(self.dtype, self.shape, first, last)
        return StridedInfo(self.dtype, self.shape, first, last, self.strides)

    def _is_contiguous(self) -> bool:
        expected = 1
        for n, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n != 1 and stride != expected:
                return False
            expected *= n
        return True


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": list,
}  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass
class _Machine:
    """Interprets pickle opcodes; raises ValueError for what a tensor file has no need of."""

    refused: set[str] = field(default_factory=set)
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self, pickle: bytes) -> Any:
        for opcode, argument, _ in islice(pickletools.genops(pickle), MAX_OPCODES):
            if opcode.name == "STOP":
                return self._pop()
            self._step(opcode.name, argument)
        raise ValueError(f"its pickle has more than {MAX_OPCODES:,} steps")

    def _step(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            self.stack.append(tuple([self._pop() for _ in range(_TUPLES[name])][::-1]))
        elif name not in ("PROTO", "FRAME"):
            handler = getattr(self, f"op_{name.lower()}", None)
            if handler is None:
                raise ValueError(f"its pickle uses {name}, which tensors don't need")
            handler(argument)

    def _pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("its pickle takes more than it has put down")
        return self.stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        items = []
        while self.stack and self.stack[-1] is not _MARK:
            items.append(self.stack.pop())
        if not self.stack:
            raise ValueError("its pickle lacks a mark")
        self.stack.pop()
        return items[::-1]

    def op_mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def op_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._pop_to_mark()))

    def op_list(self, _: Any) -> None:
        self.stack.append(self._pop_to_mark())

    def op_dict(self, _: Any) -> None:
        items = self._pop_to_mark()
        self.stack.append({})
        self._set(items)

    def op_setitem(self, _: Any) -> None:
        value, key = self._pop(), self._pop()
        self._set([key, value])

    def op_setitems(self, _: Any) -> None:
        self._set(self._pop_to_mark())

    def op_append(self, _: Any) -> None:
        self._extend([self._pop()])

    def op_appends(self, _: Any) -> None:
        self._extend(self._pop_to_mark())

    def op_additems(self, _: Any) -> None:
        self._extend(self._pop_to_mark())

    def _set(self, items: list[Any]) -> None:
        target = self._top()
        if isinstance(target, dict):
            # hashing a hostile key (tuples in tuples in …) would overflow the stack
            pairs = zip(items[::2], items[1::2], strict=True)
            target.update((key, value) for key, value in pairs if isinstance(key, str))

    def _extend(self, items: list[Any]) -> None:
        target = self._top()
        if isinstance(target, list):
            target.extend(items)

    def _top(self) -> Any:
        top = self._pop()
        self.stack.append(top)
        return top

    def op_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self._top()

    def op_put(self, slot: int) -> None:
        self.memo[slot] = self._top()

    op_binput = op_long_binput = op_put

    def op_get(self, slot: int) -> None:
        if slot not in self.memo:
            raise ValueError("its pickle refers to what it has not stored")
        self.stack.append(self.memo[slot])

    op_binget = op_long_binget = op_get

    def op_pop(self, _: Any) -> None:
        self._pop()

    def op_dup(self, _: Any) -> None:
        self.stack.append(self._top())

    def op_pop_mark(self, _: Any) -> None:
        self._pop_to_mark()

    def op_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._push_global(module, name)

    def op_stack_global(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("its pickle asks for a global without a name")
        self._push_global(module, name)

    def _push_global(self, module: str, name: str) -> None:
        found = _Global(module, name)
        if not _is_known(found):
            self.refused.add(f"{module}.{name}"[:200])
        self.stack.append(found)

    def op_reduce(self, _: Any) -> None:
        arguments, function = self._pop(), self._pop()
        self.stack.append(_call(function, arguments))

    def op_newobj(self, _: Any) -> None:
        self.op_reduce(None)

    def op_newobj_ex(self, _: Any) -> None:
        self._pop()
        self.op_reduce(None)

    def op_build(self, _: Any) -> None:
        self._pop()  # an object's state; dictionaries' attributes (`_metadata`) aren't tensors

    def op_binpersid(self, _: Any) -> None:
        self.stack.append(_storage(self._pop()))


def _is_known(found: _Global) -> bool:
    return (
        (found.module == "torch._utils" and found.name in _REBUILD)
        or (found.module == "torch" and (found.name in _STORAGES or found.name in _TORCH_DTYPES))
        or found == _Global("torch.storage", "UntypedStorage")
        or found == _Global("collections", "OrderedDict")
    )


def _call(function: Any, arguments: Any) -> Any:
    if function == _Global("collections", "OrderedDict") and arguments == ():
        return {}
    if isinstance(function, _Global) and function.module == "torch._utils":
        rebuild = _REBUILD.get(function.name)
        if rebuild is not None and isinstance(arguments, tuple):
            return _rebuilt(rebuild, arguments)
    return _Call(function)


def _rebuilt(rebuild: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        return rebuild(*arguments)
    except TypeError as error:
        raise ValueError("a tensor described by too few or too many values") from error


def _storage(identity: Any) -> _Storage:
    if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
        raise ValueError("its pickle refers to something that is no storage")
    kind, name = identity[1], identity[2]
    if not isinstance(kind, _Global) or not isinstance(name, str) or not name.isalnum():
        raise ValueError("its pickle refers to a storage without type or name")
    if kind.name == "UntypedStorage":
        return _Storage(None, name)
    if kind.name not in _STORAGES:
        raise ValueError(f"a storage of unknown type {kind.name}")
    return _Storage(_STORAGES[kind.name], name)


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, _gradient: Any = None, _hooks: Any = None,
    dtype: Any = None, _metadata: Any = None,
) -> _Tensor:  # fmt: skip
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without storage")
    code = storage.dtype
    if code is None and isinstance(dtype, _Global):
        code = _TORCH_DTYPES.get(dtype.name)
    if code is None:
        raise ValueError("a tensor of unknown dtype")
    if not _are_counts(shape) or not _are_counts(strides) or not _are_counts((offset,)):
        raise ValueError("a tensor whose shape, strides or offset aren't whole numbers")
    if len(shape) != len(strides):
        raise ValueError("a tensor with another number of strides than of dimensions")
    return _Tensor(storage, code, offset, shape, strides)


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


_REBUILD: dict[str, Callable[..., Any]] = {
    "_rebuild_tensor": _rebuild_tensor,
    "_rebuild_tensor_v2": _rebuild_tensor,
    "_rebuild_tensor_v3": _rebuild_tensor,
    "_rebuild_parameter": _rebuild_parameter,
    "_rebuild_parameter_with_state": _rebuild_parameter,
}


def _are_counts(values: Any) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) <= 16
        and all(type(v) is int and 0 <= v < 1 << 48 for v in values)
    )
