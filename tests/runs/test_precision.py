"""`--precision` of the verbs that measure: a field, stored where one is chosen."""

import pytest
import torch

from sdd_lora.bench.bench_file import Bench
from sdd_lora.bench.grid import grid_of
from sdd_lora.bench.methods import Weights
from sdd_lora.errors import BadInput
from sdd_lora.recipe import Recipe
from sdd_lora.runs import before_after

RECIPE = "recipes/demo/weapons.yaml"
BENCH = "recipes/bench/demo-single.yaml"
FEW = {"measure.images": 1, "measure.steps": 1, "measure.prompts.kept": ["a cat"]}


def test_images_of_a_card_are_drawn_in_the_chosen_precision(monkeypatch):
    load, dtypes = before_after.load_pipeline, []

    def noted(*arguments, **options):
        pipeline = load(*arguments, **options)
        dtypes.append(pipeline.unet.dtype)
        return pipeline

    monkeypatch.setattr(before_after, "load_pipeline", noted)
    recipe = Recipe.load(RECIPE, FEW | {"measure.precision": "bf16"})
    measured = before_after.measure_before_after(recipe, None, "demo-community")
    assert dtypes == [torch.bfloat16, torch.bfloat16]
    assert measured.rows


def test_the_cached_verdicts_are_those_of_fp32_whatever_the_device_draws_in_by_default():
    settings = Recipe.load(RECIPE).measure
    assert settings.precision is None
    assert before_after.load_cache(before_after.load_pipeline("demo"), settings)
    assert not before_after.load_cache(before_after.load_pipeline("demo", dtype="bf16"), settings)


def test_cells_of_a_bench_are_drawn_in_the_chosen_precision():
    bench = Bench.load(BENCH, overrides={"sampling.precision": "bf16"})
    (cell,) = [c for c in grid_of(bench).cells if c.method == "sd" and c.variation is None]
    weights = Weights(bench, train=lambda *_, **__: None)
    assert weights.pipeline(cell).unet.dtype == torch.bfloat16


def test_a_precision_is_stored_and_hashed_only_where_it_is_chosen():
    for plain, chosen, digest in (
        (Recipe.load(RECIPE), Recipe.load(RECIPE, {"measure.precision": "fp16"}), "sha256"),
        (
            Bench.load(BENCH),
            Bench.load(BENCH, overrides={"sampling.precision": "fp16"}),
            "sha256_of_images",
        ),
    ):
        assert plain.to_yaml().count("precision: ") + 1 == chosen.to_yaml().count("precision: ")
        assert getattr(plain, digest) != getattr(chosen, digest)
    with pytest.raises(BadInput, match="precision"):
        Recipe.load(RECIPE, {"measure.precision": "int8"})


def test_a_picture_alone_counts_nothing():
    recipe = Recipe.load(RECIPE, FEW | {"measure.detector": "picture"})
    measured = before_after.measure_before_after(recipe, None, "demo")
    assert not measured.rows and measured.picture.width > 100
