"""Memory of the process: keeping what was freed, its peak, telling when there is no more."""

import ctypes
import platform
import re
import sys
from pathlib import Path

import torch

#: glibc's mallopt parameters (malloc.h): freed memory above this goes back to the kernel; memory
#: asked of it at once; blocks above this are mapped each on their own
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


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


#: what allocators say of host memory (Linux, Windows) and of Apple's GPUs
_NO_MORE = ("can't allocate memory", "not enough memory", "MPS backend out of memory")
#: Linux (proc(5)): the highest resident size, and what written where sets it back
_STATUS, _CLEAR_REFS, _CLEAR_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs"), "5"


def is_out_of_memory(error: BaseException) -> bool:
    """Is this a device's or the CPU's allocator that has no more?"""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MORE)


def reset_peak() -> bool:
    """Count `peak_bytes` from what is held now on; False where the platform can't."""
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
