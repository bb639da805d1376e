"""Images: a function of prompt and seed alone; a folder that can be continued."""

import json

import numpy as np
import pytest

from sdd_lora.errors import BadInput
from sdd_lora.generation.images import Job, Sampling, check_sampling, draw, generate, jobs_for
from sdd_lora.generation.pipeline import load_pipeline

SAMPLING = Sampling(steps=3, guidance=4.0, batch=4)
JOBS = jobs_for(["a cat", "a bomb, noto style", "a bus"], 5, first_seed=7)


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("demo")


def drawn(pipeline, jobs, batch):
    sampling = Sampling(steps=3, guidance=4.0, batch=batch)
    return np.stack([image for _, image in draw(pipeline, jobs, sampling, "test")])


def test_an_image_does_not_depend_on_its_batch(pipeline):
    together, alone = drawn(pipeline, JOBS, 5), drawn(pipeline, JOBS, 1)
    reverse = drawn(pipeline, JOBS[::-1], 2)[::-1]
    for other in (alone, reverse):
        difference = np.abs(together.astype(int) - other)
        assert difference.max() <= 1
        assert (difference > 0).mean() <= 1e-3
    assert np.abs(together[0].astype(int) - together[3]).max() > 20  # another seed


def test_prompt_and_seed_change_the_image(pipeline):
    one, other_seed, other_prompt = drawn(
        pipeline, [Job("a cat", 1), Job("a cat", 2), Job("a bus", 1)], 3
    )
    assert not np.array_equal(one, other_seed)
    assert not np.array_equal(one, other_prompt)


def test_a_folder_is_continued_and_a_cut_line_is_drawn_again(pipeline, tmp_path):
    settings = {"model": "demo", "adapters": []}
    assert generate(pipeline, JOBS[:2], SAMPLING, tmp_path, settings) == 2
    manifest = tmp_path / "manifest.jsonl"
    first = (tmp_path / "00000.png").read_bytes()
    manifest.write_text(manifest.read_text()[:-9])  # as a kill would leave it
    assert generate(pipeline, JOBS, SAMPLING, tmp_path, settings) == 4
    entries = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert sorted(e["file"] for e in entries) == [f"{i:05d}.png" for i in range(5)]
    assert (tmp_path / "00000.png").read_bytes() == first
    assert generate(pipeline, JOBS, SAMPLING, tmp_path, settings) == 0


def test_another_runs_folder_is_refused(pipeline, tmp_path):
    generate(pipeline, JOBS[:1], SAMPLING, tmp_path, {"model": "demo"})
    with pytest.raises(BadInput, match="another run"):
        generate(pipeline, JOBS[:1], SAMPLING, tmp_path, {"model": "demo-community"})
    with pytest.raises(BadInput, match=r"00000\.png is 'a cat'"):
        generate(pipeline, [Job("a dog", 7)], SAMPLING, tmp_path, {"model": "demo"})


def test_the_negative_prompt_changes_the_image(pipeline):
    job = Job("a bomb", 3)
    sampling = Sampling(steps=3, guidance=4.0, method="neg", concept="bomb", batch=1)
    ((_, negative),) = draw(pipeline, [job], sampling, "test")
    assert not np.array_equal(negative, drawn(pipeline, [job], 1)[0])


def test_a_method_needs_its_concept_and_must_exist():
    with pytest.raises(BadInput, match="needs --concept"):
        check_sampling(Sampling(method="neg"))
    with pytest.raises(BadInput, match="not available; expected one of: sd, neg"):
        check_sampling(Sampling(method="magic"))
