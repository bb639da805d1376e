"""Memory: freed blocks that are kept, the peak of a training, advice where there is no more."""

import mmap
import platform
import subprocess
import sys

import pytest
import torch
from support.trainers import recipe, trainer

from sdd_lora.errors import SddLoraError
from sdd_lora.training import memory
from sdd_lora.training.memory import memory_advice

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


def raising(error):
    def fails(*_, **__):
        raise error

    return fails


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        RuntimeError("MPS backend out of memory (MPS allocated: 5.00 GB)"),
        MemoryError(),
    ],
    ids=["CUDA", "Linux", "Windows", "MPS", "Python"],
)
def test_out_of_memory_gives_advice(monkeypatch, error):
    trained = trainer(recipe())
    monkeypatch.setattr(trained, "_estimate", raising(error))
    with pytest.raises(SddLoraError) as caught, memory_advice(trained.recipe):
        trained.run()
    message = str(caught.value)
    assert "out of memory at" in message
    for step in (
        'overrides["rollout.batch"]=1',
        '["training.gradient_accumulation"]=2',
        '["training.gradient_checkpointing"]=True',
        """["training.base_precision"]='bf16'""",
    ):
        assert step in message
    assert '["parameters"]' not in message and "adamw8bit" not in message


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="shapes"), memory_advice(recipe()):
        raise RuntimeError("shapes cannot be multiplied")


def test_a_second_training_of_a_process_has_a_peak_of_its_own():
    """Or none, where the platform can't tell."""
    size = 400_000_000
    with mmap.mmap(-1, size) as held:  # a tensor's memory would stay with the process
        for _ in range(400):
            held.write(b"x" * (size // 400))
        first = trainer(recipe(training={"iterations": 1})).run().peak_bytes
    second = trainer(recipe(training={"iterations": 1})).run().peak_bytes
    assert first is None or first > size
    assert second is None or second < first - 0.9 * size


def test_where_no_peak_can_be_reset_only_the_first_training_has_one(monkeypatch):
    monkeypatch.setattr(memory, "reset_peak", lambda: False)
    monkeypatch.setattr(memory.PeakMemory, "_an_earlier_one", False)
    peaks = [trainer(recipe(training={"iterations": 1})).run().peak_bytes for _ in range(2)]
    assert peaks[0] > 0 and peaks[1] is None
