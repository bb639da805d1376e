"""Random adapters for the tests."""

import numpy as np

from sdd_lora import sd1 as names
from sdd_lora.adapter.adapter import Adapter, Factors

PLACE = "down_blocks.0.attentions.0"
TO_K = f"{PLACE}.transformer_blocks.0.attn2.to_k"
TO_OUT = f"{PLACE}.transformer_blocks.0.attn2.to_out.0"
#: One module of each kind that an adapter may hold.
KINDS = (
    TO_K,
    TO_OUT,
    f"{PLACE}.transformer_blocks.0.attn1.to_q",
    f"{PLACE}.transformer_blocks.0.ff.net.0.proj",
    f"{PLACE}.transformer_blocks.0.ff.net.2",
    f"{PLACE}.proj_in",
    "mid_block.attentions.0.proj_out",
    "mid_block.resnets.0.conv1",
    "up_blocks.1.resnets.2.conv_shortcut",
    "up_blocks.2.resnets.0.time_emb_proj",
    "up_blocks.0.upsamplers.0.conv",
    "down_blocks.1.downsamplers.0.conv",
    "time_embedding.linear_1",
    "text_encoder.text_model.encoder.layers.1.self_attn.out_proj",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1",
)
ATTENTION_KINDS = tuple(name for name in KINDS if names.is_attention(name))


def shapes(widths: names.Widths = names.DEMO) -> dict[str, tuple[int, ...]]:
    return names.unet_shapes(widths) | names.text_encoder_shapes(widths.context, 2)


def random_factors(
    shape: tuple[int, ...], rank: int, alpha: float, rng: np.random.Generator, size: float = 0.02
) -> Factors:
    out, *rest = shape
    down = rng.standard_normal((rank, int(np.prod(rest)))).astype(np.float32)
    up = (size * rng.standard_normal((out, rank))).astype(np.float32)
    return Factors(down, up, alpha, tuple(rest[1:]) if len(rest) == 3 else None)


def random_adapter(
    seed: int = 0,
    rank: int = 4,
    modules: tuple[str, ...] | None = None,
    alpha: float | None = None,
    widths: names.Widths = names.DEMO,
    size: float = 0.02,
    **metadata: object,
) -> Adapter:
    """An adapter on `modules`, by default attn2's to_k and to_v."""
    rng = np.random.default_rng(seed)
    known = shapes(widths)
    chosen = modules or [n for n in names.CROSS_ATTENTION if n.endswith(("to_k", "to_v"))]
    factors = {
        name: random_factors(known[name], rank, alpha or float(rank), rng, size) for name in chosen
    }
    return Adapter(factors, {"name": f"random-{seed}", **metadata})


def distance(a: Adapter, b: Adapter) -> float:
    """max |ΔWₐ − ΔW_b| over all modules, relative to the largest |ΔWₐ|; the modules must agree."""
    assert a.factors.keys() == b.factors.keys()
    deltas = [(a.factors[name].delta(), b.factors[name].delta()) for name in a.factors]
    largest = max(np.abs(x).max() for x, _ in deltas)
    return float(max(np.abs(x - y).max() for x, y in deltas) / largest)
