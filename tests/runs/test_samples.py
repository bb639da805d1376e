"""Pictures while training: when they are drawn, and that the training doesn't notice."""

import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.short_run import short

from sdd_lora import Recipe, train
from sdd_lora.errors import SddLoraError
from sdd_lora.runs import samples
from sdd_lora.runs.samples import sample_prompts

DRAWING = {"measure__every": 2, "measure__steps": 1}


def drawn(folder: Path) -> dict[str, np.ndarray]:
    return {p.name: np.asarray(Image.open(p)) for p in sorted((folder / "samples").iterdir())}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(short(measure__steps=1), folder)
    return folder


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampled") / "run"
    train(short(**DRAWING), folder)
    return folder


def test_pictures_change_no_byte_of_the_adapter(plain, sampled):
    recipe, name = short(**DRAWING), "adapter.safetensors"
    assert (sampled / name).read_bytes() == (plain / name).read_bytes()
    assert recipe.sha256 == short(measure__steps=1).sha256
    assert Recipe.load(sampled / "recipe.yaml").measure.every == 2
    pictures = drawn(sampled)
    assert list(pictures) == ["000002.png", "000003.png"]
    first, last = pictures.values()
    base, now = slice(30, 158), slice(158, 286)
    assert (first[base, 40:] == last[base, 40:]).all()
    assert (first[now, 40:] != last[now, 40:]).any()
    assert first[now].std() > 10


def test_an_interrupted_run_draws_what_it_left_out(sampled, tmp_path, monkeypatch):
    draw = samples.draw

    def interrupted(*arguments):
        for found in draw(*arguments):
            signal.raise_signal(signal.SIGINT)
            yield found

    monkeypatch.setattr(samples, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt, match="iteration 2 of 3"):
        train(short(**DRAWING), tmp_path / "run")
    monkeypatch.undo()
    assert not (tmp_path / "run" / "samples").exists()
    train(short(**DRAWING), tmp_path / "run", resume=True)
    for name, picture in drawn(sampled).items():
        assert (drawn(tmp_path / "run")[name] == picture).all()


def test_a_picture_that_fails_is_told_and_stops_no_training(tmp_path, monkeypatch, caplog):
    def fails(*_):
        raise SddLoraError("not finite")

    monkeypatch.setattr(samples, "draw", fails)
    recipe = short(**DRAWING, training__precision="bf16", parameters="full")
    train(recipe, tmp_path / "run")
    assert "000002.png: not drawn: not finite" in caplog.text
    assert not (tmp_path / "run" / "samples").exists()


def test_other_precisions_and_whole_weights_are_drawn_too(tmp_path):
    recipe = short(
        **DRAWING,
        training__iterations=2,
        training__precision="bf16",
        training__base_precision="bf16",
        training__gradient_checkpointing=True,
    )
    train(recipe, tmp_path / "run")
    assert list(drawn(tmp_path / "run")) == ["000002.png"]


def test_prompts_are_those_measured_or_else_those_trained_on():
    assert sample_prompts(short()) == ["bomb", "axe", "a cat", ""]
    prompts = {"concept": [f"c{i}" for i in range(8)], "kept": ["k"]}
    assert sample_prompts(short(measure__prompts=prompts)) == ["c0", "c2", "c4", "c6", "k"]
