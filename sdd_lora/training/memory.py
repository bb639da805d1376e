"""Memory of the process: keeping what was freed, telling when there is no more."""

import ctypes
import platform

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


def is_out_of_memory(error: RuntimeError) -> bool:
    """Is this a device's or the CPU's allocator that has no more?"""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
