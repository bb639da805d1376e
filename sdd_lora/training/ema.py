"""The average of the adapter's weights (the paper's EMA model, kept over the factors alone)."""

from collections.abc import Mapping

import torch


def decay_at(update: int, decay: float, warmup: bool) -> float:
    """Decay of the `update`-th average (from 0): m, or min(m, (1+t)/(10+t)) with warm-up."""
    return min(decay, (1 + update) / (10 + update)) if warmup else decay


@torch.no_grad()
def update_average(
    average: Mapping[str, torch.Tensor], current: Mapping[str, torch.Tensor], decay: float
) -> None:
    """average ← m · average + (1 − m) · current, in place, paired by name.

    The factors A and B are averaged, as one would average weights; that is not the average of the
    products BA (the two differ by the covariance of A and B along the run).
    """
    assert average.keys() == current.keys()
    names = list(average)
    torch._foreach_lerp_([average[n] for n in names], [current[n] for n in names], 1 - decay)
