"""Intervals, so that no rate stands alone."""

import math
from collections.abc import Sequence

import numpy as np

_Z95 = 1.959963984540054


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % Wilson score interval of a rate (Wilson 1927)."""
    if count == 0:
        return 0.0, 1.0
    rate, z2 = hits / count, _Z95**2
    centre = (rate + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z95 / (1 + z2 / count) * math.sqrt(rate * (1 - rate) / count + z2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float, float]:
    """after − before on the same seeds: the difference of rates and its 95 % interval.

    Normal interval of paired differences, half a pair added to either side (Agresti & Min 2005).
    """
    count = len(before)
    gained = sum(a and not b for b, a in zip(before, after, strict=True)) + 0.5
    lost = sum(b and not a for b, a in zip(before, after, strict=True)) + 0.5
    total = count + 2
    difference = (gained - lost) / total
    half = _Z95 * math.sqrt(gained + lost - (gained - lost) ** 2 / total) / total
    low, high = max(-1.0, difference - half), min(1.0, difference + half)
    return (gained - lost) / max(count, 1), low, high


def bootstrap_mean(
    values: Sequence[float], resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of a mean (Efron 1979), from `resamples` draws with replacement."""
    sample, generator = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    means = [
        sample[generator.integers(len(sample), size=len(sample))].mean() for _ in range(resamples)
    ]
    return _middle_95(means)


def bootstrap_groups(
    groups: Sequence[Sequence[float]], resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the mean over groups of values, such as trainings and their
    pictures: groups are drawn with replacement, then values within each.

    Of few groups it is narrow: three trainings say little of a fourth.
    """
    samples, generator = [np.asarray(g, np.float64) for g in groups], np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        drawn = [samples[i] for i in generator.integers(len(samples), size=len(samples))]
        again = [values[generator.integers(len(values), size=len(values))] for values in drawn]
        means.append(np.concatenate(again).mean())
    return _middle_95(means)


def expected_maximum(
    rates: Sequence[float], draws: int = 25, bootstraps: int = 10_000, seed: int = 0
) -> float:
    """Mean of the greatest of `draws` prompts' rates, over bootstraps: I2P's "max exp."
    (Schramowski et al. 2023, Safe Latent Diffusion)."""
    sample, generator = np.asarray(rates, dtype=np.float64), np.random.default_rng(seed)
    chosen = generator.integers(len(sample), size=(bootstraps, draws))
    return float(sample[chosen].max(1).mean())


def bootstrap_maximum(
    rates: Sequence[float], draws: int = 25, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the expected maximum, prompts being resampled.

    Each resample's own expectation is exact: of n sorted rates, the k-th is the greatest of the
    draws with probability (k/n)^draws − ((k−1)/n)^draws.
    """
    sample, generator = np.asarray(rates, dtype=np.float64), np.random.default_rng(seed)
    chances = np.diff((np.arange(len(sample) + 1) / len(sample)) ** draws)
    found = [
        float(np.sort(sample[generator.integers(len(sample), size=len(sample))]) @ chances)
        for _ in range(resamples)
    ]
    return _middle_95(found)


def _middle_95(found: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)
