"""accelerate's processes and precision, as a recipe asks for them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from sdd_lora.errors import BadInput, SddLoraError
from sdd_lora.recipe import Training

_DEVICE_VARIABLES = ("ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE")


def make_accelerator(training: Training, state_path: Path | None) -> Accelerator:
    """Raises BadInput for fp16 without a GPU, SddLoraError where other than the asked number of
    processes came about."""
    on_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    if training.precision == "fp16" and not on_gpu:
        raise BadInput("training.precision: fp16 needs a GPU; expected bf16 or fp32 here")
    AcceleratorState._reset_state()  # else the first recipe's precision binds the process
    with _hidden_settings():
        accelerator = Accelerator(
            mixed_precision={"fp32": "no"}.get(training.precision, training.precision),
            cpu=not on_gpu,
            log_with=None if state_path is None else _tracker(),
            project_dir=None if state_path is None else state_path.parent.parent,
        )
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked != accelerator.num_processes:
        raise SddLoraError(
            f"{asked} processes were asked for, {accelerator.num_processes} came about"
        )
    if accelerator.device.type == "cuda":
        # TF32, as convolutions have it anyway: several times as fast, 10 bits behind the point
        torch.set_float32_matmul_precision("high")
    return accelerator


@contextmanager
def _hidden_settings() -> Iterator[None]:
    """Hide accelerate's settings in the environment, such as
    ACCELERATE_GRADIENT_ACCUMULATION_STEPS, which would change a training behind its recipe's back;
    variables that name the device stay."""
    hidden = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name.startswith("ACCELERATE_") and name not in _DEVICE_VARIABLES
    }
    try:
        yield
    finally:
        os.environ.update(hidden)


def _tracker() -> str | None:
    from accelerate.utils import is_tensorboard_available

    return "tensorboard" if is_tensorboard_available() else None
