"""The optimizer, its states' size, and its learning rate as a pure function of progress."""

import contextlib
import math
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import torch

from sdd_lora.errors import BadInput
from sdd_lora.progress import warn
from sdd_lora.recipe import Optimizer as OptimizerSettings

#: bitsandbytes keeps the states of smaller tensors in 32 bits unless told otherwise
_ALWAYS_8BIT = 1
#: bitsandbytes' classes, and the bytes of their states for one parameter: a byte a state, and a
#: scale of fp32 for 256 of them
_8BIT = {
    "adamw8bit": ("AdamW8bit", 2 + 2 * 4 / 256),
    "paged_adamw8bit": ("PagedAdamW8bit", 2 + 2 * 4 / 256),
    "lion8bit": ("Lion8bit", 1 + 4 / 256),
}
#: AdamW's two averages; Prodigy's two, its own of the gradients, and where the parameter started
_ADAMW_BYTES, _PRODIGY_BYTES = 8, 16


def make_optimizer(
    settings: OptimizerSettings, parameters: Sequence[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer of a recipe's `optimizer.kind`, of bitsandbytes (states in 8 bits, those of
    small tensors too), torch (AdamW), transformers (Adafactor) or prodigyopt.

    Without bitsandbytes AdamW8bit is AdamW, with a warning; on the CPU, where there is nothing to
    page, PagedAdamW8bit is AdamW8bit. Raises BadInput where another one's package is missing.
    """
    arguments: dict[str, Any] = {
        "lr": settings.learning_rate,
        "weight_decay": settings.weight_decay,
    }
    kind = settings.kind
    if kind == "adafactor":
        from transformers.optimization import Adafactor

        # steps of `lr`, as the others': a step scaled by a factor's own size hardly moves one of 0
        return Adafactor(parameters, scale_parameter=False, relative_step=False, **arguments)
    if kind == "prodigy":
        return _prodigy(parameters, arguments)
    if kind != "adamw" and (bitsandbytes := _bitsandbytes(kind)) is not None:
        if kind == "paged_adamw8bit" and all(p.device.type == "cpu" for p in parameters):
            warn("optimizer.kind: paged_adamw8bit: nothing is paged on a CPU: same as adamw8bit")
            kind = "adamw8bit"
        make = getattr(bitsandbytes.optim, _8BIT[kind][0])
        return make(parameters, min_8bit_size=_ALWAYS_8BIT, **arguments)
    return torch.optim.AdamW(parameters, **arguments)


def _bitsandbytes(kind: str) -> ModuleType | None:
    """The package; None where it is missing and AdamW with 32-bit states serves as well."""
    try:
        import bitsandbytes
    except ImportError as error:
        if kind == "lion8bit":
            raise BadInput(
                f"optimizer.kind: lion8bit needs bitsandbytes, which is missing here ({error}); "
                "expected adamw, adafactor or prodigy without it"
            ) from error
        warn(f"bitsandbytes is missing ({error}): using AdamW with 32-bit states instead")
        return None
    return bitsandbytes


def _prodigy(
    parameters: Sequence[torch.nn.Parameter], arguments: dict[str, Any]
) -> torch.optim.Optimizer:
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise BadInput(
            f"optimizer.kind: prodigy needs a package ({error}): pip install 'sdd_lora[prodigy]'"
        ) from error
    with contextlib.redirect_stdout(sys.stderr):  # it prints that weight decay is decoupled
        # its authors' settings for diffusion models, and safe with `warmup_iterations`
        return Prodigy(parameters, use_bias_correction=True, safeguard_warmup=True, **arguments)


def state_bytes(kind: str, shapes: Iterable[Sequence[int]]) -> int:
    """Bytes of an optimizer's states for parameters of these shapes; of Prodigy's, which keep no
    start of a parameter that starts at 0, at most so many. Adafactor keeps a mean a row and a
    column of matrices, and of a convolution's last two dimensions."""
    total = 0.0
    for shape in shapes:
        count = math.prod(shape)
        if kind == "adafactor" and len(shape) > 1:
            total += 4 * (count // shape[-1] + count // shape[-2])
        elif kind in _8BIT:
            total += count * _8BIT[kind][1]
        else:
            total += count * {"prodigy": _PRODIGY_BYTES, "adafactor": 4}.get(kind, _ADAMW_BYTES)
    return math.ceil(total)


def learning_rate(iteration: int, iterations: int, settings: OptimizerSettings) -> float:
    """The learning rate of an iteration (from 0): linear warm-up, then the schedule."""
    highest, warmup = settings.learning_rate, settings.warmup_iterations
    if iteration < warmup:
        return highest * ((iteration + 1) / warmup)
    progress = (iteration - warmup) / max(1, iterations - warmup)
    if settings.schedule == "linear":
        return highest * (1 - progress)
    if settings.schedule == "cosine":
        return highest * (0.5 * (1 + math.cos(math.pi * progress)))
    return highest
