"""W' = round(W + Σ wᵢ·ΔWᵢ): summed in fp64 from the untouched base, rounded once."""

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np

from sdd_lora.adapter.factors import Factors
from sdd_lora.checkpoint.copying import as_array
from sdd_lora.errors import BadInput
from sdd_lora.io.safetensors import TensorInfo

#: Rows are edited in blocks of about this many weights, whose sums fit a processor's cache.
BLOCK_WEIGHTS = 1 << 15


@dataclass(frozen=True)
class Rounding:
    """How the sum becomes the stored dtype: to nearest even, or up or down at random.

    Stochastic rounding keeps an edit smaller than the dtype's step alive on average. It draws from
    (seed, the tensor's name), so that the same call gives the same bytes.
    """

    how: Literal["nearest", "stochastic"] = "nearest"
    seed: int = 0

    def __call__(
        self, exact: np.ndarray, dtype: np.dtype, rng: "np.random.Generator | None"
    ) -> np.ndarray:
        with np.errstate(over="ignore"):
            near = exact.astype(dtype)
        if rng is None:
            return near
        end = ml_dtypes.finfo(dtype).max  # type: ignore[no-untyped-call]
        # not infinity: F8_E4M3 has none
        other = np.nextafter(near, np.where(near.astype(np.float64) < exact, end, -end))
        step = np.abs(other.astype(np.float64) - near.astype(np.float64))
        share = np.abs(exact - near.astype(np.float64))
        with np.errstate(invalid="ignore"):  # where `near` has overflowed
            rounded: np.ndarray = np.where(rng.random(exact.shape) * step < share, other, near)
        return rounded

    def __str__(self) -> str:
        return self.how if self.how == "nearest" else f"{self.how}, seed {self.seed}"

    def generator(self, name: str) -> "np.random.Generator | None":
        """The random numbers of a tensor's rounding; None where none are drawn."""
        if self.how == "nearest":
            return None  # nor is numpy.random imported
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])


@dataclass(frozen=True)
class Delta:
    """Σ wᵢ·ΔWᵢ of one module as factors side by side, fp64: up (out, R), down (R, in)."""

    up: np.ndarray
    down: np.ndarray

    @classmethod
    def of(cls, parts: Sequence[tuple[Factors, float]], weight: np.ndarray) -> "Delta":
        """Of factors of one module with their shares wᵢ; W, the module's `weight` (out, …), is
        what a portable adapter's delta depends on."""
        parts = [(part.on(weight), share) for part, share in parts]
        ups = [part.up.astype(np.float64) * (part.scale * share) for part, share in parts]
        downs = [part.down.astype(np.float64) for part, _ in parts]
        return cls(np.concatenate(ups, axis=1), np.concatenate(downs))

    def rows(self, block: slice) -> np.ndarray:
        product: np.ndarray = self.up[block] @ self.down
        return product

    def blocks(self) -> Iterator[slice]:
        out, wide = self.up.shape[0], self.down.shape[1]
        height = max(1, BLOCK_WEIGHTS // wide)
        for start in range(0, out, height):
            yield slice(start, min(start + height, out))


@dataclass
class Tally:
    """How much of an edit survived the rounding, over one tensor or many.

    `intended` is ‖Δ‖; `realised` the share of Δ that W' − W has along Δ (1 is all of it); `error`
    is ‖W' − (W + Δ)‖ / ‖Δ‖.
    """

    square: float = 0.0
    product: float = 0.0
    error_square: float = 0.0

    def __iadd__(self, other: "Tally") -> "Tally":
        self.square += other.square
        self.product += other.product
        self.error_square += other.error_square
        return self

    @property
    def intended(self) -> float:
        return math.sqrt(self.square)

    @property
    def realised(self) -> float:
        return self.product / self.square if self.square else 1.0

    @property
    def error(self) -> float:
        return math.sqrt(self.error_square / self.square) if self.square else 0.0


def edit(
    name: str, data: bytes, info: TensorInfo, delta: Delta, rounding: Rounding
) -> tuple[memoryview, Tally]:
    """Add `delta` to a tensor given by its bytes; the result's bytes.

    Raises BadInput where the result overflows, or the tensor or the delta isn't finite.
    """
    weight = as_array(data, info).reshape(delta.up.shape[0], -1)
    result = np.empty_like(weight)
    tally = Tally()
    rng = rounding.generator(name)
    with np.errstate(over="ignore", invalid="ignore"):  # seen below
        for block in delta.blocks():
            change = delta.rows(block)
            exact = weight[block].astype(np.float64)
            exact += change
            result[block] = rounding(exact, weight.dtype, rng)
            after = result[block].astype(np.float64)
            lost = after - exact
            error_square = float(np.vdot(lost, lost))
            if not math.isfinite(error_square):  # one number tells of a whole block
                _require_finite_weight(name, info, weight[block], change, exact, after)
            square = float(np.vdot(change, change))
            tally += Tally(square, square + float(np.vdot(lost, change)), error_square)
    return result.reshape(-1).view(np.uint8).data, tally


def _require_finite_weight(
    name: str,
    info: TensorInfo,
    before: np.ndarray,
    change: np.ndarray,
    exact: np.ndarray,
    after: np.ndarray,
) -> None:
    if not np.isfinite(before).all():
        raise BadInput(f"{name}: holds NaN or infinite weights; the model is damaged")
    if not np.isfinite(change).all():
        raise BadInput(f"{name}: the adapters' change of it holds NaN or infinite numbers")
    if not np.isfinite(after).all():
        raise BadInput(
            f"{name}: the edited weights, up to {np.abs(exact).max():.3g}, don't fit "
            f"{info.dtype}; use a smaller weight or a wider copy of the model"
        )
