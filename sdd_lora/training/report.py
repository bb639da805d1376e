"""Numbers of a training."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Snapshot:
    """When a result was kept, and what had been spent on it."""

    iteration: int
    unet_passes: int
    seconds: float


@dataclass
class TrainingReport:
    """Numbers of a finished training; `peak_bytes` is None where an earlier training in the same
    process hides it, `final_loss` where there were no iterations."""

    iterations: int
    unet_passes: int
    seconds: float
    peak_bytes: int | None
    final_loss: float | None
    snapshots: list[Snapshot]
