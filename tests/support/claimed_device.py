"""A stand-in for a GPU: tensors that claim `cuda:0` and keep their values on the CPU.

Within `claimed_cuda()` torch says that it has one CUDA device. What is put there is an `OnCard`:
operations on it compute on the CPU, but as on a card all of an operation's tensors have to be on
one device, generators too, nothing becomes numpy without `.cpu()`, and norms take one dtype; else
it raises what torch raises there. Autocast follows CUDA's lists of operations. Nothing is said of
speed, of memory or of a kernel's rounding.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, PartialState
from bitsandbytes.nn import Params4bit
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing

CARD = torch.device("cuda", 0)
#: bytes that the card claims to have
MEMORY = 24 * 10**9
_NORMS = {torch.ops.aten.native_group_norm.default, torch.ops.aten.native_layer_norm.default}
#: of the functions that CUDA's autocast computes in fp32, those that the CPU's does not
_FP32_IN_AUTOCAST = {
    functional.group_norm,
    functional.layer_norm,
    functional.softmax,
    torch.group_norm,
    torch.layer_norm,
    torch.softmax,
    torch.exp,
    torch.log,
    torch.pow,
    torch.norm,
    torch.sum,
    torch.cumsum,
    torch.cdist,
    torch.Tensor.softmax,
    torch.Tensor.exp,
    torch.Tensor.pow,
    torch.Tensor.norm,
    torch.Tensor.sum,
}
#: functions that take tensors of two devices
_ACROSS = {
    torch.Tensor.copy_,
    torch.Tensor.data.__set__,
    torch.Tensor.grad.__set__,
    torch.Tensor.type_as,
    torch._has_compatible_shallow_copy_type,
}
_JOINING = {torch.cat, torch.stack, torch.concat}


class OnCard(torch.Tensor):
    """A tensor of the card; `held` are its values, on the CPU.

    For torch's C++ side its device is the CPU, whose autograd engine it needs.
    """

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "OnCard":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device="cpu",
        )

    def __init__(self, values: torch.Tensor) -> None:
        self.held = values.detach() if values.requires_grad else values

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():  # what follows is no longer the caller's Python code
            values, options = tree_map(off_card, args), tree_map(off_card, kwargs)
            if func in _NORMS:
                _require_one_dtype(func, values)
            out = tree_map(on_card, func(*values, **options))
            if _returns_its_input(func) and PackedOnCard not in types:
                return return_and_correct_aliasing(func, args, kwargs, out)
        return out

    @property
    def device(self) -> torch.device:
        return CARD

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_cpu(self) -> bool:
        return False

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, value)
        if is_on_card(value):
            self.held = value.held

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        copied = OnCard(self.held.clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        return copied.requires_grad_(self.requires_grad)

    def __repr__(self, **_: Any) -> str:
        return f"OnCard({self.held})"

    def __format__(self, how: str) -> str:
        return format(self.held, how)

    # what makes Module.to swap tensors, not their insides
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, context: Any, size: Any, stride: Any) -> "OnCard":
        return OnCard(inner["held"])


def tree_map(change: Callable[[Any], Any], tree: Any) -> Any:
    """Like torch's, for lists, tuples and dicts alone, and many times as fast."""
    if type(tree) in (tuple, list):
        return type(tree)([tree_map(change, x) for x in tree])
    if type(tree) is dict:
        return {name: tree_map(change, x) for name, x in tree.items()}
    return change(tree)


def tensors_in(*trees: Any) -> list[torch.Tensor]:
    """The tensors in lists, tuples and dicts."""
    found: list[torch.Tensor] = []
    for tree in trees:
        if isinstance(tree, torch.Tensor):
            found.append(tree)
        elif isinstance(tree, tuple | list):
            found += tensors_in(*tree)
        elif isinstance(tree, dict):
            found += tensors_in(*tree.values())
    return found


def is_on_card(value: Any) -> bool:
    """Whether this is a tensor of the card."""
    return type(value) in _KINDS


def on_card(value: Any) -> Any:
    """A tensor put on the card; anything else as it is."""
    if type(value) is not torch.Tensor:
        return value
    return OnCard(value).requires_grad_() if value.requires_grad else OnCard(value)


def off_card(value: Any) -> Any:
    """The values of a tensor on the card; anything else as it is."""
    return value.held if is_on_card(value) else value


class PackedOnCard(Params4bit):
    """A weight of 4 bits on the card."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    __torch_dispatch__ = OnCard.__torch_dispatch__
    device, is_cuda, is_cpu, data = OnCard.device, OnCard.is_cuda, OnCard.is_cpu, OnCard.data

    def to(self, *args: Any, **kwargs: Any) -> "PackedOnCard":
        return self  # packed weights stay where they are


def _pack(weight: Params4bit, value: torch.Tensor) -> None:
    if is_on_card(value):
        torch._C._swap_tensor_impl(weight, OnCard(value.held))
        weight.__class__, weight.held = PackedOnCard, value.held
    else:
        torch.Tensor.data.__set__(weight, value)


#: bitsandbytes puts a packed weight on the card in place: by its data
_PACKED_DATA = property(torch.Tensor.data.__get__, _pack)


_KINDS = {OnCard, PackedOnCard}


@functools.cache
def _returns_its_input(func: Any) -> bool:
    """Whether an operation gives views, or works in place."""
    return any(value.alias_info is not None for value in func._schema.returns)


class _Card(TorchFunctionMode):
    """Devices as Python code sees them: what goes where, and what may meet."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if moved := _MOVES.get(func):
            return moved(func, *args, **kwargs)
        device = kwargs.get("device")
        tensors = tensors_in(args, kwargs)
        mine = any(is_on_card(x) for x in tensors) if device is None else _is_card(device)
        _require_one_generator(func, args, kwargs, mine)
        if mine and device is not None:
            made = func(*tree_map(off_card, args), **tree_map(off_card, kwargs) | {"device": "cpu"})
            return tree_map(on_card, made)
        if mine:
            _require_one_device(func, args, tensors)
            if func in _FP32_IN_AUTOCAST and torch.is_autocast_enabled("cuda"):
                args, kwargs = tree_map(_as_fp32, (args, kwargs))
        return func(*args, **kwargs)


def _as_fp32(value: Any) -> Any:
    half = isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


def _to(func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Tensor.to, which takes a device, a dtype, both or another tensor's."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for given in args[:2]:
        if isinstance(given, torch.Tensor):
            device, dtype = given.device, given.dtype
        elif isinstance(given, torch.dtype):
            dtype = given
        elif given is not None and not isinstance(given, bool):
            device = given
    if device is not None and _is_card(device) != is_on_card(tensor):
        tensor = _Crossing.apply(tensor, _is_card(device))
    copy = bool(kwargs.get("copy"))
    return func(tensor, dtype=tensor.dtype if dtype is None else dtype, copy=copy)


class _Crossing(torch.autograd.Function):
    """A copy on the other device, whose gradient goes back."""

    @staticmethod
    def forward(context: Any, tensor: torch.Tensor, to_card: bool) -> torch.Tensor:
        context.to_card = to_card
        with torch._C.DisableTorchFunctionSubclass():
            plain = off_card(tensor).detach().clone()
        return OnCard(plain) if to_card else plain

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        plain = off_card(gradient).clone()
        return (plain if context.to_card else OnCard(plain)), None


def _refused(func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if is_on_card(tensor):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
    return func(tensor, *args, **kwargs)


#: methods that change a tensor's place, or would show it
_MOVES: dict[Any, Callable[..., Any]] = {
    torch.Tensor.to: _to,
    torch.Tensor.cpu: lambda func, x, *_, **__: _to(torch.Tensor.to, x, "cpu"),
    torch.Tensor.cuda: lambda func, x, *_, **__: _to(torch.Tensor.to, x, CARD),
    torch.Tensor.numpy: _refused,
    torch.Tensor.__array__: _refused,
    torch.Tensor.tolist: lambda func, x: func(off_card(x)),
}


def _is_card(device: Any) -> bool:
    return torch.device(device).type == CARD.type


def _require_one_device(func: Any, args: Sequence[Any], tensors: Sequence[torch.Tensor]) -> None:
    if func in _ACROSS:
        return
    # a card's tensor takes the CPU's indices; the CPU's tensors take single numbers of the card's
    by_number = func is torch.Tensor.__getitem__ and not any(x.dim() for x in tensors_in(args[1]))
    if by_number or (func is torch.Tensor.__getitem__ and is_on_card(args[0])):
        return
    others = [x for x in tensors if not is_on_card(x) and (x.dim() or func in _JOINING)]
    if func is torch.Tensor.__setitem__ and is_on_card(args[0]):
        others = (
            [x for x in tensors_in(args[2]) if x.dim() and not is_on_card(x)]
            if tensors_in(args[1])
            else []
        )
    if others:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 "
            f"and cpu! (in {getattr(func, '__name__', func)}, shapes "
            f"{[tuple(x.shape) for x in tensors]})"
        )


def _require_one_generator(func: Any, args: Any, kwargs: Any, on_the_card: bool) -> None:
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Generator)]
    if on_the_card and given:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")


def _require_one_dtype(func: Any, args: Sequence[Any]) -> None:
    found = {x.dtype for x in args if isinstance(x, torch.Tensor)}
    if len(found) > 1:
        raise RuntimeError(f"{func}: expected one scalar type on CUDA, found {found}")


@contextlib.contextmanager
def claimed_cuda() -> Iterator[None]:
    """Within the block there is one CUDA device, whose tensors are `OnCard`s."""
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": lambda state, device="cuda": None,
        "reset_peak_memory_stats": lambda device=None: None,
        "max_memory_allocated": lambda device=None: 10**9,
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: None,
    }
    set_enabled, set_dtype = torch.set_autocast_enabled, torch.set_autocast_dtype

    def enable_autocast(device: str, enabled: bool) -> None:
        for each in {device, "cpu"}:
            set_enabled(each, enabled)

    def choose_dtype(device: str, dtype: torch.dtype) -> None:
        for each in {device, "cpu"}:
            set_dtype(each, dtype)

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(Params4bit, "data", _PACKED_DATA, create=True))
        # bitsandbytes keeps the codes of its quantiles on the device that asked first
        stack.enter_context(patch.dict("bitsandbytes.functional.name2qmap", clear=True))
        stack.enter_context(patch.object(torch, "set_float32_matmul_precision", lambda how: None))
        stack.enter_context(patch.object(torch, "set_autocast_enabled", enable_autocast))
        stack.enter_context(patch.object(torch, "set_autocast_dtype", choose_dtype))
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        run_backward, card = torch.autograd._engine_run_backward, _Card()

        def run_backward_on_card(*arguments: Any, **options: Any) -> Any:
            with card:  # recomputed forwards and custom functions are Python code too
                return run_backward(*arguments, **options)

        stack.enter_context(
            patch.object(torch.autograd, "_engine_run_backward", run_backward_on_card)
        )
        _forget_devices()
        stack.callback(_forget_devices)
        stack.enter_context(card)
        yield


def _forget_devices() -> None:
    """Have accelerate look again at what there is."""
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
