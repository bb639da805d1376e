"""The two factors of one module's delta: ΔW = alpha / rank · up @ down; or of the embeddings'."""

import math
from dataclasses import dataclass, replace

import numpy as np

from sdd_lora.errors import BadInput
from sdd_lora.sd1 import same_shape

#: Columns of the sketch beyond the rank, and rounds that sharpen it: the error is then within a
#: percent of the best possible one even where the spectrum falls slowly.
_OVERSAMPLING = 16
_POWER_ITERATIONS = 3


@dataclass(frozen=True, eq=False)
class Factors:
    """One module's delta in low-rank form, fp32.

    down is (r, in), up is (out, r). Of a convolution `kernel` is its (height, width) and `in` runs
    over channels × height × width, as in the flattened weight. At alpha 0 the module adds
    nothing. Raises BadInput where the shapes disagree, the rank is 0, or a value is not finite.
    """

    down: np.ndarray
    up: np.ndarray
    alpha: float
    kernel: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.down.ndim != 2 or self.up.ndim != 2 or self.up.shape[1] != self.rank:
            raise BadInput(
                f"down {self.down.shape} and up {self.up.shape} don't fit; "
                "expected (rank, in) and (out, rank)"
            )
        if self.rank == 0:
            raise BadInput("rank 0: there is nothing in it")
        require_alpha(self.alpha)
        if not (np.isfinite(self.down).all() and np.isfinite(self.up).all()):
            raise BadInput("values that are not finite (NaN or infinity)")

    def __repr__(self) -> str:
        size = " × ".join(map(str, self.weight_shape))
        return f"{type(self).__name__}({size}, rank {self.rank}, alpha {self.alpha:g})"

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def parameters(self) -> int:
        return self.down.size + self.up.size

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight that the delta belongs to: (out, in) or (out, channels, h, w)."""
        out, wide_in = self.up.shape[0], self.down.shape[1]
        if self.kernel is None:
            return (out, wide_in)
        return (out, wide_in // math.prod(self.kernel), *self.kernel)

    def delta(self) -> np.ndarray:
        """ΔW, dense, (out, in) fp32."""
        return (self.up * np.float32(self.scale)) @ self.down

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the delta is for a weight of this shape."""
        return same_shape(self.weight_shape, shape)

    def on(self, weight: np.ndarray) -> "Factors":
        """The factors of what is added to `weight` (out, …): these, whatever the weight."""
        return self

    def norm(self) -> float:
        """The Frobenius norm of ΔW, from the factors' Gram matrices: nothing dense is formed."""
        return math.sqrt(max(inner(self, self), 0.0))

    def scaled(self, weight: float) -> "Factors":
        """The factors of weight · ΔW."""
        return replace(self, up=self.up * np.float32(weight))

    def folded(self) -> "Factors":
        """The same delta with alpha = rank: the scale moves into `up`."""
        if self.alpha == self.rank:
            return self
        return replace(self, up=self.up * np.float32(self.scale), alpha=float(self.rank))

    def padded(self, rank: int) -> "Factors":
        """The same delta at a higher rank, by zeros. Expects folded factors."""
        more = rank - self.rank
        down = np.pad(self.down, ((0, more), (0, 0)))
        up = np.pad(self.up, ((0, 0), (0, more)))
        return replace(self, down=down, up=up, alpha=float(rank))

    def with_alpha(self, alpha: float) -> "Factors":
        """The same delta at another alpha: exact where the two are a power of two apart."""
        return replace(self, up=self.up * np.float32(self.alpha / alpha), alpha=alpha)

    def balanced(self) -> "Factors":
        """The same delta, exactly, with up and down of like size: each rank's pair is multiplied
        by 2ᵏ and 2⁻ᵏ. A trained `up` is often so small that fp16 would hold it as subnormals.
        """
        wide, tall = np.abs(self.down).max(axis=1), np.abs(self.up).max(axis=0)
        used = (wide > 0) & (tall > 0)
        ratio = np.divide(tall, wide, out=np.ones_like(wide), where=used)
        power = np.exp2(np.round(np.log2(ratio) / 2)).astype(np.float32)
        return replace(self, down=self.down * power[:, None], up=self.up / power)


@dataclass(frozen=True, eq=False)
class EmbeddingFactors(Factors):
    """The factors of a change of the prompts' embeddings: e ↦ (I + scale · up @ down) e.

    down is (r, d), up is (d, r). A matrix W that reads embeddings sees the change as
    ΔW = W · (scale · up @ down): of one change, every model gets a delta of its own.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.down.shape[1] != self.up.shape[0]:
            raise BadInput(
                f"down {self.down.shape} and up {self.up.shape}: a change of embeddings keeps "
                "their width; expected (rank, width) and (width, rank)"
            )

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape reads embeddings of this width."""
        return len(shape) >= 2 and same_shape(shape, (shape[0], self.down.shape[1]))

    def on(self, weight: np.ndarray) -> Factors:
        """The factors of ΔW for a `weight` (out, d): down as it is, up = W · up. Raises BadInput
        where the weight is not finite."""
        matrix = weight.reshape(len(weight), -1).astype(np.float64)
        if not np.isfinite(matrix).all():
            raise BadInput("a to_k or to_v holds NaN or infinite weights; the model is damaged")
        up = matrix @ self.up.astype(np.float64)
        return Factors(self.down, up.astype(np.float32), self.alpha)


def require_alpha(alpha: float) -> None:
    """Raises BadInput where alpha can't scale a delta."""
    if not math.isfinite(alpha):
        raise BadInput(f"alpha is {alpha}; expected a finite number")


def inner(a: Factors, b: Factors) -> float:
    """⟨ΔWₐ, ΔW_b⟩ = tr((uₐᵀu_b)(d_b dₐᵀ)), in fp64, through rank × rank matrices alone."""
    up = a.up.astype(np.float64).T @ b.up
    down = a.down.astype(np.float64) @ b.down.T
    return a.scale * b.scale * float((up * down).sum())


def concatenated(parts: list[Factors]) -> Factors:
    """Σ ΔWᵢ, exactly: the factors side by side. All parts are of one module."""
    folded = [part.folded() for part in parts]
    down = np.concatenate([part.down for part in folded])
    up = np.concatenate([part.up for part in folded], axis=1)
    return replace(parts[0], down=down, up=up, alpha=float(down.shape[0]))


def truncated(factors: Factors, rank: int | None, energy: float | None) -> tuple[Factors, float]:
    """The best approximation of ΔW (Eckart–Young) and the relative error it costs.

    To `rank`, or to the smallest rank that keeps the share `energy` of ‖ΔW‖². QR of both factors
    first, so that the SVD is of a rank × rank matrix. The result is folded and balanced: up and
    down share the singular values. The error is ‖ΔW − ΔW′‖ / ‖ΔW‖, from the spectrum's tail.
    """
    q_up, r_up = np.linalg.qr(factors.up.astype(np.float64) * factors.scale)
    q_down, r_down = np.linalg.qr(factors.down.astype(np.float64).T)
    left, values, right = np.linalg.svd(r_up @ r_down.T)
    kept = rank_to_keep(values, rank, energy)
    root = np.sqrt(values[:kept])
    up = (q_up @ left[:, :kept]) * root
    down = root[:, None] * (right[:kept] @ q_down.T)
    whole = math.sqrt(float((values**2).sum()))
    tail = math.sqrt(float((values[kept:] ** 2).sum()))
    down, up = down.astype(np.float32), up.astype(np.float32)
    small = replace(factors, down=down, up=up, alpha=float(kept))
    return small, tail / whole if whole else 0.0


def rank_to_keep(values: np.ndarray, rank: int | None, energy: float | None) -> int:
    """How many singular values stay: at least one, at most `rank`, enough for `energy`."""
    if energy is None:
        assert rank is not None
        return min(rank, len(values))
    shares = np.cumsum(values**2)
    if not shares[-1]:
        return 1
    return min(int(np.searchsorted(shares, energy * shares[-1])) + 1, len(values))


def low_rank(
    change: np.ndarray, rank: int | None, energy: float | None, seed: int = 0
) -> tuple[Factors, float]:
    """Factors of a dense change, and the share of ‖change‖² that they keep, by randomised SVD.

    The change is of a weight, (out, in) or (out, channels, h, w); the factors are of at most
    `rank`, or of the lowest rank that keeps `energy`. The same seed gives the same factors
    (Halko, Martinsson and Tropp 2011).
    """
    matrix = change.reshape(len(change), -1).astype(np.float32)
    whole = float(np.square(matrix, dtype=np.float64).sum())
    size = (rank or 16) + _OVERSAMPLING
    while True:
        left, values, right = _leading_svd(matrix, size, seed)
        captured = float(np.square(values, dtype=np.float64).sum())
        if energy is None or size >= min(matrix.shape) or captured >= energy * whole:
            break
        size *= 2
    wanted = None if energy is None else min(energy * whole / captured, 1.0)
    kept = rank_to_keep(values, rank, wanted)
    root = np.sqrt(values[:kept])
    kernel = (change.shape[2], change.shape[3]) if change.ndim == 4 else None
    down, up = root[:, None] * right[:kept], left[:, :kept] * root
    share = float(np.square(values[:kept], dtype=np.float64).sum()) / whole
    return Factors(down, up, float(kept), kernel), min(share, 1.0)


def _leading_svd(
    matrix: np.ndarray, size: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The leading singular triplets: left (out, k), values (k), right (k, in), fp32."""
    if 2 * size >= min(matrix.shape):
        return np.linalg.svd(matrix, full_matrices=False)
    sketch = np.random.default_rng(seed).standard_normal((matrix.shape[1], size), np.float32)
    basis, _ = np.linalg.qr(matrix @ sketch)
    for _ in range(_POWER_ITERATIONS):
        basis, _ = np.linalg.qr(matrix.T @ basis)
        basis, _ = np.linalg.qr(matrix @ basis)
    left, values, right = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left, values, right
