"""Our pipeline against diffusers' own loading of the saved file; the models that come along."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from support.adapters import random_adapter

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.factors import Factors
from sdd_lora.checkpoint.locate import DEMO_FOLDER
from sdd_lora.errors import BadInput
from sdd_lora.generation.images import draw
from sdd_lora.generation.sampling import Job, Sampling
from sdd_lora.sd.model import fingerprint
from sdd_lora.sd.pipeline import load_pipeline
from sdd_lora.sd.schedulers import SCHEDULERS

JOBS = [Job("a bomb, fluent style", 1), Job("a cat", 2)]


@pytest.fixture(scope="module")
def adapter():
    return random_adapter(strength=0.3)


def images(pipeline, scheduler="ddim"):
    sampling = Sampling(steps=3, guidance=4.0, scheduler=scheduler, batch=2)
    return np.stack([image for _, image in draw(pipeline, JOBS, sampling, "test")]).astype(int)


@pytest.mark.parametrize("form", ["kohya", "peft"])
def test_the_saved_file_draws_the_same_through_diffusers(adapter, tmp_path, form):
    path = tmp_path / "adapter.safetensors"
    adapter.save(path, format=form, dtype="fp32")
    theirs = StableDiffusionPipeline.from_pretrained(
        DEMO_FOLDER, dtype=torch.float32, safety_checker=None
    )
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    base = images(theirs)
    theirs.load_lora_weights(str(tmp_path), weight_name=path.name)
    ours = images(load_pipeline("demo", [(Adapter.load(path), 1.0)]))
    assert np.abs(ours - base).max() > 20
    assert np.abs(ours - images(theirs)).max() <= 1


def test_weights_scale_and_adapters_add_up(adapter):
    whole = images(load_pipeline("demo", [(adapter, 1.0)]))
    halves = images(load_pipeline("demo", [(adapter, 0.5), (adapter, 0.5)]))
    cancelled = images(load_pipeline("demo", [(adapter, 1.0), (adapter, -1.0)]))
    base = images(load_pipeline("demo"))
    assert np.abs(whole - base).max() > 20
    assert np.abs(whole - halves).max() <= 1
    assert np.abs(cancelled - base).max() <= 1


def test_samplers_differ():
    results = []
    for name in SCHEDULERS:
        results.append(images(load_pipeline("demo"), name))
    for number, one in enumerate(results):
        assert all(not np.array_equal(one, other) for other in results[:number])
        assert 20 < one.std() < 120


def test_the_fine_tune_is_one_ldm_file_with_other_weights():
    base, tuned = load_pipeline("demo"), load_pipeline("demo-community")
    assert fingerprint(base.unet) != fingerprint(tuned.unet)
    assert np.abs(images(base) - images(tuned)).max() > 20


def test_an_adapter_that_does_not_fit_is_bad_input(adapter):
    name, factors = next(iter(adapter.factors.items()))
    wide = Factors(np.ones((2, 768), np.float32), factors.up, 2.0)
    with pytest.raises(BadInput, match=f"does not fit demo: {name}"):
        load_pipeline("demo", [(Adapter({name: wide}), 1.0)])
    elsewhere = Adapter({name.replace("down_blocks.0", "down_blocks.3"): factors})
    with pytest.raises(BadInput, match="not there"):
        load_pipeline("demo", [(elsewhere, 1.0)])


def test_a_missing_model_and_an_unreachable_hub_are_bad_input(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="no such file or folder"):
        load_pipeline(str(tmp_path / "gone.safetensors"))

    def unreachable(*arguments, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(StableDiffusionPipeline, "download", unreachable)
    with pytest.raises(BadInput, match=r"no route.*Offline, give a diffusers folder"):
        load_pipeline("nobody/nothing-of-the-kind")
