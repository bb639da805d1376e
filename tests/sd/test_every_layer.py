"""An adapter of layers of every kind, as `pictures` trains it, is a LoRA like any other."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.algebra import stack
from sdd_lora.adapter.factors import Factors
from sdd_lora.adapter.metadata import Metadata
from sdd_lora.checkpoint.bake import bake
from sdd_lora.checkpoint.locate import DEMO_FOLDER
from sdd_lora.checkpoint.undo import unbake
from sdd_lora.sd.pipeline import load_pipeline
from sdd_lora.training.objectives import is_noxattn

WEIGHTS = Path("unet", "diffusion_pytorch_model.safetensors")


def adapter_of(unet: nn.Module) -> Adapter:
    """Rank 2 on every layer outside the cross-attention, and on its four matrices."""
    random = np.random.default_rng(0)
    factors = {}
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and (is_noxattn(name) or ".attn2." in name):
            out, *rest = module.weight.shape
            down = random.normal(size=(2, int(np.prod(rest)))).astype(np.float32)
            up = 0.02 * random.normal(size=(out, 2)).astype(np.float32)
            kernel = (rest[1], rest[2]) if len(rest) == 3 else None
            factors[name] = Factors(down, up, 2.0, kernel)
    return Adapter(factors, Metadata(name="every-layer"))


@torch.no_grad()
def test_it_loads_in_diffusers_is_baked_and_unbaked_and_stacks(tmp_path):
    generator = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(2, 4, 16, 16, generator=generator),
        torch.tensor([500, 500]),
        torch.randn(2, 77, 128, generator=generator),
    )
    unet = load_pipeline("demo").unet
    base, adapter = unet(*inputs).sample, adapter_of(unet)
    assert any(f.kernel for f in adapter.factors.values()) and len(adapter.factors) > 200
    live = load_pipeline("demo", [(adapter, 1.0)]).unet(*inputs).sample
    bake(DEMO_FOLDER, [(adapter, 1.0)], out=tmp_path / "baked", undo=tmp_path / "demo.undo")
    assert (live - base).square().mean() > 1e-3
    before, after = (load_file(at / WEIGHTS) for at in (DEMO_FOLDER, tmp_path / "baked"))
    for module in adapter.factors:
        name = f"{module}.weight"
        expected = before[name].float() + adapter.delta(module).reshape(before[name].shape)
        assert not torch.equal(after[name], before[name])
        assert torch.allclose(after[name].float(), expected, rtol=1e-3, atol=1e-4)  # fp16
    unbake(tmp_path / "baked", tmp_path / "demo.undo", tmp_path / "back")
    assert (tmp_path / "baked" / WEIGHTS).read_bytes() != (DEMO_FOLDER / WEIGHTS).read_bytes()
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (DEMO_FOLDER / WEIGHTS).read_bytes()
    weapons = Adapter.load(Path(__file__).parents[2] / "adapters" / "demo" / "weapons")
    both = stack([(adapter, 1.0), (weapons, 0.5)])
    for module in weapons.factors:
        expected = adapter.delta(module) + 0.5 * weapons.delta(module)
        assert torch.allclose(both.delta(module), expected, atol=1e-5)
