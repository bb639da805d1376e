"""What a card says that a result withstands: attacks with it and without, on the same images."""

import pytest
from support.adapters import random_adapter

from sdd_lora.adapter.card import render_card
from sdd_lora.adapter.metrics import Metrics
from sdd_lora.attacks.registry import ATTACK_FUNCTIONS
from sdd_lora.attacks.settings import ATTACK_KINDS
from sdd_lora.errors import BadInput
from sdd_lora.measures.intervals import wilson
from sdd_lora.recipe import Recipe
from sdd_lora.recipe.sections import MeasureSettings
from sdd_lora.runs.measure import measure
from sdd_lora.runs.under_attack import check_attacks, withstood

RECIPE = """
name: attacked
model: demo
concepts: [axe]
measure:
  prompts: {concept: [a drawing of an axe]}
  images: 1
  steps: 6
  guidance: 3.0
  detector: judge
  attacks: [completion, adapter_weight]
"""


def test_each_attack_is_put_to_the_model_with_the_adapter_and_without(tmp_path):
    adapter = random_adapter(5.0)  # which ruins the model
    found = measure(adapter, Recipe.parse(RECIPE), tmp_path / "run")["attacks"]
    assert [(x["attack"], x["n"]) for x in found] == [("completion", 1), ("adapter's weight", 1)]
    assert found[0]["strength"] == "first 5 steps by the base"
    assert found[0]["unet_passes"] == 10  # five steps, guided
    for row in found:
        assert row["ci95_after"] == list(wilson(round(row["after"]), 1))
    assert found[1]["after"] == 0 and found[1]["unet_passes"] == 0
    card = (tmp_path / "run" / "README.md").read_text()
    assert "## What it withstands, and what not\n" in card
    assert "| completion | black-box | first 5 steps by the base | " in card


def test_a_card_says_that_nothing_was_measured():
    card = render_card(random_adapter(0.1), Metrics())
    assert (
        "## What it withstands, and what not\n\nNot measured: take it as withstanding no attack.\n"
        in card
    )


def test_a_learnt_adapter_and_words_are_drawn_with(monkeypatch, tmp_path):
    asked = []

    def noted(case, settings, attack=ATTACK_FUNCTIONS["inversion"]):
        asked.append(case.number)
        return attack(case, settings.model_copy(update={"steps": 1, "pictures": 1}))

    monkeypatch.setitem(ATTACK_FUNCTIONS, "inversion", noted)
    quick = {"measure.steps": 2, "measure.attacks": ["inversion"]}
    recipe, adapter = Recipe.parse(RECIPE, overrides=quick), random_adapter(0.3)
    rows = withstood(recipe, adapter, None, tmp_path)
    assert asked == [0, 0]  # of the model itself and with the adapter
    assert rows[0].access == "white-box" and rows[0].unet_passes > 0
    assert withstood(recipe, adapter, None, tmp_path) == rows and asked == [0, 0]  # kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measure.steps": 5}, "measure.attacks: completion: expected fewer steps"),
        ({"measure.detector": "none"}, "measure.attacks: expected a measure.detector"),
        ({"measure.prompts.concept": []}, "measure.attacks: expected a measure.detector"),
    ],
)
def test_attacks_that_can_not_be_carried_out_are_refused(change, message):
    with pytest.raises(BadInput, match=message):
        check_attacks(Recipe.parse(RECIPE, overrides=change))


def test_recipes_without_attacks_stay_as_they_were():
    assert "attacks" not in MeasureSettings().model_dump()
    names = MeasureSettings.model_fields["attacks"].annotation.__args__[0].__args__[0].__args__
    assert set(names) <= set(ATTACK_KINDS)
    assert all(ATTACK_KINDS[name]() for name in names)  # needs nothing but its defaults
