"""Where a model runs, in which number format, and how running out of memory shows."""

from collections.abc import Callable

import torch

from sdd_lora.errors import BadInput

#: a precision's name → the dtype of a model's weights while it draws
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def best_device() -> torch.device:
    """CUDA, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def device_named(name: str | None) -> torch.device:
    """The device of this name, such as cuda:1; the best one where it is None. Raises BadInput for
    one that this machine or this build of torch lacks."""
    if name is None:
        return best_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    # a torch without CUDA asserts that it has it; a device of another backend is not implemented
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise BadInput(f"device {name}: can't be used here: {first:.200}") from None
    return device


def default_dtype(device: torch.device) -> torch.dtype:
    """The dtype to draw with where nobody chose one: fp16 on CUDA, else fp32."""
    return torch.float16 if device.type == "cuda" else torch.float32


def precision_of(dtype: torch.dtype) -> str:
    """The name of a dtype as recipes and `--precision` have it."""
    return {known: name for name, known in DTYPES.items()}[dtype]


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions of its own for products of bf16 matrices."""
    if device.type == "cpu":
        tell: Callable[[], dict[str, object]] = getattr(torch.cpu, "get_capabilities", dict)
        return any(tell().get(name) for name in ("avx512_bf16", "amx_bf16"))  # {} in older torch
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the CPU's allocator, has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
