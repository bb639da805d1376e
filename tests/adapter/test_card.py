"""The card: plain numbers, pictures, how it was made, and how to use it in each program."""

import pytest
import yaml
from support.adapter_making import random_adapter
from support.portable import portable

from sdd_lora import sd1
from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.card import render_card
from sdd_lora.adapter.metrics import Metrics

RECIPE = {
    "objective": {"kind": "sdd"},
    "lora": {"init": "closed-form"},
    "training": {"iterations": 1200},
    "preserve": {"prompts": ["a cat", "a dog"]},
    "parameters": "lora",
}


def row(name, group, before, after):
    rates = {"before": before, "after": after, "n": 40}
    bounds = {"ci95_before": [0.0, 1.0], "ci95_after": [0.0, 1.0]}
    return {"name": name, "group": group, "prompts": 4} | rates | bounds


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_it_begins_with_plain_numbers_and_the_pictures():
    measures = [
        row("concept drawn", "weapons", 0.975, 0.025),
        row("noun kept", "food", 0.9, 0.85),
        row("noun kept", "animals", 0.9, 0.5),
    ]
    transfer = [{"model": "my/model 2", "measures": measures[:1]}]
    card = render_card(random_adapter(), Metrics(measures=measures, transfer=transfer))
    assert "(weapons), it is drawn in 2.5 % of 40 images; without this file in 97.5 %." in card
    assert "loses most of what is kept: animals, 90.0 % → 50.0 %." in card
    assert "](before-after.png)" in card and "](before-after-my-model-2.png)" in card
    assert card.index("before-after.png") < card.index("| measure |")
    assert "before-after" not in render_card(random_adapter(), Metrics())


def test_a_detectors_rows_are_told_as_such():
    measures = [row("flagged by nudenet (score ≥ 0.6)", "concept", 0.5, 0.1)]
    card = render_card(random_adapter(), Metrics(measures=measures))
    assert "10.0 % of 40 images are flagged by nudenet (score ≥ 0.6); without" in card


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, "Trained by sdd for 1,200 iterations, from a closed-form solution over the prompts'"),
        ({"lora": {"init": "random"}}, "from a random start, a change of 0."),
        ({"training": {"iterations": 0}}, "Nothing was trained: it is a closed-form solution"),
        (
            {"lora": {"init": "words"}},
            "from the closed-form solution of sdd-lora erase, from words",
        ),
        ({"preserve": {"prompts": [], "vocabulary": 900}}, " 900 prompts are held"),
        ({"preserve": {"prompts": ["a"]}}, " 1 prompt is held to the base meanwhile."),
    ],
)
def test_it_tells_what_was_trained_and_what_is_closed_form(change, told):
    assert told in render_card(random_adapter(recipe=RECIPE | change), Metrics())


def test_it_names_the_adapter_that_a_training_went_on_from():
    start = {"name": "first", "identity": "1a", "sha256": "2b"}
    card = render_card(random_adapter(recipe=RECIPE, started_from=start), Metrics())
    assert "from another adapter, first (SHA-256 `2b`)." in card


def test_uses_name_the_file_as_each_program_wants_it():
    adapter = random_adapter(
        widths=sd1.SD15, base={"model": "owner/sd"}, license="openrail", concepts=["bomb"]
    )
    card = render_card(Adapter(adapter.factors, adapter.metadata | {"name": "no-bombs"}), Metrics())
    assert "as `no-bombs.safetensors`, `adapter.json` beside it as `no-bombs.json`" in card
    assert "<lora:no-bombs:1>" in card
    assert 'from_pretrained("owner/sd")' in card
    assert "## Licence\n\nopenrail\n" in card
    front = front_matter(card)
    assert (front["base_model"], front["base_model_relation"]) == ("owner/sd", "adapter")
    assert front["license"] == "openrail" and "lora" in front["tags"]


def test_an_eraser_from_words_is_no_lora_file():
    eraser = portable(width=768)
    words = {"keep": ["cat"], "near": ["gun"], "vocabulary": 3000}
    card = render_card(Adapter(eraser.factors, eraser.metadata | {"words": words}), Metrics())
    assert "Nothing was trained: it is solved in closed form from words alone" in card
    assert "the 3000 most frequent words of the tokenizer and 1 that were named." in card
    assert "too near to stay: gun." in card
    assert "*Load safety adapter*" in card and "<lora:" not in card
    assert "lora" not in front_matter(card)["tags"]


def test_what_was_not_attacked_is_said():
    assert (
        "## What it withstands, and what not\n\nNot measured: take it as withstanding no attack.\n"
        in render_card(random_adapter(), Metrics())
    )
