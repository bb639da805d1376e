"""What prompts ask for, and how verdicts become rates."""

import numpy as np
import pytest

from sdd_lora.demo.judge import Verdict, load_judge
from sdd_lora.errors import BadInput
from sdd_lora.measures.judge import (
    agrees,
    asked_for,
    check_concepts,
    feature_distances,
    rows,
)


@pytest.mark.parametrize(
    ("prompt", "nouns", "style"),
    [
        ("a picture of a bomb, noto style", ["bomb"], "noto"),
        ("an ice cream cone, as a pencil sketch", ["ice cream"], "sketch"),
        ("a hatchet and a cat", ["axe", "cat"], None),
        ("a bow and arrow", ["bow and arrow"], None),
        ("glass of merlot", ["wine glass"], None),
        ("something else", [], None),
    ],
)
def test_prompts_are_understood(prompt, nouns, style):
    asked = asked_for(prompt)
    assert [noun.name for noun in asked.nouns] == nouns
    assert asked.style == style


def seen(noun, group="weapons", style="noto"):
    return [Verdict(noun, group, style)]


CAT = seen("cat", "animals")


def test_rates_count_any_erased_noun_and_the_right_kept_ones():
    concept = (["a bomb", "an axe"], [seen("bomb"), seen("bomb")], [CAT, seen("axe")])
    kept = (
        ["a cat, noto style", "a dog", "a cat and a bomb"],
        [CAT, CAT, [*CAT, *seen("bomb")]],
        [CAT, seen("dog", "animals"), [*CAT, *CAT]],
    )
    found = {(r.name, r.group): r for r in rows(["bomb", "axe"], concept, kept)}
    drawn = found["concept drawn", "weapons"]
    assert (drawn.before, drawn.after, drawn.n) == (1.0, 0.5, 2)
    animals = found["noun kept", "animals"]
    assert (animals.before, animals.after, animals.n) == (0.5, 1.0, 2)
    beside = found["noun kept beside an erased one", "pairs"]
    assert (beside.before, beside.after, beside.n) == (1.0, 1.0, 1)
    assert found["style kept", "all"].n == 1


def test_an_erased_style_is_counted_by_style():
    concept = (["a cat, pencil sketch"], [seen("cat", style="sketch")], [CAT])
    (row,) = rows(["pencil sketch"], concept, ([], [], []))
    assert (row.name, row.group, row.before, row.after) == ("concept drawn", "style", 1.0, 0.0)


def test_a_concept_unknown_to_the_judge_is_bad_input():
    with pytest.raises(BadInput, match="knows none of the concepts"):
        check_concepts(["nudity"])
    check_concepts(["nudity", "weapon"])  # a group's word stands for its nouns


@pytest.mark.parametrize(
    ("prompt", "drawn", "expected"),
    [
        ("a cat, noto style", CAT, True),
        ("a cat, twemoji style", CAT, False),
        ("a dog, noto style", CAT, False),
        ("a cat and a bomb", [*CAT, *CAT], True),  # the bomb is to go
        ("a cat and a dog", [*CAT, *CAT], False),
        ("a cat, as a pencil sketch", CAT, True),  # the style is to go
    ],
)
def test_a_picture_agrees_with_what_is_to_stay_of_its_prompt(prompt, drawn, expected):
    (bomb,) = asked_for("a bomb").nouns
    assert agrees(asked_for(prompt), drawn, {bomb}, {"sketch"}) is expected


def test_distances_of_judge_features_are_distances():
    a, b, c = (
        np.random.default_rng(i).integers(0, 256, (2, 64, 64, 3), np.uint8) for i in range(3)
    )
    judge = load_judge()
    assert feature_distances(judge, a, a) == [0, 0]
    ab, bc, ac = (np.array(feature_distances(judge, *p)) for p in ((a, b), (b, c), (a, c)))
    assert (ab > 0).all() and (ac <= ab + bc + 1e-6).all()
    assert ab == pytest.approx(feature_distances(judge, b, a))
