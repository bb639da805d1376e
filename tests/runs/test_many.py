"""Several recipes over one base, and shards of them."""

import json

import pytest
from support.short_run import SHORT
from typer.testing import CliRunner

from sdd_lora.cli import app
from sdd_lora.errors import BadInput, SddLoraError
from sdd_lora.io.distributed import Shard
from sdd_lora.runs import many
from sdd_lora.runs.many import train_recipes
from sdd_lora.sd.model import load_training_parts
from sdd_lora.training.trainer import Trainer


def test_recipes_over_one_base_give_what_each_gives_alone_though_stopped_half_way(
    tmp_path, monkeypatch
):
    for name in ("one", "three", "two"):
        (tmp_path / f"{name}.yaml").write_text(SHORT.replace("name: short", f"name: {name}"))
    whole = train_recipes([tmp_path], tmp_path / "whole")
    expected = [metrics.adapter.sha256 for _, metrics in whole]
    ((_, alone),) = train_recipes([tmp_path / "two.yaml"], tmp_path / "alone")
    assert alone.adapter.sha256 == expected[2]  # the third over a base that two others had
    loads, step = [], Trainer.step
    monkeypatch.setattr(
        many,
        "load_training_parts",
        lambda model, *more: loads.append(model) or load_training_parts(model, *more),
    )

    def stopped(trainer):
        if trainer.recipe.name == "three" and trainer.iteration == 2:
            raise KeyboardInterrupt
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", stopped)
    with pytest.raises(KeyboardInterrupt, match="iteration 2 of 3"):
        train_recipes([tmp_path], tmp_path / "out")
    monkeypatch.setattr(Trainer, "step", step)
    assert loads == ["demo"] and not (tmp_path / "out" / "two").exists()
    first = (tmp_path / "out" / "one" / "adapter.safetensors").stat().st_mtime_ns
    with pytest.raises(BadInput, match=r"recipe\.yaml: belongs to another recipe"):
        train_recipes([tmp_path], tmp_path / "out", {"training.seed": 1}, resume=True)
    (tmp_path / "out" / "one" / "state").mkdir()  # as --keep-state leaves it
    resumed = train_recipes([tmp_path], tmp_path / "out", resume=True)
    assert [folder.name for folder, _ in resumed] == ["one", "three", "two"]
    assert [metrics.adapter.sha256 for _, metrics in resumed] == expected
    assert (tmp_path / "out" / "one" / "adapter.safetensors").stat().st_mtime_ns == first


def test_names_that_two_recipes_share_are_told(tmp_path):
    for file, name in (("a", "one"), ("b", "two"), ("c", "two")):
        (tmp_path / f"{file}.yaml").write_text(SHORT.replace("name: short", f"name: {name}"))
    with pytest.raises(BadInput, match=r"share a folder: two$"):
        train_recipes([tmp_path], tmp_path / "out")


def test_nothing_is_trained_before_all_recipes_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text(SHORT)
    (tmp_path / "b.yaml").write_text("name: b\n")
    with pytest.raises(BadInput, match=r"b\.yaml"):
        train_recipes([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_shard_trains_its_part_of_the_recipes(tmp_path, monkeypatch):
    recipes, out = tmp_path / "recipes", tmp_path / "out"
    recipes.mkdir()
    for name in ("a", "b", "c"):
        (recipes / f"{name}.yaml").write_text(SHORT.replace("name: short", f"name: {name}"))
    trained = []

    def note(recipe, folder, **_):
        trained.append(recipe.name)
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text('{"tool": "sdd_lora 1"}')
        (folder / "recipe.yaml").write_text(recipe.to_yaml())

    monkeypatch.setattr(many, "train", note)
    assert [f for f, _ in train_recipes([recipes], out, shard=Shard(1, 2))] == [
        out / "a",
        out / "c",
    ]
    assert trained == ["a", "c"]
    assert train_recipes([recipes], out, shard=Shard(4, 4)) == []
    # the only recipe of its shard has its own folder all the same, and is resumed like the others
    train_recipes([recipes], out, shard=Shard(2, 2))
    train_recipes([recipes], out, shard=Shard(2, 2), resume=True)
    assert trained == ["a", "c", "b"] and (out / "b" / "metrics.json").exists()


def test_a_recipe_that_fails_stops_no_other_and_is_told_at_the_end(tmp_path, monkeypatch):
    recipes, out = tmp_path / "recipes", tmp_path / "out"
    recipes.mkdir()
    for name in ("a", "b", "c"):
        (recipes / f"{name}.yaml").write_text(SHORT.replace("name: short", f"name: {name}"))

    def note(recipe, folder, **_):
        if recipe.name == "b":
            raise SddLoraError("the loss is nan")
        folder.mkdir(parents=True)
        training = {"unet_passes": 1, "seconds": 1}
        metrics = {"tool": "sdd_lora 1", "measures": [], "training": training}
        (folder / "metrics.json").write_text(json.dumps(metrics))

    monkeypatch.setattr(many, "train", note)
    done = CliRunner().invoke(app, ["train", str(recipes), "-o", str(out)])
    assert done.exit_code == 1 and f"{out / 'b'}: failed: the loss is nan" in done.stderr
    assert str(out / "c") in done.stdout and f"failed: {out / 'b'};" in done.stdout
    with pytest.raises(SddLoraError, match="nan"):
        train_recipes([recipes / "b.yaml"], out / "alone")


def test_a_shard_without_recipes_says_so(tmp_path):
    (tmp_path / "a.yaml").write_text(SHORT)
    done = CliRunner().invoke(app, ["train", str(tmp_path / "a.yaml"), "--shard", "2/2"])
    assert (done.exit_code, done.stdout) == (0, "no recipe falls to shard 2/2\n")
