"""The ways of the benchmark of fewer passes are what their names say."""

from sdd_lora.recipe import Recipe
from sdd_lora.training.footprint import footprint
from tests.benchmarks.bench_fewer_passes import RECIPE, WAYS
from tests.small import small_unet


def passes_of(way):
    recipe = Recipe.load(RECIPE, WAYS[way])
    return footprint(recipe, small_unet().config).passes * recipe.training.iterations


def test_fast_takes_an_eighth_of_the_papers_passes_at_most():
    paper = passes_of("paper@demo")
    assert round(paper) == 300 * (25 + 4)
    assert passes_of("fast") <= paper / 8


def test_ways_differ_from_the_papers_in_the_rollout_and_the_optimizer_alone():
    paper = Recipe.load(RECIPE, WAYS["paper@demo"])
    assert (paper.rollout.steps, paper.rollout.points, paper.rollout.batch) == (25, 1, 1)
    assert paper.optimizer == Recipe.load(RECIPE).optimizer
    for way in WAYS.values():
        recipe = Recipe.load(RECIPE, way)
        for section in ("preserve", "objective", "lora", "ema", "concepts", "measure"):
            assert getattr(recipe, section) == getattr(paper, section)
