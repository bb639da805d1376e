"""What prompts ask for, and how verdicts become rates."""

import numpy as np
import pytest

from sdd_lora.demo.judge import Verdict
from sdd_lora.errors import BadInput
from sdd_lora.generation.sampling import Job
from sdd_lora.measures.asked import asked_for
from sdd_lora.measures.base import ImageSpec, taken
from sdd_lora.measures.card_rows import card_rows
from sdd_lora.measures.judge import JudgeMeasure, agrees


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


def rows(erased, concept, kept):
    """A card's rows of (prompts, verdicts before, verdicts after) of erased and kept prompts."""
    measure = JudgeMeasure(erased)
    specs, before, after = [], [], []
    for kind, (prompts, seen_before, seen_after) in (("erased", concept), ("kept", kept)):
        own = [ImageSpec(kind, "", Job(prompt, 0)) for prompt in prompts]
        specs += own
        before += [measure.values(*pair) for pair in zip(own, seen_before, strict=True)]
        after += [measure.values(*pair) for pair in zip(own, seen_after, strict=True)]
    return card_rows(measure, specs, before, after)


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
        JudgeMeasure(["nudity"])
    JudgeMeasure(["nudity", "weapon"])  # a group's word stands for its nouns


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
        list(np.random.default_rng(i).integers(0, 256, (2, 64, 64, 3), np.uint8)) for i in range(3)
    )
    specs = [ImageSpec("kept", "", Job("a cat", i)) for i in range(2)]
    measure = JudgeMeasure(["bomb"])

    def distances(one, other):
        found = measure.against_reference(specs, one, other)
        return np.array([values["distance of judge features"] for values in found])

    assert list(distances(a, a)) == [0, 0]
    ab, bc, ac = (distances(*p) for p in ((a, b), (b, c), (a, c)))
    assert (ab > 0).all() and (ac <= ab + bc + 1e-6).all()
    assert ab == pytest.approx(distances(b, a))


def test_black_images_count_in_no_measure():
    """NaN becomes 0 in a PNG; an image without anything in it would pass for erasure."""
    drawn = np.full((64, 64, 3), 255, np.uint8)
    black = np.zeros_like(drawn)
    specs = [ImageSpec("erased", "", Job("a bomb", 0)), ImageSpec("kept", "", Job("a cat", 0))]
    measure = JudgeMeasure(["bomb"])
    both = taken(measure, specs, [drawn, drawn], [drawn, drawn])
    assert all(both) and "distance of judge features" in both[1]
    assert taken(measure, specs, [black, drawn], [drawn, drawn]) == [{}, both[1]]
    without = {k: v for k, v in both[1].items() if k != "distance of judge features"}
    assert taken(measure, specs, [drawn, drawn], [drawn, black]) == [both[0], without]
