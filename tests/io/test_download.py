import pytest
from huggingface_hub import constants
from support.hub_stand_in import hub  # noqa: F401

from sdd_lora.checkpoint.locate import DEMO_FOLDER, locate
from sdd_lora.errors import BadInput
from sdd_lora.io.download import one_copy

COMPONENTS = ["unet/config.json", "tokenizer/merges.txt", "model_index.json"]


def test_of_each_components_weights_one_copy_is_wanted():
    names = [
        *COMPONENTS,
        *("v1-5-pruned.safetensors", "README.md", ".gitattributes"),
        *("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin"),
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        *("text_encoder/pytorch_model.bin", "text_encoder/model.fp16.safetensors"),
        *("vae/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.fp16.bin"),
        *("text_encoder/flax_model.msgpack", "unet/model.onnx", "text_encoder/tf_model.h5"),
    ]
    assert set(one_copy(names)) == {
        *COMPONENTS,
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.fp16.safetensors",
        "vae/diffusion_pytorch_model.bin",
    }


def test_shards_come_with_their_index_and_without_another_copys():
    plain = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    plain.append("unet/diffusion_pytorch_model.safetensors.index.json")
    fp16 = [f"unet/diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    fp16.append("unet/diffusion_pytorch_model.safetensors.index.fp16.json")
    assert set(one_copy([*fp16, *plain])) == set(plain)
    assert set(one_copy(fp16)) == set(fp16)
    whole = "unet/diffusion_pytorch_model.safetensors"
    assert one_copy([whole, *fp16]) == [whole]


def test_a_model_of_the_hub_is_had_once_and_then_without_a_network(hub, monkeypatch):  # noqa: F811
    model = {
        file.relative_to(DEMO_FOLDER).as_posix(): file.read_bytes()
        for file in DEMO_FOLDER.rglob("*")
        if file.is_file()
    }
    weights = "unet/diffusion_pytorch_model"
    copy = {f"{weights}.fp16.safetensors": b"another copy", "whole.safetensors": b"a third"}
    hub.repositories["me/model"] = model | copy
    folder = locate("me/model")
    there = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert there == {name for name in model if "/" in name or name == "model_index.json"}
    assert (folder / f"{weights}.safetensors").read_bytes() == model[f"{weights}.safetensors"]
    hub.repositories.clear()
    with pytest.raises(BadInput, match="no such file or folder"):
        locate("me/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate("me/model") == folder
    with pytest.raises(BadInput, match="not to be had from the hub"):
        locate("me/another")
