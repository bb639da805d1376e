"""Prompt-gated adapters: each prompt of a batch gets its own share of the change, once."""

import numpy as np
import pytest
import torch
from support.adapters import random_adapter

from sdd_lora.errors import BadInput
from sdd_lora.generation.images import draw
from sdd_lora.generation.methods import gated
from sdd_lora.generation.sampling import Job, Sampling
from sdd_lora.sd.pipeline import load_pipeline

GATED = Sampling(3, 4.0, method="sdd-gated", concept="bomb")
PLAIN = Sampling(3, 4.0)


@pytest.fixture(scope="module")
def adapter():
    return random_adapter(strength=0.5)


@pytest.fixture(scope="module")
def adapted(adapter):
    return load_pipeline("demo", [(adapter, 1.0)])


def images(pipeline, jobs, sampling):
    return np.stack([image for _, image in draw(pipeline, jobs, sampling, "test")]).astype(int)


def test_each_prompt_has_its_own_gain_and_no_square_of_it(adapter, adapted, monkeypatch):
    gains = {"none": 0.0, "half": 0.5, "all": 1.0}
    monkeypatch.setattr(
        gated, "similarity", lambda prompts, *_: torch.tensor([gains[p] for p in prompts])
    )
    jobs = [Job(prompt, 3) for prompt in gains]
    together = images(adapted, jobs, GATED)

    plain = load_pipeline("demo", [(adapter, 1.0)])

    def at(weight, job):
        plain.set_adapters(plain.get_active_adapters(), weight)
        return images(plain, [job], PLAIN)[0]

    for image, gain, job in zip(together, gains.values(), jobs, strict=True):
        assert np.abs(image - at(gain, job)).max() <= 1
    assert np.abs(together[1] - at(0.25, jobs[1])).max() > 5  # what the square would give
    assert np.abs(together[1] - at(1.0, jobs[1])).max() > 5


def test_without_guidance_and_with_two_adapters(adapter, monkeypatch):
    monkeypatch.setattr(gated, "similarity", lambda prompts, *_: torch.tensor([0.5] * len(prompts)))
    pipeline = load_pipeline("demo", [(adapter, 1.0), (random_adapter(0.5, seed=1), 0.5)])
    half = load_pipeline("demo", [(adapter, 0.5), (random_adapter(0.5, seed=1), 0.25)])
    jobs = [Job("a cat", 1), Job("a bomb", 2)]
    sampling = Sampling(3, 1.0, method="sdd-gated", concept="bomb")
    ours = images(pipeline, jobs, sampling)
    assert np.abs(ours - images(half, jobs, Sampling(3, 1.0))).max() <= 1


def test_the_gate_is_open_again_afterwards(adapted):
    job = Job("a bus", 5)
    before = images(adapted, [job], PLAIN)
    gated_image = images(adapted, [job], GATED)
    assert np.abs(gated_image - before).max() > 5
    assert np.array_equal(images(adapted, [job], PLAIN), before)


def test_similarity_to_the_nearest_concept(adapted):
    prompts = ["bomb", "a photo of a bomb, noto style", "a cat", "an axe"]

    def near(texts, concepts):
        return gated.similarity(texts, concepts, adapted.tokenizer, adapted.text_encoder)

    one = near(prompts, ["bomb"])
    assert one.shape == (4,)
    assert one[:2].tolist() == pytest.approx([1.0, 1.0], abs=1e-5)  # all of the concept's tokens
    assert (one[2:] < 0.99).all() and (one >= 0).all()
    both = near(prompts, ["bomb", "axe"])
    assert both[3].item() == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(torch.maximum(one, near(prompts, ["axe"])) > 0.99, both > 0.99)
    assert near(["a cat"], ["bomb"])[0].item() == pytest.approx(one[2].item(), abs=1e-5)


def test_half_of_a_concepts_tokens(adapted):
    tokenizer = adapted.tokenizer
    words = [t for t in ("cat", "bomb", "bus", "axe") if len(tokenizer(t).input_ids) == 3][:3]
    first, second, other = words
    near = gated.similarity(
        [f"{first} {other}"], [f"{first} {second}"], tokenizer, adapted.text_encoder
    )
    flat = [
        adapted.text_encoder(
            tokenizer(t, padding="max_length", return_tensors="pt").input_ids
        ).last_hidden_state.flatten()
        for t in (f"{first} {other}", f"{first} {second}")
    ]
    cosine = torch.cosine_similarity(*flat, dim=0).item()
    assert near.item() == pytest.approx(max(cosine, 0.5), abs=1e-4)


def test_no_adapter_is_bad_input():
    with pytest.raises(BadInput, match="no adapter to gate"):
        images(load_pipeline("demo"), [Job("a cat", 1)], GATED)
