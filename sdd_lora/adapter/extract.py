"""Low-rank factors of a dense change, by randomised SVD (Halko, Martinsson and Tropp 2011)."""

import numpy as np

from sdd_lora.adapter.factors import Factors, rank_to_keep

#: Columns of the sketch beyond the rank, and rounds that sharpen it: the error is then within a
#: percent of the best possible one even where the spectrum falls slowly.
OVERSAMPLING = 16
POWER_ITERATIONS = 3


def low_rank(
    change: np.ndarray, rank: int | None, energy: float | None, seed: int = 0
) -> tuple[Factors, float]:
    """Factors of a weight's change (out, in) or (out, channels, h, w), at most `rank` or as few as
    keep `energy`, and the share of ‖change‖² that they keep. The same seed gives the same factors.
    """
    matrix = change.reshape(len(change), -1).astype(np.float32)
    whole = float(np.square(matrix, dtype=np.float64).sum())
    size = (rank or 16) + OVERSAMPLING
    while True:
        left, values, right = _svd(matrix, size, seed)
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


def _svd(matrix: np.ndarray, size: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The leading singular triplets: left (out, k), values (k), right (k, in), fp32."""
    if 2 * size >= min(matrix.shape):
        return np.linalg.svd(matrix, full_matrices=False)
    sketch = np.random.default_rng(seed).standard_normal((matrix.shape[1], size), np.float32)
    basis, _ = np.linalg.qr(matrix @ sketch)
    for _ in range(POWER_ITERATIONS):
        basis, _ = np.linalg.qr(matrix.T @ basis)
        basis, _ = np.linalg.qr(matrix @ basis)
    left, values, right = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left, values, right
