"""What a run keeps of its way: results so far, and what had been spent on them."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.short_run import short
from support.trainers import recipe, trainer

from sdd_lora import Adapter, train
from sdd_lora.errors import BadInput
from sdd_lora.recipe import Recipe


def test_a_snapshot_is_what_a_shorter_run_gives(tmp_path):
    train(short(training__snapshot_every=2), tmp_path / "long")
    train(short(training__iterations=2), tmp_path / "short")
    assert [p.name for p in (tmp_path / "long" / "snapshots").iterdir()] == ["000002.safetensors"]
    kept = Adapter.load(tmp_path / "long" / "snapshots" / "000002.safetensors")
    alone = Adapter.load(tmp_path / "short")
    assert all(torch.equal(kept.delta(name), alone.delta(name)) for name in alone.factors)
    metrics = json.loads((tmp_path / "long" / "metrics.json").read_text())
    (told,) = metrics["snapshots"]
    shorter = json.loads((tmp_path / "short" / "metrics.json").read_text())
    assert "snapshots" not in shorter and "snapshots" not in metrics["training"]
    assert (told["iteration"], told["unet_passes"]) == (2, shorter["training"]["unet_passes"])


def test_snapshots_of_whole_weights_have_the_results_names(tmp_path):
    path = train(short(parameters="full", training__snapshot_every=1), tmp_path / "run")
    first = load_file(tmp_path / "run" / "snapshots" / "000001.safetensors")
    result = load_file(path)
    assert first.keys() == result.keys()
    assert any(not torch.equal(first[name], result[name]) for name in result)


def test_a_resumed_run_knows_the_snapshots_before_it(tmp_path):
    settings = recipe(training={"iterations": 6, "snapshot_every": 2})
    kept = []
    first = trainer(settings, tmp_path / "state" / "state.pt")
    first.run(lambda trained: kept.append(trained.iteration))
    second = trainer(settings, tmp_path / "state" / "state.pt")
    second.resume()
    assert kept == [2, 4] and second.snapshots == first.snapshots
    second.run()
    assert [s.iteration for s in second.snapshots] == kept


def test_a_closed_form_alone_is_an_adapter_without_a_unet_pass(tmp_path):
    made = train(short(lora__init="closed-form", training__iterations=0), tmp_path / "run")
    assert made.norm() > 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["training"]["unet_passes"] == 0 and metrics["training"]["final_loss"] is None
    with pytest.raises(BadInput, match="0 leaves the base as it is"):
        short(training__iterations=0)


def test_a_recipe_without_snapshots_is_stored_as_before():
    plain = Recipe(name="x", model="demo", concepts=["bomb"])
    assert "snapshot_every" not in plain.to_yaml()
    assert (
        "snapshot_every: 5"
        in Recipe(**plain.model_dump() | {"training": {"snapshot_every": 5}}).to_yaml()
    )
