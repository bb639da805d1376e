"""Memory of the process: keeping freed blocks, its peak, and advice where there is no more."""

import ctypes
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sdd_lora.errors import SddLoraError
from sdd_lora.io.strict_yaml import Overrides
from sdd_lora.recipe import Recipe
from sdd_lora.sd.devices import is_out_of_memory

#: glibc's mallopt parameters (malloc.h): freed memory above this goes back to the kernel; memory
#: asked of it at once; blocks above this are mapped each on their own
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
#: Linux (proc(5)): the highest resident size; writing this text to clear_refs resets it
_STATUS, _CLEAR_REFS, _CLEAR_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs"), "5"


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next tensor; False where there is no glibc.

    Otherwise every large activation is given back to the kernel, which hands its pages out again,
    zeroed one by one.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # older ones take no threshold above 32 MiB
    mapped = mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_THRESHOLD, 2**25)
    trimmed = mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    return bool(mapped and trimmed and mallopt(_M_TOP_PAD, 200_000_000))


class PeakMemory:
    """Peak memory of one training of this process, counted from the moment this is made."""

    _an_earlier_one = False

    def __init__(self) -> None:
        self._is_own = reset_peak() or not PeakMemory._an_earlier_one
        PeakMemory._an_earlier_one = True

    def bytes(self) -> int | None:
        """The peak so far; None where an earlier training of the process hides it."""
        return peak_bytes() if self._is_own else None


def reset_peak() -> bool:
    """Count `peak_bytes` from now on; False where the platform can't."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        _CLEAR_REFS.write_text(_CLEAR_PEAK)
    except OSError:  # another platform, or a container that may not
        return False
    return True


def peak_bytes() -> int:
    """Peak memory so far: of the CUDA device where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    if _STATUS.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text())):
        return int(found[1]) * 1024  # getrusage's also knows what ran here before an exec
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def memory_advice(recipe: Recipe) -> Iterator[None]:
    """Turn a lack of memory in the block into an SddLoraError with changes to the recipe."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        steps = [f"{_overrides(changes)} ({costs})" for changes, costs in memory_savers(recipe)]
        if recipe.parameters == "full":
            steps.append(_overrides({"parameters": "lora"}))
        advice = f"Try, in this order: {'; '.join(steps)}" if steps else "Nothing here takes less"
        raise SddLoraError(
            f"out of memory at {peak_bytes() / 1e9:.1f} GB. {advice}; or close other programs that "
            "hold memory"
        ) from error


def _overrides(changes: Overrides) -> str:
    """Changes of a recipe as an error shows them, in Python and at the command line."""
    return " ".join(f'`overrides["{name}"]={value!r}`' for name, value in changes.items())


def memory_savers(recipe: Recipe) -> list[tuple[Overrides, str]]:
    """Changes of a recipe (dotted names → values) that take less memory, and what each costs; the
    cheapest in erasure and time first."""
    training, batch = recipe.training, recipe.rollout.batch
    savers: list[tuple[Overrides, str]] = []

    def add(cost: str, **changes: Any) -> None:
        savers.append(({name.replace("__", "."): v for name, v in changes.items()}, cost))

    if not training.gradient_checkpointing:
        add("the loss's forward is computed twice", training__gradient_checkpointing=True)
    if training.base_precision == "fp32":
        half = "bf16" if training.precision == "fp32" else training.precision
        add(
            f"the base is rounded to {half}; faster where the card computes in it",
            training__precision=half,
            training__base_precision=half,
        )
    if recipe.optimizer.kind == "adamw":
        add("the optimizer's averages are rounded to 8 bits", optimizer__kind="adamw8bit")
    if training.base_precision != "nf4" and recipe.parameters == "lora":
        add(
            "the base's linear layers are rounded to 4 bits and unpacked for each forward",
            training__base_precision="nf4",
        )
    parts = training.gradient_accumulation
    while batch > 1 and batch % 2 == 0:
        batch, parts = batch // 2, parts * 2
        add(
            "the same samples in smaller forwards: a card is less busy",
            rollout__batch=batch,
            training__gradient_accumulation=parts,
        )
    return savers
