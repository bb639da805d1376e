"""Baked models through diffusers' own loaders: the picture of the adapter at runtime."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from support import checkpoint_models as models

from sdd_lora.checkpoint.bake import bake

#: How far a baked picture's latents may be from those of the adapter at runtime, relative.
TOLERANCE = {"fp32": 1e-4, "fp16": 0.01, "bf16": 0.08}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.write_folder(tmp_path_factory.mktemp("parity") / "folder")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Large enough to change the picture of a random model; and the file diffusers loads."""
    made = models.adapter(size=0.3, leaves=("to_q", "to_k", "to_v", "to_out.0"))
    return made, made.save(tmp_path_factory.mktemp("a") / "a.safetensors", dtype="fp32")


def load(path, folder, **how):
    if path.is_dir():
        pipe = StableDiffusionPipeline.from_pretrained(
            path, safety_checker=None, dtype=torch.float32, local_files_only=True, **how
        )
    else:
        pipe = StableDiffusionPipeline.from_single_file(
            str(path),
            config=str(folder),
            local_files_only=True,
            dtype=torch.float32,
            safety_checker=None,
            **how,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def latents(pipe):
    return pipe(
        "!A B",
        num_inference_steps=2,
        guidance_scale=3.0,
        output_type="latent",
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(0),
    ).images.numpy()


def require_parity(source, baked, folder, adapter, dtype, **how):
    pipe = load(source, folder, **how)
    base = latents(pipe)
    pipe.load_lora_weights(adapter[1].parent, weight_name=adapter[1].name)
    runtime = latents(pipe)
    pipe.unload_lora_weights()
    found = latents(load(baked, folder, **how))
    scale = np.abs(runtime - base).max()
    assert scale > 0.05 * np.abs(base).max()  # the adapter does change the picture
    assert np.abs(found - runtime).max() < TOLERANCE[dtype] * scale


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_single_files(tmp_path, folder, adapter, dtype):
    tensors = models.cast(models.ldm_tensors(ema=True), dtype)
    source = models.write(tmp_path / "m.safetensors", tensors)
    bake(source, [(adapter[0], 1.0)], out=tmp_path / "o.safetensors")
    require_parity(source, tmp_path / "o.safetensors", folder, adapter, dtype)


def test_extract_ema_does_not_bring_the_concept_back(tmp_path, folder, adapter):
    source = models.write(tmp_path / "m.safetensors", models.ldm_tensors(ema=True))
    bake(source, [(adapter[0], 1.0)], out=tmp_path / "o.safetensors")
    baked = tmp_path / "o.safetensors"
    require_parity(source, baked, folder, adapter, "fp32", extract_ema=True)


def test_legacy_checkpoints(tmp_path, folder, adapter):
    tensors = models.ldm_tensors()
    source = models.write(tmp_path / "m.safetensors", tensors)
    content = {key: torch.from_numpy(value.copy()) for key, value in tensors.items()}
    torch.save({"state_dict": content}, tmp_path / "m.ckpt")
    bake(tmp_path / "m.ckpt", [(adapter[0], 1.0)], out=tmp_path / "o.safetensors")
    require_parity(source, tmp_path / "o.safetensors", folder, adapter, "fp32")


@pytest.mark.parametrize("how", [{}, {"variant": "fp16"}, {"shard": "2MB"}])
def test_folders(tmp_path, folder, adapter, how):
    source = models.write_folder(tmp_path / "m", **how)
    bake(source, [(adapter[0], 1.0)], out=tmp_path / "o")
    loading = {"variant": "fp16"} if "variant" in how else {}
    dtype = "fp16" if loading else "fp32"
    require_parity(source, tmp_path / "o", folder, adapter, dtype, **loading)


def test_inpainting_unets_load_and_differ_by_the_delta_alone(tmp_path, folder, adapter):
    from diffusers import UNet2DConditionModel

    inpainting = UNet2DConditionModel.from_config(models.parts()["unet"].config, in_channels=9)
    inpainting.save_pretrained(tmp_path / "m")
    bake(tmp_path / "m", [(adapter[0], 1.0)], out=tmp_path / "o")
    before = UNet2DConditionModel.from_pretrained(tmp_path / "m").state_dict()
    after = UNet2DConditionModel.from_pretrained(tmp_path / "o").state_dict()
    for key, tensor in before.items():
        part = adapter[0].factors.get(key.removesuffix(".weight"))
        if part is None:
            assert torch.equal(after[key], tensor)
        else:
            expected = tensor + torch.from_numpy(part.delta())
            assert torch.allclose(after[key], expected, atol=1e-6)
