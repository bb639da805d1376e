"""Freed memory is kept for the next tensor: counted in page faults, in processes of their own."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
torch.set_num_threads(1)
from sdd_lora.training.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()


def activations():  # of one step: 160 MB alive at once, all freed at its end
    return [torch.ones(5_000_000) for _ in range(8)]


activations()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    activations()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(habit):
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, habit], check=True, capture_output=True, text=True
    )
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's habits")
def test_kept_memory_is_not_asked_of_the_kernel_again(monkeypatch):
    # by chance glibc may keep some itself: a threshold in the environment, which it then leaves
    # alone, has it map and unmap every tensor, until the process asks for something else
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"):
        monkeypatch.delenv(name, raising=False)
    assert page_faults("keep") < 0.3 * page_faults("give back")
