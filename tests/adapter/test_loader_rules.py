"""What `verify` says of loaders; where the loader is at hand, it is asked too."""

import json
import logging

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from support.adapter_making import KINDS, PLACE, TO_K, TO_OUT, random_adapter
from support.checkpoint_models import parts, pipeline

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.inspect import describe_adapter
from sdd_lora.adapter.loaders import verdicts
from sdd_lora.sd1 import kohya_stem, peft_stem

PROJ_IN = f"{PLACE}.proj_in"
TEXT = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
#: Two modules of one rank whose alphas differ, so that diffusers' one alpha for all is wrong.
UNEQUAL = random_adapter(1, 4, (TO_K,), 1.0).factors | random_adapter(2, 4, (TO_OUT,), 8.0).factors


def who_loads(path) -> set[str]:
    found = verdicts(describe_adapter(path))
    assert all(verdict.why for verdict in found)
    return {verdict.loader for verdict in found if verdict.loads}


@pytest.mark.parametrize(
    ("format", "loaders"),
    [
        ("kohya", {"A1111", "ComfyUI", "InvokeAI", "diffusers"}),
        ("ldm", {"A1111", "ComfyUI"}),
        ("peft", {"diffusers", "peft"}),
        ("attn-procs", {"ComfyUI", "diffusers"}),
    ],
)
def test_the_table_of_forms(format, loaders, tmp_path):
    assert who_loads(random_adapter().save(tmp_path / "a.safetensors", format)) == loaders


def bare(adapter: Adapter) -> dict[str, np.ndarray]:
    return {k.removeprefix("unet."): v for k, v in adapter.to_state_dict("peft").items()}


def test_diffusers_pipeline_loads_nothing_of_bare_names(tmp_path, caplog, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_file(bare(random_adapter()), path)
    assert who_loads(path) == {"peft"}
    pipe = pipeline()
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        pipe.load_lora_weights(str(path))
    assert "No LoRA keys associated" in caplog.text
    assert pipe.unet.state_dict().keys() == parts()["unet"].state_dict().keys()


def unequal_file(path, header=None):
    """A kohya file as trainers write it, each module with its own alpha."""
    tensors = {}
    for name, factors in UNEQUAL.items():
        stem = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{stem}.lora_down.weight": factors.down, f"{stem}.lora_up.weight": factors.up,
                    f"{stem}.alpha": np.array(factors.alpha, np.float32)}  # fmt: skip
    save_file(tensors, path, header)
    return path


def scale_in_diffusers(path, tmp_path, module: str) -> float:
    pipe = pipeline()
    pipe.load_lora_weights(str(path), adapter_name="a")
    return pipe.unet.get_submodule(module).scaling["a"]


def test_diffusers_mis_scales_unequal_alphas_until_converted(tmp_path):
    path = unequal_file(tmp_path / "a.safetensors")
    assert who_loads(path) == {"A1111", "ComfyUI", "InvokeAI"}
    scales = {scale_in_diffusers(path, tmp_path, name) for name in UNEQUAL}
    assert scales != {0.25, 2.0}, "diffusers has learnt it: correct the rule"
    converted = Adapter.load(path).save(tmp_path / "b.safetensors")
    assert "diffusers" in who_loads(converted)
    assert {scale_in_diffusers(converted, tmp_path, name) for name in UNEQUAL} == {1.0}


def test_diffusers_refuses_alphas_beside_peft_metadata(tmp_path):
    header = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 4})}
    path = unequal_file(tmp_path / "a.safetensors", header)
    assert "diffusers" not in who_loads(path)
    with pytest.raises(ValueError, match=r"network_alphas.*metadata"):
        pipeline().load_lora_weights(str(path))


def test_diffusers_refuses_alphas_in_the_peft_form(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = random_adapter(modules=(TO_K,)).to_state_dict("peft")
    save_file(tensors | {f"unet.{TO_K}.alpha": np.array(4, np.float32)}, path)
    assert who_loads(path) == set()
    with pytest.raises(ValueError, match="Make sure all LoRA param names"):
        pipeline().load_lora_weights(str(path))


def test_diffusers_pipeline_loads_nothing_of_bare_attn_procs(tmp_path):
    tensors = random_adapter(modules=(TO_K,)).to_state_dict("attn-procs")
    save_file({k.removeprefix("unet."): t for k, t in tensors.items()}, tmp_path / "a.safetensors")
    assert who_loads(tmp_path / "a.safetensors") == {"ComfyUI"}
    pipe = pipeline()
    pipe.load_lora_weights(str(tmp_path / "a.safetensors"))
    assert pipe.unet.state_dict().keys() == parts()["unet"].state_dict().keys()


@pytest.mark.parametrize("format", ["kohya", "peft"])
@pytest.mark.parametrize("module", [TO_K, PROJ_IN])
def test_factors_of_other_dimensions_than_the_weight(format, module, tmp_path):
    """4-D of a matrix, 2-D of a 1×1 convolution: A1111 and ComfyUI reshape, diffusers refuses."""
    path = tmp_path / "a.safetensors"
    right = random_adapter(modules=(TO_K, PROJ_IN))
    there = who_loads(right.save(path, format)) - {"diffusers", "peft"}
    tensors = right.to_state_dict(format)
    stem = (kohya_stem if format == "kohya" else peft_stem)(module)
    for key in (key for key in tensors if key.startswith(stem) and ".lora_" in key):
        t = tensors[key]
        tensors[key] = t[..., None, None].copy() if t.ndim == 2 else t.reshape(t.shape[:2]).copy()
    save_file(tensors, path)
    assert who_loads(path) == there
    with pytest.raises(RuntimeError, match="size mismatch"):
        pipeline().load_lora_weights(str(path))
    converted = Adapter.load(path).save(tmp_path / "b.safetensors")
    assert "diffusers" in who_loads(converted)
    pipeline().load_lora_weights(str(converted))


def test_diffusers_takes_the_text_encoders_alpha_apart(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {}
    for name, alpha in ((TO_K, 1.0), (TO_OUT, 1.0), (TEXT, 2.0)):
        tensors |= random_adapter(modules=(name,)).to_state_dict("kohya")
        tensors[f"{kohya_stem(name)}.alpha"] = np.array(alpha, np.float32)
    save_file(tensors, path)
    assert "diffusers" in who_loads(path)
    pipe = pipeline()
    pipe.load_lora_weights(str(path), adapter_name="a")
    found = {
        module.scaling["a"]
        for part in (pipe.unet, pipe.text_encoder)
        for module in part.modules()
        if hasattr(module, "scaling") and "a" in module.scaling
    }
    assert found == {0.25, 0.5}


def test_invokeai_tells_the_family_by_k_and_v(tmp_path):
    path = random_adapter(modules=(TO_OUT,)).save(tmp_path / "a.safetensors")
    assert "InvokeAI" not in who_loads(path)


def test_mixed_forms_are_no_file_for_diffusers(tmp_path):
    path = tmp_path / "a.safetensors"
    kohya = random_adapter(modules=(TO_K,)).to_state_dict("kohya")
    save_file(kohya | random_adapter(modules=(TO_OUT,)).to_state_dict("peft"), path)
    assert who_loads(path) == set()
    assert len(Adapter.load(path).factors) == 2


def test_description_comes_from_the_header(tmp_path):
    adapter = random_adapter(modules=KINDS, rank=3, alpha=1.5)
    path = adapter.save(tmp_path / "a.safetensors", "ldm", "bf16")
    found = describe_adapter(path)
    assert found.format == "ldm"
    assert found.family == "SD 1.x in structure, of other widths"
    assert found.dtypes == {"BF16": 2 * len(KINDS), "F32": len(KINDS)}
    assert found.parameters == adapter.parameters
    assert found.shapes == {name: part.weight_shape for name, part in adapter.factors.items()}
    assert set(found.ranks.values()) == {3}
    assert set(found.scales.values()) == {1.0}
    assert found.kinds()["attn2.to_k"] == 1
    assert found.kinds()["text mlp.fc1"] == 1
    assert found.metadata["name"] == "random-0"


def test_alpha_without_factors_of_torch_is_read_from_the_file(tmp_path):
    stem = f"unet.{TO_K}"
    torch_like = {f"{stem}.lora_A.weight": np.ones((4, 128), np.float16),
                  f"{stem}.lora_B.weight": np.ones((32, 4), np.float16),
                  f"{stem}.alpha": np.array(2, np.float16)}  # fmt: skip
    save_file(torch_like, tmp_path / "a.safetensors")
    assert describe_adapter(tmp_path / "a.safetensors").scales == {TO_K: 0.5}
    assert torch.equal(
        Adapter.load(tmp_path / "a.safetensors").delta(TO_K), torch.full((32, 128), 2.0)
    )
