"""Ctrl-C while measuring costs no image; images that show nothing are told."""

import json

import numpy as np
import pytest
from support.adapters import random_adapter
from support.short_run import short

from sdd_lora import measure, train
from sdd_lora.io.cache import cache_folder
from sdd_lora.recipe import Recipe
from sdd_lora.runs import before_after

RECIPE = Recipe(
    name="measured",
    model="demo",
    concepts=["bomb"],
    measure={
        "prompts": {"concept": ["a bomb"], "kept": ["a cat"]},
        "images": 3,
        "steps": 1,
        "detector": "judge",
    },
)


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Numbers of images drawn by each call of `draw`; `stop_after` images Ctrl-C comes."""
    monkeypatch.setenv("SDD_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(before_after, "_SEEN_AT_ONCE", 2)
    monkeypatch.setattr(before_after, "_DRAWN_AT_ONCE", 2)
    calls, draw = [], before_after.draw

    def counted(pipeline, jobs, sampling, description):
        calls.append(0)
        for found in draw(pipeline, jobs, sampling, description):
            if sum(calls) == calls_stop[0]:
                raise KeyboardInterrupt
            calls[-1] += 1
            yield found

    calls_stop = [-1]
    monkeypatch.setattr(before_after, "draw", counted)
    return calls, calls_stop


def test_a_measurement_goes_on_with_the_images_that_are_missing(tmp_path, drawn):
    calls, stop_after = drawn
    adapter = random_adapter(0.5)
    whole = measure(adapter, RECIPE, tmp_path / "whole")
    assert calls == [6, 6]
    calls.clear()
    stop_after[0] = 9  # three into the second half, two of them seen
    with pytest.raises(KeyboardInterrupt, match="the same call draws the images that are missing"):
        measure(adapter, RECIPE, tmp_path / "out")
    calls.clear()
    stop_after[0] = -1
    assert measure(adapter, RECIPE, tmp_path / "out") == whole
    assert calls == [0, 4]
    names = ("before-after.png", "adapter.safetensors")
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(cache_folder("measuring").iterdir())


def test_another_adapter_or_other_settings_start_anew(tmp_path, drawn):
    calls, stop_after = drawn
    stop_after[0] = 6
    with pytest.raises(KeyboardInterrupt):
        measure(random_adapter(0.5), RECIPE, tmp_path / "out")
    stop_after[0] = -1
    steps = RECIPE.measure.model_copy(update={"steps": 2})
    for adapter, recipe in (
        (random_adapter(0.6), RECIPE),
        (random_adapter(0.5), RECIPE.model_copy(update={"measure": steps})),
    ):
        calls.clear()
        measure(adapter, recipe, tmp_path / "out", force=True)
        assert calls == [6, 6]


def test_a_training_interrupted_while_measuring_is_resumed_there(tmp_path, drawn):
    calls, stop_after = drawn
    recipe = short().model_copy(update={"measure": RECIPE.measure})
    stop_after[0] = 8
    with pytest.raises(KeyboardInterrupt, match="while measuring; `resume=True` draws"):
        train(recipe, tmp_path / "run")
    calls.clear()
    stop_after[0] = -1
    train(recipe, tmp_path / "run", resume=True)
    assert calls == [0, 4]


def test_black_images_are_told_in_card_and_metrics(tmp_path, monkeypatch, caplog):
    draw = before_after.draw

    def black(pipeline, jobs, sampling, description):
        for index, image in draw(pipeline, jobs, sampling, description):
            yield index, np.zeros_like(image) if description == "after" else image

    monkeypatch.setattr(before_after, "draw", black)
    measure(random_adapter(0.5), RECIPE, tmp_path / "out")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["black"] == {"before": 0, "after": 6, "images": 6}
    assert metrics["measures"] == []
    card = (tmp_path / "out" / "README.md").read_text()
    assert "6 of 6 images drawn with it, and 0 drawn without it, are all black" in card
    assert "are all black" in caplog.text
