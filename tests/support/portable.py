"""Portable adapters for the tests."""

import numpy as np

from sdd_lora import sd1
from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.factors import EmbeddingFactors


def portable(rank=3, width=128, seed=0, size=0.1, name="portable") -> Adapter:
    """A random change of the embeddings."""
    rng = np.random.default_rng(seed)
    down = rng.standard_normal((rank, width)).astype(np.float32)
    up = (size * rng.standard_normal((width, rank))).astype(np.float32)
    return Adapter({sd1.EMBEDDINGS: EmbeddingFactors(down, up, float(rank))}, {"name": name})


def change(adapter: Adapter) -> np.ndarray:
    """B D, (d, d)."""
    return adapter.factors[sd1.EMBEDDINGS].delta()
