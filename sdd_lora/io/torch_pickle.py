"""The pickle in a torch file, read as data: tensors and plain values; nothing in it ever runs."""

import io
import math
import pickle
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdd_lora.io.safetensors import NUMPY_DTYPES, TensorInfo

MAX_OPCODES = 1_000_000

#: torch's storage, its dtype, and safetensors' code of it
_DTYPES = (
    ("DoubleStorage", "float64", "F64"),
    ("FloatStorage", "float32", "F32"),
    ("HalfStorage", "float16", "F16"),
    ("BFloat16Storage", "bfloat16", "BF16"),
    ("LongStorage", "int64", "I64"),
    ("IntStorage", "int32", "I32"),
    ("ShortStorage", "int16", "I16"),
    ("CharStorage", "int8", "I8"),
    ("ByteStorage", "uint8", "U8"),
    ("BoolStorage", "bool", "BOOL"),
    ("Float8_e4m3fnStorage", "float8_e4m3fn", "F8_E4M3"),
    ("Float8_e5m2Storage", "float8_e5m2", "F8_E5M2"),
)
_TYPED_STORAGES = {f"torch.{storage}": code for storage, _, code in _DTYPES}
_TORCH_DTYPES = {f"torch.{dtype}": code for _, dtype, code in _DTYPES}
_UNTYPED_STORAGE = "torch.storage.UntypedStorage"
#: ways to construct something, or to read what lies elsewhere, that torch doesn't use
_REFUSED_OPCODES = ("PERSID", "DICT", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "FROZENSET")


@dataclass(frozen=True)
class StridedInfo(TensorInfo):
    """A tensor that isn't stored row by row; `start` to `end` is the part of the file it spans."""

    strides: tuple[int, ...]

    def gather(self, span: bytes) -> np.ndarray:
        """The tensor, row by row, from the bytes it spans."""
        flat = np.frombuffer(span, NUMPY_DTYPES[self.dtype])
        steps = [stride * flat.itemsize for stride in self.strides]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, self.shape, steps))


@dataclass(frozen=True)
class _Global:
    """What the pickle wanted to import, and was not: "module.name"."""

    path: str


@dataclass(eq=False)
class Call:
    """What the pickle wanted to construct, and was not; `state` is what it would have been given
    afterwards."""

    function: str
    arguments: Any = ()
    state: Any = None

    def append(self, *_: Any) -> None:
        """Leave out what the pickle would fill it with."""

    extend = __setitem__ = append

    @property
    def is_array(self) -> bool:
        """Whether it is an array, or a tensor of a kind that isn't read here."""
        name = self.function.rpartition(".")[2]
        return name.startswith("_rebuild") or name in ("_reconstruct", "_frombuffer")

    @property
    def is_scalar(self) -> bool:
        """Whether it is one of numpy's numbers."""
        return self.function.startswith("numpy.") and self.function.endswith(".scalar")


class _Fields(dict[str | int, Any]):
    """A dictionary whose keys are text and numbers; entries under others are left out, unhashed."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, str | int):
            super().__setitem__(key, value)


#: in Python, as C's has no handlers to take away; typeshed knows little of it
_Unpickler: Any = pickle._Unpickler


class _Handlers(dict[int, Callable[..., None]]):
    """Opcode → handler; counts its steps, and refuses what a tensor file has no need of."""

    steps = 0

    def __getitem__(self, opcode: int) -> Callable[..., None]:
        self.steps += 1
        if self.steps > MAX_OPCODES:
            raise ValueError(f"its pickle has more than {MAX_OPCODES:,} steps")
        if opcode not in self:
            raise ValueError(f"its pickle uses opcode {opcode:#04x}, which tensors don't need")
        return super().__getitem__(opcode)


class _InertUnpickler(_Unpickler):  # type: ignore[misc]
    """Python's unpickler, which imports, calls and builds nothing: inert records stand for that."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self.dispatch = _Handlers(self.dispatch)
        self.refused: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        if path not in _KNOWN_GLOBALS:
            self.refused.add(path[:200])
        return _Global(path)

    def persistent_load(self, identity: Any) -> Any:
        return _storage(identity)

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = _call(self.stack[-1], arguments)

    def load_newobj_ex(self) -> None:
        self.stack.pop()
        self.load_reduce()

    def load_build(self) -> None:
        state, built = self.stack.pop(), self.stack[-1]
        if isinstance(built, Call):  # dictionaries' attributes (`_metadata`) are no tensors
            built.state = state

    def load_empty_dictionary(self) -> None:
        self.append(_Fields())

    dispatch = {
        ord(opcode.code): _Unpickler.dispatch[ord(opcode.code)]
        for opcode in pickletools.opcodes
        if opcode.proto <= 4 and opcode.name not in _REFUSED_OPCODES
    } | {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build,
        pickle.EMPTY_DICT[0]: load_empty_dictionary,
        # a set is a list: hashing a hostile item (tuples in tuples in …) would overflow the stack
        pickle.EMPTY_SET[0]: _Unpickler.load_empty_list,
        pickle.ADDITEMS[0]: _Unpickler.load_appends,
        # as bytes, which take no memory before they are there
        pickle.BYTEARRAY8[0]: _Unpickler.load_binbytes8,
    }


def unpickle(data: bytes) -> tuple[Any, set[str]]:
    """What a pickle describes, in plain data and inert records, and the globals it asked for in
    vain. Raises ValueError, whatever is wrong with it."""
    unpickler = _InertUnpickler(data)
    try:
        return unpickler.load(), unpickler.refused
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"its pickle is damaged: {type(error).__name__}") from error


def _call(function: Any, arguments: Any) -> Any:
    """A tensor or a dictionary, where the call makes one; else a record of it."""
    path = function.path if isinstance(function, _Global) else ""
    if path not in _MAKERS:
        return Call(path[:200], arguments)
    try:
        return _MAKERS[path](*arguments)
    except TypeError as error:
        raise ValueError("a tensor described by too few or too many values") from error


# Tensors


@dataclass(frozen=True)
class _Storage:
    dtype: str | None  # None: untyped
    name: str


@dataclass(frozen=True)
class PickledTensor:
    """A tensor of a storage: `offset` and `strides` count elements."""

    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def info(self, start: int, end: int) -> TensorInfo:
        """Where the tensor lies, its storage being at `start` to `end`. Raises ValueError."""
        itemsize = NUMPY_DTYPES[self.dtype].itemsize
        count = math.prod(self.shape)
        span = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        first = start + self.offset * itemsize
        last = first + (span if count else 0) * itemsize
        if last > end or count * itemsize > end - start:
            raise ValueError(
                f"a tensor {self.shape} reaches beyond its storage {self.storage.name}"
            )
        steps = [math.prod(self.shape[n + 1 :]) for n in range(len(self.shape))]
        if count == 0 or all(
            size == 1 or stride == step
            for size, stride, step in zip(self.shape, self.strides, steps, strict=True)
        ):
            return TensorInfo(self.dtype, self.shape, first, last)
        return StridedInfo(self.dtype, self.shape, first, last, self.strides)


def _storage(identity: Any) -> _Storage:
    if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
        raise ValueError("its pickle refers to something that is no storage")
    kind, name = identity[1], identity[2]
    if not isinstance(kind, _Global) or not isinstance(name, str) or not name.isalnum():
        raise ValueError("its pickle refers to a storage without type or name")
    if kind.path != _UNTYPED_STORAGE and kind.path not in _TYPED_STORAGES:
        raise ValueError(f"a storage of unknown type {kind.path[:200]!r}")
    return _Storage(_TYPED_STORAGES.get(kind.path), name)


def _rebuilt_tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    _gradient: Any = None,
    _hooks: Any = None,
    dtype: Any = None,
    _metadata: Any = None,
) -> PickledTensor:
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without storage")
    code = storage.dtype
    if code is None and isinstance(dtype, _Global):
        code = _TORCH_DTYPES.get(dtype.path)
    if code is None:
        raise ValueError("a tensor of unknown dtype")
    if not _are_sizes(shape) or not _are_sizes(strides) or not _are_sizes((offset,)):
        raise ValueError("a tensor whose shape, strides or offset aren't whole numbers")
    if len(shape) != len(strides):
        raise ValueError("a tensor with another number of strides than of dimensions")
    return PickledTensor(storage, code, offset, shape, strides)


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _tensor_with_attributes(function: Any, _type: Any, arguments: Any, _state: Any) -> Any:
    return _call(function, arguments)


def _dictionary(pairs: Any = ()) -> _Fields:
    fields = _Fields()
    for key, value in pairs:
        fields[key] = value
    return fields


#: what makes a tensor or a dictionary in torch's files → how it is read
_MAKERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dictionary,
    "torch._tensor._rebuild_from_type_v2": _tensor_with_attributes,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_tensor": _rebuilt_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuilt_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuilt_tensor,
}
_KNOWN_GLOBALS = {
    *_TYPED_STORAGES,
    *_TORCH_DTYPES,
    *_MAKERS,
    _UNTYPED_STORAGE,
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
}


def _are_sizes(values: Any) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) <= 16
        and all(type(v) is int and 0 <= v < 1 << 48 for v in values)
    )
