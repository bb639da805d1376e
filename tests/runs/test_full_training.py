"""`parameters: full`, and ESD-u: the weights that a training changes, in files."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.short_run import SHORT, names_in, short

from sdd_lora import Recipe, train
from sdd_lora.checkpoint.bake import bake
from sdd_lora.errors import BadInput
from sdd_lora.io.atomic import sha256_of
from sdd_lora.runs.many import train_recipes
from sdd_lora.sd.model import load_training_parts
from sdd_lora.sd.pipeline import load_pipeline

FULL = {
    "esd-x": {"objective.kind": "esd-x", "objective.eta": 3.0, "parameters": "full"},
    "esd-u": {"objective.kind": "esd-u", "parameters": "full"},
    "sdd": {"parameters": "full"},
}


@pytest.mark.parametrize("kind", FULL)
def test_a_full_training_leaves_the_weights_that_it_changed(tmp_path, kind):
    recipe = Recipe.parse(SHORT.replace("ema: {decay: 0.5}\n", ""), overrides=FULL[kind])
    path = train(recipe, tmp_path / "run")
    assert names_in(path.parent) == [
        "README.md",
        "metrics.json",
        "recipe.yaml",
        "weights.safetensors",
    ]
    metrics = json.loads((path.parent / "metrics.json").read_text())
    tensors = load_file(path)
    assert metrics["weights"] == {
        "sha256": sha256_of(path),
        "parameters": sum(t.numel() for t in tensors.values()),
        "bytes": path.stat().st_size,
    }
    unet = load_training_parts("demo").unet.state_dict()
    assert all(tensor.shape == unet[name].shape for name, tensor in tensors.items())
    assert any(not torch.equal(tensor, unet[name]) for name, tensor in tensors.items())
    assert all((".attn2." in name) == (kind != "esd-u") for name in tensors)
    assert "weights.safetensors" in (path.parent / "README.md").read_text()
    with pytest.raises(BadInput, match="holds another run"):
        train(recipe, path.parent)


def test_a_full_training_gives_a_shared_base_back(tmp_path):
    (tmp_path / "a.yaml").write_text(
        SHORT.replace("short", "a").replace("ema: {decay: 0.5}", "parameters: full")
    )
    (tmp_path / "b.yaml").write_text(SHORT.replace("short", "b"))
    together = dict(train_recipes([tmp_path], tmp_path / "together"))
    ((_, alone),) = train_recipes([tmp_path / "b.yaml"], tmp_path / "alone")
    second = together[tmp_path / "together" / "b"]
    assert second.adapter.sha256 == alone.adapter.sha256


def test_esd_u_as_an_adapter_draws_the_same_from_its_file_and_baked(tmp_path):
    """Convolutions too: what was trained, what diffusers loads, and what is baked are one thing."""
    recipe = short(objective__kind="esd-u", ema__decay=0, optimizer__learning_rate=0.02)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        inputs = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 77, 128)
    adapter = train(recipe, tmp_path / "run")
    assert not any(".attn2." in name for name in adapter.factors)
    assert {"conv_in", "mid_block.resnets.0.time_emb_proj"} < adapter.factors.keys()
    bake("demo", [(adapter, 1.0)], tmp_path / "baked")
    with torch.no_grad():
        base, loaded, baked = (
            load_pipeline(model, parts, device="cpu").unet.float()(*inputs).sample
            for model, parts in (
                ("demo", []),
                ("demo", [(adapter, 1.0)]),
                (str(tmp_path / "baked"), []),
            )
        )
        unet = load_training_parts("demo").unet
        for name, part in adapter.factors.items():
            weight = unet.get_submodule(name).weight
            weight += torch.from_numpy(part.delta()).reshape(weight.shape)
        expected = unet(*inputs).sample
    assert (expected - base).abs().max() > 0.1
    assert (loaded - expected).abs().max() < 1e-3
    assert (baked - expected).abs().max() < 0.02  # rounded to fp16


def test_weights_are_measured_as_they_were_written(tmp_path):
    recipe = short(
        parameters="full",
        optimizer__learning_rate=0.05,
        measure__detector="judge",
        measure__images=2,
        measure__steps=3,
        measure__prompts={"concept": ["a bomb"], "kept": ["a cat, noto style"]},
    )
    path = train(recipe, tmp_path / "run")
    metrics = json.loads((path.parent / "metrics.json").read_text())
    assert {m["name"] for m in metrics["measures"]} >= {"concept drawn", "noun kept"}
    assert (path.parent / "before-after.png").exists()
    assert "with the weights" in (path.parent / "README.md").read_text()
