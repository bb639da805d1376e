"""The ways of the benchmark of fewer passes are what their names say."""

from benchmarks.bench_fewer_passes import PAPER, RECIPE, WAYS

from sdd_lora.recipe import Recipe
from sdd_lora.sd.model import unet_config
from sdd_lora.training.plan import footprint


def planned(way):
    """UNet passes, and arithmetic in forwards."""
    recipe = Recipe.load(RECIPE, WAYS[way])
    found, iterations = footprint(recipe, unet_config("demo")), recipe.training.iterations
    return found.passes * iterations, found.cost_in_forwards * iterations


def test_fast_is_planned_at_an_eighth_of_the_papers_passes_and_a_sixth_of_its_arithmetic():
    (paper_passes, paper_cost), (passes, cost) = planned("paper@demo"), planned("fast")
    assert round(paper_passes) == PAPER["training.iterations"] * (25 + 6)
    assert passes <= paper_passes / 8
    assert cost <= paper_cost / 6


def test_ways_differ_from_the_papers_in_the_rollout_alone_and_fast_in_where_it_starts():
    paper = Recipe.load(RECIPE, WAYS["paper@demo"])
    assert (paper.rollout.steps, paper.rollout.timesteps_per_trajectory, paper.rollout.batch) == (
        25,
        1,
        1,
    )
    sections = {"objective", "ema", "concepts", "measure", "optimizer", "lora", "preserve"}
    for name, way in WAYS.items():
        recipe = Recipe.load(RECIPE, way)
        changed = {"optimizer", "lora", "preserve"} if name == "fast" else set()
        assert {s for s in sections if getattr(recipe, s) != getattr(paper, s)} == changed
