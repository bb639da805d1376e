"""A portable adapter in a model: baked, converted and baked, and at runtime, it is the same."""

import numpy as np
import pytest
import torch
from support import checkpoint_models as models
from support.portable import change, portable

from sdd_lora import load_pipeline, sd1
from sdd_lora.adapter.adapter import Adapter
from sdd_lora.checkpoint.bake import bake
from sdd_lora.checkpoint.detect import find_adapter
from sdd_lora.checkpoint.layout import open_checkpoint
from sdd_lora.checkpoint.portable import adapter_on
from sdd_lora.errors import BadInput
from sdd_lora.sd.model import text_fingerprint

#: rounding of one bake, relative to the largest weight
STEP = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 8e-3}


def weights(path):
    """The matrices that read embeddings, in every weight set, fp32."""
    checkpoint = open_checkpoint(path)
    return {
        (each.label, name): checkpoint.read(each.locations[name]).astype(np.float32)
        for each in checkpoint.sets_of("unet")
        for name in sd1.READ_EMBEDDINGS
    }


def require_own_weights(before, after, adapter, dtype):
    assert before.keys() == after.keys()
    for key, weight in before.items():
        exact = weight + weight @ change(adapter)
        assert np.abs(exact - weight).max() > 20 * STEP[dtype] * np.abs(weight).max()
        assert np.abs(after[key] - exact).max() <= STEP[dtype] * np.abs(exact).max()


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_a_bake_forms_each_delta_from_the_target_s_own_weight_ema_copies_too(tmp_path, dtype):
    tensors = models.cast(models.ldm_tensors(ema=True), dtype)
    model, adapter = models.write(tmp_path / "m.safetensors", tensors), portable()
    bake(model, [(adapter, 1.0)], tmp_path / "out.safetensors")
    before, after = weights(model), weights(tmp_path / "out.safetensors")
    assert len(before) == 64  # weights, and an EMA copy with weights of its own
    require_own_weights(before, after, adapter, dtype)


def test_folder_and_inpainting_file_take_it(tmp_path):
    folder, adapter = models.write_folder(tmp_path / "folder"), portable()
    bake(folder, [(adapter, 1.0)], tmp_path / "out")
    require_own_weights(weights(folder), weights(tmp_path / "out"), adapter, "fp32")
    tensors = models.ldm_tensors()
    key = "model.diffusion_model.input_blocks.0.0.weight"
    tensors[key] = np.concatenate([tensors[key], tensors[key], tensors[key][:, :1]], axis=1)
    inpainting = models.write(tmp_path / "inpainting.safetensors", tensors)
    bake(inpainting, [(adapter, 1.0)], tmp_path / "baked.safetensors")
    require_own_weights(
        weights(inpainting), weights(tmp_path / "baked.safetensors"), adapter, "fp32"
    )


def test_converted_and_baked_it_is_the_same_to_rounding(tmp_path):
    model = models.write(tmp_path / "m.safetensors", models.ldm_tensors())
    adapter = portable()
    bake(model, [(adapter, 1.0)], tmp_path / "a.safetensors")
    bake(model, [(adapter_on(adapter, model), 1.0)], tmp_path / "b.safetensors")
    one, other = weights(tmp_path / "a.safetensors"), weights(tmp_path / "b.safetensors")
    for key, weight in one.items():
        np.testing.assert_allclose(other[key], weight, atol=1e-6)


def test_at_runtime_it_is_the_same_as_on_the_prompts_embeddings_and_as_baked(tmp_path):
    folder, adapter = models.write_folder(tmp_path / "folder"), portable(size=0.05)
    bake(folder, [(adapter, 0.7)], tmp_path / "baked")
    plain, live, baked = (
        load_pipeline(str(folder)),
        load_pipeline(str(folder), [(adapter, 0.7)]),
        load_pipeline(str(tmp_path / "baked")),
    )
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((1, 4, 8, 8), generator=generator)
    embeddings = torch.randn((1, 77, 128), generator=generator)
    moved = embeddings + 0.7 * embeddings @ torch.from_numpy(change(adapter)).T

    def estimate(pipeline, context):
        with torch.no_grad():
            return pipeline.unet(latents, 500, encoder_hidden_states=context).sample

    expected = estimate(plain, moved)
    step = (expected - estimate(plain, embeddings)).abs().max()
    assert step > 1e-3 * expected.abs().max()
    for pipeline in (live, baked):
        assert (estimate(pipeline, embeddings) - expected).abs().max() < 1e-3 * step


def test_it_is_found_in_the_model_that_it_was_baked_into(tmp_path):
    model = models.write(tmp_path / "m.safetensors", models.ldm_tensors())
    adapter = portable()
    bake(model, [(adapter, 1.0)], tmp_path / "out.safetensors")
    found = find_adapter(tmp_path / "out.safetensors", adapter, model)
    assert found.recorded and found.strength == pytest.approx(1.0, abs=1e-3)
    assert find_adapter(model, adapter, model).strength == 0


def test_another_width_and_an_ordinary_adapter_are_refused(tmp_path):
    model = models.write(tmp_path / "m.safetensors", models.ldm_tensors())
    with pytest.raises(BadInput, match="does not fit"):
        adapter_on(portable(width=768), model)
    with pytest.raises(BadInput, match="does not fit"):
        load_pipeline("demo", [(portable(width=768), 1.0)])
    with pytest.raises(BadInput, match="land"):
        bake(model, [(portable(width=768), 1.0)], tmp_path / "out.safetensors")
    with pytest.raises(BadInput, match="portable"):
        adapter_on(models.adapter(), model)


def test_another_text_encoder_is_told_of(tmp_path, caplog):
    folder = models.write_folder(tmp_path / "folder")
    own = text_fingerprint(load_pipeline(str(folder)).text_encoder)
    for digest, told in ((own, False), ("0" * 16, True)):
        caplog.clear()
        made = {"words": {"text_encoder": digest}}
        adapter = Adapter(portable().factors, {"name": "p"} | made)
        load_pipeline(str(folder), [(adapter, 1.0)])
        assert ("another text encoder" in caplog.text) == told
    caplog.clear()
    load_pipeline(str(folder), [(adapter_on(adapter, folder), 1.0)])
    # converted, it can't be made anew from its words
    assert "another text encoder" not in caplog.text


def test_drawn_in_bf16_its_own_text_encoder_is_not_called_another(tmp_path, caplog):
    folder = models.write_folder(tmp_path / "folder")
    own = text_fingerprint(load_pipeline(str(folder)).text_encoder)
    adapter = Adapter(portable().factors, {"name": "p", "words": {"text_encoder": own}})
    load_pipeline(str(folder), [(adapter, 1.0)], dtype=torch.bfloat16)
    assert "another text encoder" not in caplog.text
