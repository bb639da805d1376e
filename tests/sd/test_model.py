"""MODELs as people have them: half-precision folders, legacy files, what is none of ours."""

import json
import shutil
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdd_lora.checkpoint.locate import COMMUNITY_FILE, DEMO_FOLDER
from sdd_lora.errors import BadInput
from sdd_lora.sd.model import fingerprint, load_base_pipeline, load_training_parts, unet_config


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(DEMO_FOLDER, tmp_path / "model")


def test_a_folder_that_holds_fp16_variants_alone_is_loaded(folder):
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    assert load_training_parts(str(folder)).fingerprint == load_training_parts("demo").fingerprint


def test_a_legacy_file_with_a_trainers_objects_is_read_for_its_tensors(tmp_path, monkeypatch):
    class ModelCheckpoint:
        """Lightning's, as far as a pickle knows."""

    module = types.ModuleType("lightning_stand_in")
    module.ModelCheckpoint = ModelCheckpoint
    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = module.__name__, "ModelCheckpoint"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    tensors = load_file(COMMUNITY_FILE)
    ema = {"model_ema.decay": torch.tensor(0.9)}
    path = tmp_path / "light.ckpt"
    torch.save(
        {"epoch": 1, "callbacks": {ModelCheckpoint: {"best": 0.1}}, "state_dict": tensors | ema},
        path,
    )
    monkeypatch.delitem(sys.modules, module.__name__)
    loaded, expected = load_base_pipeline(str(path)), load_base_pipeline("demo-community")
    for part in ("unet", "vae", "text_encoder"):
        found = getattr(loaded, part).state_dict()
        for name, tensor in getattr(expected, part).state_dict().items():
            assert torch.equal(found[name], tensor)
    assert fingerprint(loaded.unet) == fingerprint(expected.unet)


def test_an_inpainting_model_is_bad_input(folder):
    file, config = (
        folder / "unet" / name for name in ("diffusion_pytorch_model.safetensors", "config.json")
    )
    tensors = load_file(file)
    weight = tensors["conv_in.weight"]
    tensors["conv_in.weight"] = torch.cat([weight, weight[:, :1].repeat(1, 5, 1, 1)], dim=1)
    save_file(tensors, file)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 9}))
    for load in (load_training_parts, load_base_pipeline, unet_config):
        with pytest.raises(BadInput, match="takes 4 channels, found an inpainting model with 9"):
            load(str(folder))


@pytest.mark.parametrize("missing", ["tokenizer", "tokenizer/merges.txt"])
def test_a_folder_without_tokenizer_is_bad_input(folder, missing):
    (folder / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(BadInput, match=r"expected tokenizer/ with tokenizer\.json, or vocab"):
        load_training_parts(str(folder))
