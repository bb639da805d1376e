"""Adapters for tests of other parts."""

import numpy as np

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.factors import Factors
from sdd_lora.sd.model import load_training_parts


def random_adapter(strength: float, rank: int = 2, seed: int = 0) -> Adapter:
    """On the embedded model's to_k and to_v; deltas of `strength` × the weights' norm."""
    rng = np.random.default_rng(seed)
    factors = {}
    for name, module in load_training_parts("demo").unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            out, wide = module.weight.shape
            down = rng.standard_normal((rank, wide), np.float32) / np.sqrt(wide)
            up = rng.standard_normal((out, rank), np.float32)
            scale = strength * module.weight.norm().item() / np.linalg.norm(up @ down)
            factors[name] = Factors(down, up * np.float32(scale), float(rank))
    return Adapter(factors, {"name": "random"})
