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
from sdd_lora.sd1 import (
    SD15,
    comfyui_stem,
    kohya_stem,
    lycoris_stem,
    peft_folder_stem,
    peft_stem,
)

PROJ_IN = f"{PLACE}.proj_in"
TEXT = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
UIS = {"A1111", "ComfyUI", "InvokeAI", "sd-scripts"}
#: Two modules of one rank whose alphas differ, so that diffusers' one alpha for all is wrong.
UNEQUAL = random_adapter(1, 4, (TO_K,), 1.0).factors | random_adapter(2, 4, (TO_OUT,), 8.0).factors


def real(modules=None, rank=4):
    """An adapter of Stable Diffusion 1.5's sizes."""
    return random_adapter(modules=modules, rank=rank, widths=SD15)


def who_loads(path) -> set[str]:
    found = verdicts(describe_adapter(path))
    assert all(verdict.why for verdict in found)
    return {verdict.loader for verdict in found if verdict.loads}


@pytest.mark.parametrize(
    ("format", "loaders"),
    [
        ("kohya", UIS | {"diffusers"}),
        ("ldm", {"A1111", "ComfyUI"}),
        ("peft", {"diffusers"}),
        ("attn-procs", {"ComfyUI", "diffusers"}),
    ],
)
def test_the_table_of_forms(format, loaders, tmp_path):
    assert who_loads(real().save(tmp_path / "a.safetensors", format)) == loaders


def bare(adapter: Adapter) -> dict[str, np.ndarray]:
    return {k.removeprefix("unet."): v for k, v in adapter.to_state_dict("peft").items()}


def test_diffusers_pipeline_loads_nothing_of_bare_names(tmp_path, caplog, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_file(bare(random_adapter()), path)
    assert who_loads(path) == set()
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
        tensors |= {
            f"{stem}.lora_down.weight": factors.down,
            f"{stem}.lora_up.weight": factors.up,
            f"{stem}.alpha": np.array(factors.alpha, np.float32),
        }
    save_file(tensors, path, header)
    return path


def scale_in_diffusers(path, tmp_path, module: str) -> float:
    pipe = pipeline()
    pipe.load_lora_weights(str(path), adapter_name="a")
    return pipe.unet.get_submodule(module).scaling["a"]


def test_diffusers_mis_scales_unequal_alphas_until_converted(tmp_path):
    path = unequal_file(tmp_path / "a.safetensors")
    assert who_loads(path) == set()
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
    assert who_loads(tmp_path / "a.safetensors") == set()
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


def test_an_adapter_of_the_embedded_models_size_fits_no_stable_diffusion(tmp_path):
    path = random_adapter().save(tmp_path / "a.safetensors")
    assert who_loads(path) == {"diffusers"}
    wrong = real().factors | {TO_K: random_adapter(modules=(TO_K,)).factors[TO_K]}
    assert not UIS & who_loads(Adapter(wrong).save(tmp_path / "b.safetensors"))


@pytest.mark.parametrize(
    ("modules", "loads"),
    [
        ((TO_K,), True),
        ((TO_OUT,), False),  # the family is told by cross-attention's k and v
        ((TEXT,), True),
        ((TO_K, "up_blocks.2.resnets.0.time_emb_proj"), False),  # taken for SDXL
    ],
)
def test_invokeai_guesses_the_family(modules, loads, tmp_path):
    found = who_loads(real(modules).save(tmp_path / "a.safetensors"))
    assert ("InvokeAI" in found) is loads
    assert {"A1111", "ComfyUI", "diffusers"} <= found


@pytest.mark.parametrize("module", ["conv_in", "conv_out", "time_embedding.linear_1"])
def test_sd_scripts_lacks_modules(module, tmp_path):
    path = real((TO_K, module)).save(tmp_path / "a.safetensors")
    assert who_loads(path) == UIS - {"sd-scripts"} | {"diffusers"}
    (verdict,) = (v for v in verdicts(describe_adapter(path)) if v.loader == "sd-scripts")
    assert "1 of 2" in verdict.why


def test_comfyui_loads_processors_alone_of_old_diffusers_keys(tmp_path):
    tensors = real((TO_K,)).to_state_dict("attn-procs")
    save_file(tensors, tmp_path / "a.safetensors")
    assert "ComfyUI" in who_loads(tmp_path / "a.safetensors")
    renamed = {k.replace(".processor.to_k_lora.", ".to_k.lora."): t for k, t in tensors.items()}
    save_file(renamed, tmp_path / "b.safetensors")
    assert "ComfyUI" not in who_loads(tmp_path / "b.safetensors")
    assert Adapter.load(tmp_path / "b.safetensors").factors.keys() == {TO_K}


def test_alphas_of_the_header_are_unread_by_user_interfaces(tmp_path):
    tensors = real((TO_K,)).to_state_dict("attn-procs")
    for alpha, loads in ((4, True), (8, False)):
        header = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": alpha})}
        save_file(tensors, tmp_path / "a.safetensors", header)
        assert ("ComfyUI" in who_loads(tmp_path / "a.safetensors")) is loads


def test_diffusers_doesnt_read_pefts_configuration(tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    save_file(real((TO_K,)).to_state_dict("peft"), path)
    assert who_loads(path) == {"diffusers"}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    assert who_loads(path) == set()


def test_peft_means_a_folder_with_its_configuration(tmp_path):
    folder = real((TO_K,)).save(tmp_path / "folder", "peft")
    assert who_loads(folder / "adapter_model.safetensors") == {"peft"}
    (folder / "adapter_config.json").unlink()
    assert who_loads(folder / "adapter_model.safetensors") == set()


@pytest.mark.parametrize(
    ("stem", "down", "up", "loaders"),
    [
        (comfyui_stem, "lora_down", "lora_up", {"ComfyUI"}),
        (lycoris_stem, "lora_down", "lora_up", set()),
        (peft_folder_stem, "lora_A", "lora_B", set()),
    ],
)
def test_dialects_that_diffusers_loads_nothing_of(stem, down, up, loaders, tmp_path):
    path = tmp_path / "a.safetensors"
    for widths in (SD15, None):
        found = real((TO_K,)) if widths else random_adapter(modules=(TO_K,))
        part = found.factors[TO_K]
        save_file(
            {f"{stem(TO_K)}.{down}.weight": part.down, f"{stem(TO_K)}.{up}.weight": part.up}, path
        )
        assert who_loads(path) == (loaders if widths else set())
    pipe = pipeline()
    pipe.load_lora_weights(str(path))
    assert pipe.unet.state_dict().keys() == parts()["unet"].state_dict().keys()


CONV, FF = "mid_block.resnets.0.conv1", f"{PLACE}.transformer_blocks.0.ff.net.2"
TO_Q = TO_K.replace("to_k", "to_q")


@pytest.mark.parametrize(
    ("alphas", "right"),
    [
        ({TO_K: 1, TO_OUT: 1, TO_Q: 1, CONV: 2, FF: 3}, True),  # LoCon: attention has the most
        ({TO_K: 1, CONV: 2, FF: 2}, False),
        ({TO_K: 1, TO_OUT: 2, CONV: 1}, False),
        ({TO_K: 2, TO_OUT: 2, FF: None}, False),  # without an alpha, meant to be the rank
    ],
)
def test_diffusers_mis_scales_attention_whose_alpha_is_not_the_most_frequent(
    alphas, right, tmp_path
):
    tensors = {}
    for name, alpha in alphas.items():
        tensors |= random_adapter(modules=(name,)).to_state_dict("kohya")
        tensors.pop(f"{kohya_stem(name)}.alpha")
        if alpha is not None:
            tensors[f"{kohya_stem(name)}.alpha"] = np.array(alpha, np.float32)
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    assert ("diffusers" in who_loads(path)) is right
    pipe = pipeline()
    pipe.load_lora_weights(str(path), adapter_name="a")
    found = {name: pipe.unet.get_submodule(name).scaling["a"] for name in alphas}
    expected = {name: (alpha or 4) / 4 for name, alpha in alphas.items()}
    assert (found == expected) is right


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
    torch_like = {
        f"{stem}.lora_A.weight": np.ones((4, 128), np.float16),
        f"{stem}.lora_B.weight": np.ones((32, 4), np.float16),
        f"{stem}.alpha": np.array(2, np.float16),
    }
    save_file(torch_like, tmp_path / "a.safetensors")
    assert describe_adapter(tmp_path / "a.safetensors").scales == {TO_K: 0.5}
    assert torch.equal(
        Adapter.load(tmp_path / "a.safetensors").delta(TO_K), torch.full((32, 128), 2.0)
    )
