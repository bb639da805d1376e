"""Recipes: strict, typed, every error at once with its line."""

from pathlib import Path

import pytest

from sdd_lora.errors import BadInput
from sdd_lora.recipe import Recipe, parse_override

RECIPES = Path(__file__).parent.parent / "recipes"
MINIMAL = "name: mine\nmodel: demo\nconcepts: [bomb]\n"


def test_a_minimal_recipe_gets_the_papers_defaults():
    recipe = Recipe.parse(MINIMAL)
    assert recipe.training.iterations == 1500
    assert recipe.ema.decay == 0.999 and not recipe.ema.warmup
    assert recipe.objective.guidance_scale == 3.0
    assert recipe.rollout.steps == 50 and recipe.rollout.batch == 1


def test_the_written_recipe_is_complete_and_reads_back_equal():
    recipe = Recipe.parse(MINIMAL + "preset: demo\n")
    again = Recipe.parse(recipe.to_yaml())
    assert again == recipe
    assert again.sha256 == recipe.sha256


def test_all_errors_come_at_once_with_their_lines():
    text = (
        "name: a b\nmodel: demo\nconcepts: []\nlora:\n  rank: -1\n  rnak: 2\nsurprise: 1\n"
        "ema:\n  decay: much\n"
    )
    with pytest.raises(BadInput) as caught:
        Recipe.parse(text, where="r.yaml")
    message = str(caught.value)
    assert message.count("\n") == 5
    for part in (
        "r.yaml:1: name",
        "r.yaml:3: concepts",
        "r.yaml:5: lora.rank",
        "r.yaml:6: lora.rnak: unknown field",
        "r.yaml:7: surprise: unknown field",
        "r.yaml:9: ema.decay",
    ):
        assert part in message


def test_what_is_not_there_yet_is_refused_by_name():
    with pytest.raises(BadInput, match="not available in this version"):
        Recipe.parse(MINIMAL + "measure: {detector: nudenet}\n")


def test_esd_keeps_no_average_and_has_an_eta():
    recipe = Recipe.parse(MINIMAL + "preset: demo\nobjective: {kind: esd-x}\n")
    assert (recipe.objective.eta, recipe.ema.decay, recipe.ema.warmup) == (1.0, 0.0, False)
    assert recipe.rollout.steps == 10  # the preset's other fields stay
    written = Recipe.parse(MINIMAL + "objective: {kind: esd-x, eta: 3}\nema: {decay: 0}\n")
    assert written.objective.eta == 3.0
    for again in (recipe, written):
        assert Recipe.parse(again.to_yaml()) == again


def test_full_training_starts_from_the_papers_learning_rate():
    recipe = Recipe.parse(MINIMAL + "preset: demo\nparameters: full\n")
    assert recipe.optimizer.learning_rate == 1e-5
    assert Recipe.parse(recipe.to_yaml()) == recipe
    faster = Recipe.parse(MINIMAL + "parameters: full\noptimizer: {learning_rate: 2e-4}\n")
    assert faster.optimizer.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("objective: {eta: 1}", "eta belongs to esd-x and esd-u"),
        ("objective: {kind: esd-x}\nema: {decay: 0.9}", "esd-x keeps no average"),
        ("objective: {kind: esd-u}", "expected parameters: full, or esd-x"),
        ("parameters: full\nlora: {rank: 8}", "leave lora away"),
        ("rollout: {steps: 5, points: 5}", "5 points need more than 5 steps"),
        ("rollout: {guidance_interval: [0.8, 0.2]}", "expected low before high"),
        ("objective: {kind: [esd-x]}", "objective.kind"),
    ],
)
def test_fields_that_contradict_each_other_are_bad_input(lines, message):
    with pytest.raises(BadInput) as caught:
        Recipe.parse(MINIMAL + lines + "\n")
    assert message in str(caught.value)


def test_the_fast_preset_is_a_rollout_of_few_steps():
    fast = Recipe.parse(MINIMAL + "preset: fast\n").rollout
    assert fast.solver == "dpmsolver++" and fast.points > 1 and fast.steps < 20


def test_a_written_field_wins_over_the_preset_and_set_wins_over_both():
    recipe = Recipe.parse(
        MINIMAL + "preset: demo\nrollout: {steps: 7}\n", overrides={"rollout.batch": 3}
    )
    assert (recipe.rollout.steps, recipe.rollout.batch) == (7, 3)
    assert recipe.measure.detector == "judge"


def test_lists_may_stand_in_text_files_beside_the_recipe(tmp_path):
    (tmp_path / "concepts.txt").write_text("bomb\n\n dagger \n")
    (tmp_path / "kept.txt").write_text("a cat\n")
    (tmp_path / "r.yaml").write_text(
        "name: mine\nmodel: demo\nconcepts: concepts.txt\n"
        "measure: {prompts: {kept: [kept.txt, a dog]}}\n"
    )
    recipe = Recipe.load(tmp_path / "r.yaml")
    assert recipe.concepts == ["bomb", "dagger"]
    assert recipe.measure.prompts.kept == ["a cat", "a dog"]


def test_a_missing_list_and_broken_yaml_are_bad_input(tmp_path):
    with pytest.raises(BadInput, match=r"gone\.txt"):
        Recipe.parse("name: mine\nmodel: demo\nconcepts: gone.txt\n", folder=tmp_path)
    with pytest.raises(BadInput, match="not valid YAML"):
        Recipe.parse("name: [\n")
    with pytest.raises(BadInput, match="expected a recipe"):
        Recipe.load(tmp_path / "gone.yaml")


def test_a_key_that_stands_twice_is_bad_input():
    with pytest.raises(BadInput, match=r"r\.yaml:4: concepts stands here a second time"):
        Recipe.parse(MINIMAL + "concepts: [axe]\n", where="r.yaml")


def test_a_half_precision_base_needs_that_precision():
    with pytest.raises(BadInput, match="needs precision bf16 too"):
        Recipe.parse(MINIMAL + "training: {base_precision: bf16}\n")


TO_TRAIN = sorted(path for path in RECIPES.rglob("*.yaml") if path.parent.name != "bench")


@pytest.mark.parametrize("path", TO_TRAIN, ids=lambda path: path.stem)
def test_every_recipe_that_ships_is_valid(path):
    recipe = Recipe.load(path)
    assert recipe.name.endswith(path.stem)
    if recipe.model == "demo":
        assert recipe.measure.prompts.concept and recipe.measure.prompts.kept
    assert not set(recipe.preserve.prompts) & set(recipe.measure.prompts.kept)


def test_overrides_are_read_as_yaml():
    assert parse_override("ema.decay=0.9") == ("ema.decay", 0.9)
    assert parse_override("lora.targets=[to_q]") == ("lora.targets", ["to_q"])
    with pytest.raises(BadInput, match="expected name=value"):
        parse_override("ema.decay")
