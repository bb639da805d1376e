"""Extraction gives back what was put in, across layouts and dtypes, and names what it leaves."""

import numpy as np
import pytest
import torch
from support.adapter_making import KINDS, TO_K, TO_OUT, random_adapter
from support.checkpoint_models import cast, ldm_tensors, states, write, write_folder

from sdd_lora.adapter.factors import low_rank
from sdd_lora.checkpoint.bake import bake
from sdd_lora.checkpoint.detect import find_adapter
from sdd_lora.checkpoint.extract import canonical_parameter, extract
from sdd_lora.errors import BadInput
from sdd_lora.io.safetensors import read_tensors

NORM = "model.diffusion_model.input_blocks.1.1.norm.weight"
LDM_K = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base in two layouts, and a tuned model: an adapter of rank 4 baked into it."""
    folder = tmp_path_factory.mktemp("models")
    base = write(folder / "base.safetensors", ldm_tensors())
    write_folder(folder / "diffusers")
    adapter = random_adapter(5, 4, KINDS)
    bake(base, [(adapter, 1.0)], out=folder / "tuned.safetensors")
    return folder, adapter


@pytest.mark.parametrize("base", ["base.safetensors", "diffusers"])
def test_what_was_baked_in_comes_out(models, base):
    folder, adapter = models
    found = extract(folder / "tuned.safetensors", folder / base, rank=4)
    assert found.adapter.factors.keys() == adapter.factors.keys()
    for name, factors in adapter.factors.items():
        delta = found.adapter.factors[name].delta()
        np.testing.assert_allclose(delta, factors.delta(), atol=2e-6)
        assert found.adapter.factors[name].weight_shape == factors.weight_shape
        assert found.norms[name] == pytest.approx(factors.norm(), rel=1e-4)
    assert found.kept_share == pytest.approx(1, abs=1e-6)
    assert found.inside_share == 1
    assert not found.outside


def test_energy_chooses_the_rank(models):
    folder, _ = models
    found = extract(folder / "tuned.safetensors", folder / "base.safetensors", energy=0.5)
    assert all(part.rank < 4 for part in found.adapter.factors.values())
    assert all(share >= 0.5 for share in found.kept.values())
    assert 0.5 <= found.kept_share < 1


def test_a_cast_is_no_change(models, tmp_path):
    folder, _ = models
    half = write(tmp_path / "half.safetensors", cast(ldm_tensors(), "fp16"))
    with pytest.raises(BadInput, match=r"no weight that an adapter may hold differs .* 0 other"):
        extract(half, folder / "base.safetensors", rank=1)
    tensors = cast(ldm_tensors(), "fp16")
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    tensors[key] = tensors[key] + np.float16(0.5)
    found = extract(write(tmp_path / "b.safetensors", tensors), folder / "diffusers", rank=1)
    assert list(found.adapter.factors) == [TO_K]
    assert found.kept[TO_K] > 0.999


PAIRS = [
    ("fp16", "bf16"),
    ("bf16", "fp16"),
    ("fp32", "bf16"),
    ("bf16", "fp32"),
    ("fp8", "fp16"),
    ("fp32", "fp16", "bf16"),
]


@pytest.mark.parametrize("casts", PAIRS)
def test_weights_rounded_on_different_ways_are_no_change(models, casts, tmp_path):
    """fp32 weights, also such as fp16 holds badly, against others; then with one real change."""
    tensors = dict(ldm_tensors())
    tensors[LDM_K] = tensors[LDM_K] * np.float32(2) ** -np.arange(32, dtype=np.float32)[:, None]
    ours, theirs = tensors, cast(tensors, casts[0])
    for dtype in casts[1:]:
        ours = cast({k: v.astype(np.float32) for k, v in ours.items()}, dtype)
    base = write(tmp_path / "base.safetensors", theirs)
    tuned = write(tmp_path / "tuned.safetensors", ours)
    with pytest.raises(BadInput, match=r"no weight that an adapter may hold differs .* 0 other"):
        extract(tuned, base, rank=1)
    ours[LDM_K] = ours[LDM_K].copy()
    ours[LDM_K][0, 0] *= 2
    found = extract(write(tmp_path / "b.safetensors", ours), base, rank=1)
    assert list(found.adapter.factors) == [TO_K] and not found.outside


def test_a_step_of_the_same_dtype_is_a_change(models, tmp_path):
    tensors = cast(ldm_tensors(), "bf16")
    base = write(tmp_path / "base.safetensors", tensors)
    tensors[LDM_K] = np.nextafter(tensors[LDM_K], np.array(1, tensors[LDM_K].dtype))
    found = extract(write(tmp_path / "b.safetensors", tensors), base, rank=1)
    assert list(found.adapter.factors) == [TO_K]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_damaged_weights_are_named(models, value, tmp_path):
    folder, _ = models
    tensors = dict(ldm_tensors())
    tensors[LDM_K] = np.full_like(tensors[LDM_K], value)
    with pytest.raises(BadInput, match=f"{TO_K}.weight: holds NaN"):
        extract(write(tmp_path / "a.safetensors", tensors), folder / "base.safetensors", rank=1)


def test_a_variant_is_not_what_a_folder_is_compared_by(models, tmp_path):
    """non_ema and fp16 come before the plain file's name in order."""
    folder, adapter = models
    both = write_folder(tmp_path / "both")
    tensors = states()["unet"]
    other = {key: tensor + np.float32(0.1) for key, tensor in tensors.items()}
    write(both / "unet" / "diffusion_pytorch_model.ema.safetensors", other)
    found = extract(folder / "tuned.safetensors", both, rank=4)
    assert found.adapter.factors.keys() == adapter.factors.keys() and not found.outside
    assert find_adapter(folder / "tuned.safetensors", adapter, both).strength == pytest.approx(
        1, abs=0.01
    )


def test_what_lies_outside_is_weighed(models, tmp_path):
    folder, _ = models
    tensors = ldm_tensors()
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_out.0.weight"
    tensors[key] = tensors[key] + np.float32(1 / 32)  # rank 1, norm 1
    tensors[NORM] = tensors[NORM].copy()
    tensors[NORM][0] += 3
    found = extract(write(tmp_path / "a.safetensors", tensors), folder / "diffusers", rank=1)
    assert found.norms == {TO_OUT: pytest.approx(1)}
    assert found.outside == {"down_blocks.0.attentions.0.norm.weight": pytest.approx(3)}
    assert found.inside_share == pytest.approx(0.1)
    assert found.kept_share == pytest.approx(0.1)


@pytest.mark.parametrize("prefix", ["", "unet."])
def test_partial_weights_as_esd_publishes_them(models, prefix, tmp_path):
    folder, adapter = models
    unet = states()["unet"]
    partial = {
        f"{prefix}{name}.weight": unet[f"{name}.weight"] + adapter.factors[name].delta()
        for name in (TO_K, TO_OUT)
    }
    path = write(tmp_path / "esd.safetensors", partial)
    found = extract(path, folder / "base.safetensors", rank=4)
    assert found.adapter.factors.keys() == {TO_K, TO_OUT}
    assert found.kept_share > 0.9999


def test_legacy_weights(models, tmp_path):
    folder, adapter = models
    unet = states()["unet"]
    weight = unet[f"{TO_K}.weight"] + adapter.factors[TO_K].delta()
    torch.save({f"{TO_K}.weight": torch.from_numpy(weight)}, tmp_path / "esd.pt")
    found = extract(tmp_path / "esd.pt", folder / "base.safetensors", rank=4)
    np.testing.assert_allclose(
        found.adapter.factors[TO_K].delta(), adapter.factors[TO_K].delta(), atol=2e-6
    )


def test_what_is_no_pair(models, tmp_path):
    folder, _ = models
    base = folder / "base.safetensors"
    other = write(
        tmp_path / "other.safetensors", {f"{TO_K}.weight": np.ones((320, 768), np.float32)}
    )
    with pytest.raises(BadInput, match=r"shape \(320, 768\) in the tuned model, \(32, 128\)"):
        extract(other, base, rank=1)
    with pytest.raises(BadInput, match="different models"):
        extract(base, other, rank=1)
    bias = write(tmp_path / "bias.safetensors", {"conv_in.bias": np.ones(3, np.float32)})
    with pytest.raises(BadInput, match=r"has no .*, nor any other"):
        extract(base, bias, rank=1)
    vae = write(
        tmp_path / "vae.safetensors", {"first_stage_model.x.weight": np.ones(2, np.float32)}
    )
    with pytest.raises(BadInput, match="no weights of a Stable Diffusion 1"):
        extract(vae, base, rank=1)
    with pytest.raises(BadInput, match="either a rank or an energy"):
        extract(base, base)


def test_randomised_svd_comes_close_to_the_best():
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.standard_normal((300, 200)))
    right, _ = np.linalg.qr(rng.standard_normal((250, 200)))
    values = 1 / np.arange(1, 201)  # falls slowly: the hard case
    change = ((left * values) @ right.T).astype(np.float32)
    factors, kept = low_rank(change, 8, None)
    best = (values[:8] ** 2).sum() / (values**2).sum()
    assert kept == pytest.approx(best, rel=1e-3)
    error = np.linalg.norm(change - factors.delta()) ** 2 / (values**2).sum()
    assert error == pytest.approx(1 - best, rel=0.02)
    again, _ = low_rank(change, 8, None)
    assert np.array_equal(again.up, factors.up)
    for energy in (0.5, 0.9, 0.99):
        smallest = int(np.searchsorted(np.cumsum(values**2), energy * (values**2).sum())) + 1
        factors, kept = low_rank(change, None, energy)
        assert kept >= energy * 0.9999
        assert smallest <= factors.rank <= 1.1 * smallest + 1


def test_names_of_every_layout_meet():
    expected = "down_blocks.0.attentions.0.norm.weight"
    for key in (
        NORM,
        NORM.removeprefix("model."),
        "input_blocks.1.1.norm.weight",
        expected,
        f"unet.{expected}",
    ):
        assert canonical_parameter(key) == expected
    text = "text_encoder.text_model.final_layer_norm.bias"
    for key in (
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
        "cond_stage_model.transformer.final_layer_norm.bias",
        text,
    ):
        assert canonical_parameter(key) == text
    assert canonical_parameter("text_model.final_layer_norm.bias", of_text_encoder=True) == text
    for key in ("first_stage_model.x", "model_ema.decay", "alphas_cumprod", "input_blocks.99.0.x"):
        assert canonical_parameter(key) is None


TEXT = "cond_stage_model.transformer.text_model."


def added_token(tensors):
    table = tensors[f"{TEXT}embeddings.token_embedding.weight"]
    tensors[f"{TEXT}embeddings.token_embedding.weight"] = np.vstack([table, table[:1]])


def inpainting(tensors):
    key = "model.diffusion_model.input_blocks.0.0.weight"
    tensors[key] = np.tile(tensors[key], (1, 3, 1, 1))[:, :9]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda t: t.update({f"{TEXT}embeddings.position_ids": np.zeros((1, 77), np.float32)}),
            "position_ids",
        ),
        (
            lambda t: t.update(
                {"cond_stage_model.transformer.text_projection.weight": np.eye(128, dtype="f4")}
            ),
            "text_projection",
        ),
        (added_token, "token_embedding"),
        (inpainting, "conv_in"),
    ],
)
def test_parameters_that_the_base_lacks_are_listed_and_the_rest_compared(
    models, tmp_path, change, named
):
    folder, adapter = models
    tensors, _ = read_tensors(folder / "tuned.safetensors")
    change(tensors)
    tuned = write(tmp_path / "tuned.safetensors", tensors)
    found = extract(tuned, folder / "base.safetensors", rank=4)
    (only,) = found.not_compared
    assert named in only and found.adapter.factors.keys() == adapter.factors.keys()
