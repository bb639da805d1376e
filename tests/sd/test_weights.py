"""External UNet weights: every spelling lands, what doesn't is refused before anything changes."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.small import small_unet

from sdd_lora import sd1 as names
from sdd_lora.errors import BadInput
from sdd_lora.generation.images import draw
from sdd_lora.generation.sampling import Job, Sampling
from sdd_lora.sd.pipeline import load_pipeline
from sdd_lora.sd.weights import apply_weights

SPELLINGS = {
    "bare": lambda name: name,
    "prefixed": lambda name: f"unet.{name}",
    "ldm": lambda name: f"model.diffusion_model.{names.to_ldm(name)}",
    "bare ldm": names.to_ldm,
}


def tuned(wanted):
    generator = torch.Generator().manual_seed(4)
    return {
        name: p.detach() + 0.1 * torch.randn(p.shape, generator=generator)
        for name, p in small_unet().named_parameters()
        if wanted in name
    }


@pytest.mark.parametrize("wanted", ["attn2", ""])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_lands(tmp_path, spelling, wanted):
    weights, unet = tuned(wanted), small_unet()
    path = tmp_path / "weights.safetensors"
    save_file({SPELLINGS[spelling](name): w for name, w in weights.items()}, path)
    apply_weights(unet, path)
    before = small_unet().state_dict()
    assert weights
    for name, value in unet.state_dict().items():
        assert torch.equal(value, weights.get(name, before[name])), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_a_legacy_pickle(tmp_path, dtype):
    weights = {name: w.to(dtype) for name, w in tuned("attn2").items()}
    torch.save({"state_dict": weights}, tmp_path / "weights.pt")
    unet = small_unet()
    apply_weights(unet, tmp_path / "weights.pt")
    for name, value in weights.items():
        assert torch.equal(unet.get_parameter(name), value.float())


def test_a_one_by_one_convolution_may_be_a_matrix(tmp_path):
    name = "mid_block.attentions.0.proj_in.weight"
    unet = small_unet()
    assert unet.get_parameter(name).ndim == 4
    value = torch.randn(unet.get_parameter(name).shape[:2])
    save_file({name: value}, tmp_path / "w.safetensors")
    apply_weights(unet, tmp_path / "w.safetensors")
    assert torch.equal(unet.get_parameter(name)[:, :, 0, 0], value)


KEY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"down_blocks.7.x.weight": torch.ones(2)}, "down_blocks.7.x.weight: the model's UNet has"),
        ({"text_model.encoder.layers.0.mlp.fc1.weight": torch.ones(2)}, "1 of 2 keys have no"),
        ({"first_stage_model.x": torch.ones(2)}, "is a MODEL"),
        ({"conv_in.weight": torch.ones(8, 9, 3, 3)}, r"expected the shape \(8, 4, 3, 3\)"),
        ({f"unet.{KEY}": torch.ones(16, 16)}, "are both mid_block"),
        ({"conv_in.bias": torch.ones(8, dtype=torch.int64)}, "expected floating-point"),
    ],
)
def test_what_has_no_place_is_refused_and_nothing_changed(tmp_path, more, message):
    path = tmp_path / "w.safetensors"
    save_file({KEY: torch.ones(16, 16)} | more, path)
    unet, before = small_unet(), small_unet().state_dict()
    with pytest.raises(BadInput, match=message):
        apply_weights(unet, path)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_an_empty_and_a_missing_file(tmp_path):
    save_file({}, tmp_path / "w.safetensors")
    for path, message in ((tmp_path / "w.safetensors", "found no tensor"), (tmp_path / "x", "x:")):
        with pytest.raises(BadInput, match=message):
            apply_weights(small_unet(), path)


def test_a_pipeline_draws_with_them(tmp_path):
    def image(pipeline):
        ((_, drawn),) = draw(pipeline, [Job("a cat", 1)], Sampling(3, 4.0), "test")
        return drawn.astype(int)

    expected = load_pipeline("demo")
    base = image(expected)
    weights = {
        name: (p * 1.3).detach().contiguous()
        for name, p in expected.unet.named_parameters()
        if "attn2" in name
    }
    expected.unet.load_state_dict(weights, strict=False)
    save_file(weights, tmp_path / "weights.safetensors")
    ours = image(load_pipeline("demo", weights=tmp_path / "weights.safetensors"))
    assert np.abs(ours - base).max() > 20
    assert np.array_equal(ours, image(expected))
