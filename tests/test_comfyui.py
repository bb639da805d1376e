"""The nodes for ComfyUI, on a stand-in of what they touch of it."""

import ast
from pathlib import Path

import pytest
import torch
from support.adapter_making import random_adapter
from support.comfyui_stand_in import KEYS, Clip, ModelPatcher, Unet, install
from support.portable import portable

from sdd_lora import comfyui
from sdd_lora.adapter.adapter import Adapter
from sdd_lora.comfyui import BakeSafetyAdapter, LoadSafetyAdapter

ORDINARY, ERASER = "ordinary.safetensors", "eraser.safetensors"


@pytest.fixture
def model(tmp_path, monkeypatch):
    random_adapter(rank=3, alpha=6.0, size=0.5).save(tmp_path / ORDINARY, dtype="fp32")
    eraser = portable(rank=3)
    Adapter(eraser.factors, {"name": "eraser", "concepts": ["bomb", "axe"]}).save(
        tmp_path / ERASER, dtype="fp32"
    )
    install(monkeypatch, tmp_path)
    return ModelPatcher(Unet())


def prompts(count=1, seed=0):
    return torch.randn(count, 77, 128, generator=torch.Generator().manual_seed(seed))


def deltas_of(model, path):
    """ΔW by ComfyUI's keys, as this package knows them."""
    state = model.weights()
    adapter = Adapter.load(path).on(lambda name: state[KEYS[name]].numpy())
    return {KEYS[name]: adapter.delta(name).float() for name in adapter.factors}


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("file", [ORDINARY, ERASER])
def test_baking_adds_the_delta_to_the_weights_and_leaves_the_model(tmp_path, model, file):
    before = {key: weight.clone() for key, weight in model.weights().items()}
    deltas = deltas_of(model, tmp_path / file)
    baked, clip = BakeSafetyAdapter().bake(model, file, 0.5)
    assert clip is None and len(deltas) == 32
    assert max(float(delta.abs().max()) for delta in deltas.values()) > 0.1
    for key, weight in baked.weights().items():
        close(weight, before[key] + 0.5 * deltas[key])
        assert torch.equal(model.weights()[key], before[key])


def test_an_eraser_is_baked_onto_the_weights_that_other_loras_left(tmp_path, model):
    styled, _ = BakeSafetyAdapter().bake(model, ORDINARY, 1.0)
    deltas = deltas_of(styled, tmp_path / ERASER)
    baked, _ = BakeSafetyAdapter().bake(styled, ERASER, 1.0)
    for key, weight in baked.weights().items():
        close(weight, styled.weights()[key] + deltas[key])


def test_a_loaded_eraser_acts_as_the_baked_one_without_touching_weights(model):
    loaded, _ = LoadSafetyAdapter().load(model, ERASER, 0.5, "off")
    baked, _ = BakeSafetyAdapter().bake(model, ERASER, 0.5)
    given = prompts(2)
    close(loaded.sample(given), baked.sample(given))
    assert not torch.allclose(loaded.sample(given), model.sample(given), atol=0.01)
    assert loaded.patches == {}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())


def test_an_ordinary_adapter_is_loaded_as_any_lora(model):
    loaded, _ = LoadSafetyAdapter().load(model, ORDINARY, 0.7, "off")
    assert loaded.patches.keys() == set(KEYS.values())
    assert "model_function_wrapper" not in loaded.model_options


@pytest.mark.parametrize("file", [ORDINARY, ERASER])
def test_a_gated_adapter_changes_a_prompt_as_far_as_it_is_near_a_concept(model, file):
    bomb, other = prompts(2).split(1)
    other -= (other * bomb).sum() / (bomb * bomb).sum() * bomb  # not a bit of it
    half = bomb / bomb.norm() + other / other.norm()
    loaded, _ = LoadSafetyAdapter().load(model, file, 0.8, "by prompt", Clip(bomb=bomb), "bomb")
    whole, _ = BakeSafetyAdapter().bake(model, file, 0.8)
    batch = torch.cat([bomb, other, half])
    plain, full, found = model.sample(batch), whole.sample(batch), loaded.sample(batch)
    close(found[:1], full[:1])
    close(found[1:2], plain[1:2])
    close(found[2:] - plain[2:], 0.5**0.5 * (full - plain)[2:])


def test_the_files_own_concepts_open_the_gate_and_long_prompts_by_their_nearest_part(model):
    bomb, axe, other = prompts(3).split(1)
    clip = Clip(bomb=bomb, axe=axe)
    loaded, _ = LoadSafetyAdapter().load(model, ERASER, 1.0, "by prompt", clip)
    whole, _ = BakeSafetyAdapter().bake(model, ERASER, 1.0)
    long = torch.cat([other, axe], 1)
    close(loaded.sample(long), whole.sample(long))


def test_a_wrapper_that_the_model_has_stays(model):
    def inner(apply_model, arguments):
        calls.append(arguments["cond_or_uncond"])
        return 2 * apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    calls = []
    wrapped = model.clone()
    wrapped.set_model_unet_function_wrapper(inner)
    loaded, _ = LoadSafetyAdapter().load(wrapped, ERASER, 1.0, "off")
    baked, _ = BakeSafetyAdapter().bake(model, ERASER, 1.0)
    given = prompts()
    close(loaded.sample(given), 2 * baked.sample(given))
    assert calls == [[0]]
    assert wrapped.model_options["model_function_wrapper"] is inner


def test_hooks_are_gone_after_an_error_too(model):
    loaded, _ = LoadSafetyAdapter().load(model, ERASER, 1.0, "off")
    with pytest.raises(RuntimeError):
        loaded.sample(torch.zeros(1, 77, 5))
    assert not any(module._forward_pre_hooks for module in model.model.modules())


def test_files_that_do_not_fit_are_refused_not_passed_by(tmp_path, model):
    load = LoadSafetyAdapter().load
    random_adapter().save(tmp_path / "peft.safetensors", format="peft")
    with pytest.raises(ValueError, match=r"the model has no unet\..* convert --to kohya"):
        load(model, "peft.safetensors", 1.0, "off")
    text = ("text_encoder.text_model.encoder.layers.0.mlp.fc1",)
    random_adapter(modules=text).save(tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match=r"no lora_te_.*connect CLIP"):
        load(model, "text.safetensors", 1.0, "off")
    with pytest.raises(ValueError, match="only layers of the UNet"):
        load(model, "text.safetensors", 1.0, "by prompt", Clip(x=prompts()), "x")
    portable(width=64).save(tmp_path / "narrow.safetensors")
    for node in (
        lambda: load(model, "narrow.safetensors", 1.0, "off"),
        lambda: BakeSafetyAdapter().bake(model, "narrow.safetensors", 1.0),
    ):
        with pytest.raises(ValueError, match="embeddings of width 64, the model reads 128"):
            node()
    with pytest.raises(ValueError, match=r"gone.safetensors: no such file"):
        load(model, "gone.safetensors", 1.0, "off")
    (tmp_path / "old.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected a .safetensors file"):
        load(model, "old.pt", 1.0, "off")


def test_an_eraser_on_another_family_is_refused_not_passed_by(model):
    other = ModelPatcher(torch.nn.Linear(2, 2))
    for node in (LoadSafetyAdapter().load, BakeSafetyAdapter().bake):
        with pytest.raises(ValueError, match=r"no attn2.to_k that reads prompts"):
            node(other, ERASER, 1.0, **({"gate": "off"} if "Load" in node.__qualname__ else {}))


def test_a_gate_says_what_it_lacks(model):
    with pytest.raises(ValueError, match="connect CLIP"):
        LoadSafetyAdapter().load(model, ERASER, 1.0, "by prompt")
    with pytest.raises(ValueError, match="names no concept"):
        LoadSafetyAdapter().load(model, ORDINARY, 1.0, "by prompt", Clip())


def test_comfyui_finds_the_nodes(model):
    for name, node in comfyui.NODE_CLASS_MAPPINGS.items():
        inputs = node.INPUT_TYPES()
        assert inputs["required"]["adapter"] == ([ERASER, ORDINARY],)
        given = [*inputs["required"], *inputs["optional"]]
        code = getattr(node, node.FUNCTION).__code__
        assert set(given) == set(code.co_varnames[1 : code.co_argcount])
        assert node.RETURN_TYPES == ("MODEL", "CLIP")
        assert comfyui.NODE_DISPLAY_NAME_MAPPINGS[name].endswith("safety adapter")


def test_the_file_stands_alone():
    tree = ast.parse(Path(comfyui.__file__).read_text("utf-8"))
    at_import, all_of_it = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            roots = {name.partition(".")[0] for name in names}
            all_of_it |= roots
            at_import |= roots if node in tree.body else set()
    assert "sdd_lora" not in all_of_it
    assert not {"comfy", "folder_paths"} & at_import


def test_the_module_copies_itself(tmp_path, capsys):
    assert comfyui.main([str(tmp_path)]) == 0
    copy = tmp_path / comfyui.FILE_NAME
    assert copy.read_bytes() == Path(comfyui.__file__).read_bytes()
    assert str(copy) in capsys.readouterr().out
    assert comfyui.main([str(tmp_path)]) == 2
    assert "add --force" in capsys.readouterr().err
    assert comfyui.main([str(tmp_path), "--force"]) == 0
    assert comfyui.main([str(tmp_path / "gone")]) == 2
    capsys.readouterr()
    assert comfyui.main([]) == 0
    assert capsys.readouterr().out == Path(comfyui.__file__).read_text("utf-8")
