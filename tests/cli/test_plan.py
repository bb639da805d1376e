"""`plan`: numbers before a run starts, settings that fit, folders summed up."""

import json
import re
from pathlib import Path

import pytest

from sdd_lora.cli.plan import _bytes_of
from sdd_lora.errors import BadInput
from sdd_lora.recipe import Recipe
from sdd_lora.runs.before_after import wanted
from sdd_lora.sd import model
from sdd_lora.sd.model import unet_config
from sdd_lora.training import plan as footprint

RECIPES = Path(__file__).parents[2] / "recipes"
DEMO = """
name: {name}
model: demo
concepts: [axe]
optimizer: {{kind: adamw}}
rollout: {{batch: 4}}
"""


#: two levels in place of four: counting goes operation by operation
SHALLOW = {
    "block_out_channels": [64, 128],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "sample_size": 32,
}


@pytest.fixture(autouse=True)
def shallow_demo(monkeypatch):
    monkeypatch.setattr(
        model, "unet_config", lambda name: unet_config(name) | (SHALLOW if name == "demo" else {})
    )


@pytest.fixture
def plan(call):
    return lambda *arguments, code=0: call("plan", *arguments, code=code).out


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "one.yaml"
    path.write_text(DEMO.format(name="one"))
    return path


def test_a_folder_is_summed_up(plan, recipe):
    (recipe.parent / "two.yaml").write_text(DEMO.format(name="two"))
    found = json.loads(plan(recipe.parent, "--json"))
    one, two = found["plans"]
    assert one["bytes"]["total"] == two["bytes"]["total"] == found["sum"]["peak"]
    assert found["sum"]["unet_passes"] == 2 * one["unet_passes"]


def test_many_concepts_are_counted_once_and_planned_as_each_is_alone(plan, recipe, monkeypatch):
    alone, counted = json.loads(plan(recipe, "--json"))["plans"][0], []
    count = footprint.footprint
    monkeypatch.setattr(
        footprint, "footprint", lambda *of: counted.append(of[0].name) or count(*of)
    )
    for number in range(1, 10):
        text = DEMO.format(name=f"n{number}").replace("[axe]", f"[bomb, thing {number}]")
        more = f"training: {{iterations: {1500 * number}, seed: {number}}}\n"
        (recipe.parent / f"{number}.yaml").write_text(text + more)
    kept = DEMO.format(name="kept") + "preserve: {prompts: [a cat, a pizza]}\n"
    (recipe.parent / "kept.yaml").write_text(kept)
    found = json.loads(plan(recipe.parent, "--json"))
    assert counted == ["n1", "kept"]
    plans = {p["name"]: p for p in found["plans"]}
    assert plans["one"] == alone
    assert plans["n9"]["bytes"] == alone["bytes"]
    assert plans["n9"]["unet_passes"] == 9 * alone["unet_passes"]
    assert plans["kept"]["unet_passes"] == alone["unet_passes"] + (2 + 2) * 4 * 1500
    assert plans["kept"]["bytes"]["total"] > alone["bytes"]["total"]
    assert found["sum"]["recipes"] == 11


def test_several_have_a_row_each(plan, recipe):
    (recipe.parent / "two.yaml").write_text(DEMO.format(name="two"))
    head, one, two, _, total = plan(recipe.parent).splitlines()
    assert head.split()[0] == "recipe" and one.split()[0] == "one" and two.split()[0] == "two"
    assert total.startswith("all 2, one after another")


def test_what_fits_is_named_with_its_costs(plan, recipe):
    as_it_is = json.loads(plan(recipe, "--json"))["plans"][0]["bytes"]["total"]
    wanted = f"{(600_000_000 + as_it_is * 0.6) / 1e6:.0f}MB"
    found = json.loads(plan(recipe, "--fit", wanted, "--json"))["plans"][0]
    totals = [as_it_is, *(saving["total"] for saving in found["savings"])]
    assert found["fits"] and totals == sorted(totals, reverse=True)
    changes = {k: v for saving in found["savings"] for k, v in saving["set"].items()}
    flags = [part for k, v in changes.items() for part in ("--set", f"{k}={str(v).lower()}")]
    followed = json.loads(plan(recipe, *flags, "--json"))["plans"][0]
    assert followed["bytes"]["total"] == totals[-1] <= 0.6 * as_it_is


def test_what_cannot_fit_says_so(plan, recipe):
    done = plan(recipe, "--fit", "601MB", code=1)
    assert "does not fit" in done
    for change in ("training.gradient_checkpointing=true", "optimizer.kind=adamw8bit"):
        assert f"--set {change}" in done


def test_sizes_are_read_with_their_units():
    assert _bytes_of("8GB") == 8 * 10**9 and _bytes_of("7.5 GiB") == int(7.5 * 2**30)
    for wrong in ("8", "GB", "-1GB", "8 apples"):
        with pytest.raises(BadInput, match="such as 8GB"):
            _bytes_of(wrong)


@pytest.mark.parametrize("path", sorted((RECIPES / "sd15").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_for_sd15_can_be_read(path):
    recipe = Recipe.load(path)
    assert recipe.name == f"sd15-{path.stem}"
    assert "UNTESTED ON A GPU" in path.read_text("utf-8")
    assert len(recipe.preserve.prompts) > 250 and wanted(recipe)
    kept = " ".join(recipe.preserve.prompts).lower()
    assert not [
        concept for concept in recipe.concepts if re.search(rf"\b{concept.lower()}\b", kept)
    ]
    measured = recipe.measure.prompts.concept + recipe.measure.prompts.kept
    assert not set(recipe.preserve.prompts) & set(measured)
    updates = recipe.optimizer.learning_rate * recipe.lora.alpha * recipe.training.iterations
    assert recipe.rollout.batch * recipe.training.gradient_accumulation == 4 and updates < 10


def test_a_true_size_recipe_is_planned_offline(plan, monkeypatch):
    def no_network(*_):
        raise AssertionError("a plan asks nobody")

    monkeypatch.setattr("socket.socket.connect", no_network)
    found = json.loads(plan(RECIPES / "sd15" / "nudity.yaml", "--json"))["plans"][0]
    assert found["parameters"] == 859_520_964
    assert found["bytes"]["base"] == 2 * 859_520_964
    assert found["bytes"]["total"] < 4.2e9
    assert 2.1e9 < found["drawing"]["bytes"]["one_image"] < found["drawing"]["bytes"]["total"] < 5e9
    assert found["host_bytes"] == 4 * (859_520_964 + 123_060_480)
