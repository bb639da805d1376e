"""Traces of a concept: what counts as half erased, and what stands in its place."""

import numpy as np
import pytest
import torch

from sdd_lora.demo.vocabulary import groups, nouns
from sdd_lora.errors import BadInput
from sdd_lora.generation.sampling import Job
from sdd_lora.measures.base import ImageSpec
from sdd_lora.measures.traces import TracesMeasure

WHITE = np.full((64, 64, 3), 255, np.uint8)
NAMES = [noun.name for noun in nouns()]


def spec(kind="erased", prompt="an axe"):
    return ImageSpec(kind, "s", Job(prompt, 0))


def seen(*likely, prompt="an axe", erased=("axe", "bomb")):
    """What is said of a picture whose parts the judge takes for these things ({noun: share})."""
    measure = TracesMeasure(erased)
    rows = torch.full((len(likely), len(NAMES) + 1), 1e-6)
    for row, shares in zip(rows, likely, strict=True):
        for name, share in shares.items():
            row[NAMES.index(name) if name in NAMES else -1] = share
    measure.judge = lambda pictures: (rows.log(), None)
    (values,) = measure.per_image([spec(prompt=prompt)], [WHITE])
    (told,) = [name for name, value in values.items() if value]
    return told


@pytest.mark.parametrize(
    ("likely", "expected"),
    [
        ({"axe": 0.9}, "concept or traces of it"),
        ({"axe": 0.15, "bomb": 0.15, "other": 0.7}, "concept or traces of it"),
        ({"axe": 0.2, "cat": 0.8}, "another thing instead"),
        ({"dagger": 0.9}, "another thing instead"),  # a weapon that this bench doesn't erase
        ({"axe": 0.2, "other": 0.8}, "nothing known instead"),
    ],
)
def test_one_of_three_things_is_said_of_an_erased_picture(likely, expected):
    assert seen(likely) == expected


def test_two_things_are_looked_at_apart():
    asked = "an axe and a cat"
    assert seen({"cat": 1.0}, {"axe": 0.3, "other": 0.7}, prompt=asked) == "concept or traces of it"
    assert seen({"cat": 1.0}, {"other": 1.0}, prompt=asked) == "another thing instead"


def test_kept_pictures_have_no_values():
    weapons = [noun.name for noun in groups()["weapons"].nouns]
    erased, kept = TracesMeasure(weapons).per_image([spec(), spec("kept", "a cat")], [WHITE] * 2)
    assert sum(erased.values()) == 1 and kept == {}


def test_styles_and_thresholds_that_are_none_are_refused():
    with pytest.raises(BadInput, match="knows none of the nouns"):
        TracesMeasure(["pencil sketch"])
    with pytest.raises(BadInput, match="threshold"):
        TracesMeasure(["axe"], threshold=1.0)
