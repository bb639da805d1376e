"""Processes that torchrun or accelerate started, which share one piece of work."""

from datetime import timedelta

import torch
from accelerate import PartialState

_WAIT = timedelta(days=7)


def processes() -> PartialState:
    """The processes that torchrun or accelerate started, which share the images; often just one."""
    on_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    return PartialState(cpu=not on_gpu, timeout=_WAIT)
