"""Images: a function of prompt and seed alone; a folder that can be continued."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.adapters import random_adapter

from sdd_lora.errors import BadInput, SddLoraError
from sdd_lora.generation.images import check_sampling, draw, generate, parameters_text
from sdd_lora.generation.manifest import drawn_in, is_drawn
from sdd_lora.generation.methods import METHODS
from sdd_lora.generation.prompt_files import Prompt
from sdd_lora.generation.sampling import Job, Sampling, jobs_for, jobs_of
from sdd_lora.io.atomic import locked
from sdd_lora.io.jsonl import appended
from sdd_lora.sd.pipeline import load_pipeline

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


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_image_does_not_depend_on_its_batch(method):
    adapters = [(random_adapter(0.3), 1.0)] if method == "sdd-gated" else []
    pipeline = load_pipeline("demo", adapters)

    def images(jobs, batch):
        concept = "" if method == "sd" else "bomb"
        sampling = Sampling(16, 4.0, method=method, concept=concept, batch=batch)
        return np.stack([image for _, image in draw(pipeline, jobs, sampling, "test")])

    jobs = JOBS[:3]
    difference = np.abs(images(jobs, 3).astype(int) - images(jobs[::-1], 1)[::-1])
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-3


def test_guidance_and_size_of_a_jobs_own(pipeline):
    jobs = [
        Job("a cat", 1),
        Job("a cat", 1, guidance=9.0),
        Job("a bus", 2),
        Job("a bus", 2, width=192, height=64),
        Job("a cat", 1, guidance=4.0),
    ]
    found = dict(draw(pipeline, jobs, SAMPLING, "test"))
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert found[3].shape == (64, 192, 3)
    assert np.array_equal(found[0], found[4])
    assert np.abs(found[0].astype(int) - found[1]).max() > 20
    (alone,) = drawn(pipeline, [Job("a bus", 2)], 1)
    assert np.abs(found[2].astype(int) - alone).max() <= 1


@pytest.mark.parametrize("method", ["sd", "sega"])
def test_a_side_alone_leaves_the_other_as_the_models_own(pipeline, method):
    concept = "" if method == "sd" else "bomb"
    sampling = Sampling(2, 4.0, method=method, concept=concept)
    jobs = [Job("a bus", 2, width=128), Job("a bus", 2, height=128)]
    found = dict(draw(pipeline, jobs, sampling, "test"))
    assert [found[k].shape for k in (0, 1)] == [(64, 128, 3), (128, 64, 3)]


def test_a_negative_prompt_that_nothing_reads_is_told(pipeline, tmp_path, caplog):
    jobs = [Job("a bomb", 2, guidance=1.0), Job("a bomb", 2, guidance=1.0, negative_prompt="")]
    generate(pipeline, jobs, Sampling(1, 4.0, negative_prompt="axe"), tmp_path, {})
    assert "1 of 2 images have a guidance of 1 or less, where no negative" in caplog.text


@pytest.mark.parametrize("method", ["neg", "sld-max", "sega"])
def test_without_guidance_nothing_is_guided_away(pipeline, method, tmp_path, caplog):
    sampling = Sampling(12, 4.0, method=method, concept="bomb")
    jobs = [Job("a bomb", 2, guidance=0.5), Job("a bomb", 2)]
    found = dict(draw(pipeline, jobs, sampling, "test"))
    plain = dict(draw(pipeline, jobs, Sampling(12, 4.0), "test"))
    assert np.abs(found[0].astype(int) - plain[0]).max() <= 1
    assert np.abs(found[1].astype(int) - plain[1]).max() > 20
    generate(pipeline, jobs, replace(sampling, steps=1), tmp_path, {})
    assert f"1 of 2 images have a guidance of 1 or less, where {method}" in caplog.text


def test_the_manifest_says_what_an_image_has_of_its_own(pipeline, tmp_path):
    jobs = [Job("a cat", 1, guidance=9.0), Job("a bus", 2), Job("a cat", 3, width=64, height=64)]
    assert generate(pipeline, jobs, SAMPLING, tmp_path, {}) == 3
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert lines == [
        {"file": "00000.png", "prompt": "a cat", "seed": 1, "guidance": 9.0},
        {"file": "00001.png", "prompt": "a bus", "seed": 2},
        {"file": "00002.png", "prompt": "a cat", "seed": 3, "width": 64, "height": 64},
    ]
    assert generate(pipeline, jobs, SAMPLING, tmp_path, {}) == 0
    with pytest.raises(BadInput, match=r"with seed 1, guidance 9\.0, not 'a cat' with seed 1;"):
        generate(pipeline, [Job("a cat", 1)], SAMPLING, tmp_path, {})


def test_an_image_carries_its_parameters_as_a1111_reads_them(pipeline, tmp_path):
    jobs = [Job("a cat, 猫", 1, guidance=9.0, steps=1, negative_prompt="a dog"), Job("a bus", 2)]
    generate(pipeline, jobs, SAMPLING, tmp_path, {})
    first, second = (Image.open(tmp_path / f"0000{i}.png").info["parameters"] for i in (0, 1))
    prompt, negative, settings = first.split("\n")
    assert (prompt, negative) == ("a cat, 猫", "Negative prompt: a dog")
    assert settings.startswith("Steps: 1, Sampler: DDIM, CFG scale: 9.0, Seed: 1, Size: 64x64")
    assert second.split("\n")[1].startswith("Steps: 3, ")


def test_the_parameters_of_neg_name_all_that_it_guides_away_from():
    sampling = Sampling(method="neg", concept="bomb")
    info = parameters_text(Job("a cat", 1, negative_prompt="a dog"), sampling, (64, 64, 3))
    assert b"Negative prompt: bomb, a dog" in b"".join(chunk[1] for chunk in info.chunks)


def test_a_lost_image_is_drawn_again_and_named_once(pipeline, tmp_path):
    generate(pipeline, JOBS[:2], SAMPLING, tmp_path, {})
    whole = (tmp_path / "manifest.jsonl").read_text()
    (tmp_path / "00000.png").unlink()
    assert generate(pipeline, JOBS[:2], SAMPLING, tmp_path, {}) == 1
    assert (tmp_path / "manifest.jsonl").read_text() == whole


def test_an_image_without_bytes_is_drawn_again(pipeline, tmp_path):
    generate(pipeline, JOBS[:2], SAMPLING, tmp_path, {})
    (tmp_path / "00001.png").write_bytes(b"")
    assert not is_drawn(tmp_path, JOBS[:2], SAMPLING, {})
    assert generate(pipeline, JOBS[:2], SAMPLING, tmp_path, {}) == 1
    assert (tmp_path / "00001.png").stat().st_size > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"file": 5},
        {"file": None},
        {"file": ["a"]},
        {"file": ""},
        {"file": "../00000.png"},
        {"seed": "0"},
        {"seed": None},
        {"prompt": ["x"]},
        {"guidance": "7"},
        {"width": 1.5},
        {"image": 1},
    ],
)
def test_a_manifest_of_other_types_is_damaged(pipeline, tmp_path, changes):
    generate(pipeline, JOBS[:1], SAMPLING, tmp_path, {})
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes) + "\n")
    for read in (drawn_in, lambda folder: generate(pipeline, JOBS[:1], SAMPLING, folder, {})):
        with pytest.raises(BadInput, match=r"manifest.jsonl: line 1: damaged; draw into another"):
            read(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_full_disk_is_named():
    full = "/dev/full: not written: No space left on device"
    with pytest.raises(SddLoraError, match=full), appended(Path("/dev/full")) as file:
        file.write("x")


def test_settings_that_cannot_be_read_are_named(pipeline, tmp_path):
    (tmp_path / "settings.json").write_bytes(b"\xff")
    with pytest.raises(BadInput, match=r"settings.json: can't read it .*draw into another folder"):
        generate(pipeline, JOBS[:1], SAMPLING, tmp_path, {})


def test_another_processs_part_is_put_in(pipeline, tmp_path):
    generate(pipeline, JOBS[:2], SAMPLING, tmp_path, {})
    manifest = tmp_path / "manifest.jsonl"
    whole = manifest.read_text()
    lines = whole.splitlines(keepends=True)
    # a kill between putting the part in and removing it; then one before it was put in
    for main in (whole, lines[0]):
        manifest.write_text(main)
        (tmp_path / "manifest.1.jsonl").write_text(lines[1] + lines[0][:7])
        assert generate(pipeline, JOBS[:2], SAMPLING, tmp_path, {}) == 0
        assert manifest.read_text() == whole
        assert not (tmp_path / "manifest.1.jsonl").exists()


def test_a_folder_that_is_being_drawn_into_is_refused(pipeline, tmp_path):
    with locked(tmp_path), pytest.raises(BadInput, match="another process"):
        generate(pipeline, JOBS[:1], SAMPLING, tmp_path, {})


def test_jobs_of_prompts():
    prompts = [Prompt("a"), Prompt("b", 9, 2.0, 64, 72), Prompt("c")]
    assert jobs_of(prompts, 2, 100) == [
        Job("a", 100),
        Job("a", 101),
        Job("b", 9, 2.0, 64, 72),
        Job("b", 10, 2.0, 64, 72),
        Job("c", 104),
        Job("c", 105),
    ]


def test_what_a_method_cannot_work_with_is_refused_before_anything_is_written(pipeline, tmp_path):
    sampling = Sampling(1, 4.0, method="sega", concept="bomb " * 90)
    with pytest.raises(BadInput, match="too long: the model would not read"):
        generate(pipeline, JOBS[:1], sampling, tmp_path / "out", {})
    sampling = Sampling(1, 4.0, method="sdd-gated", concept="bomb")
    with pytest.raises(BadInput, match="no adapter to gate"):
        generate(pipeline, JOBS[:1], sampling, tmp_path / "out", {})
    assert not (tmp_path / "out").exists()
    gated = load_pipeline("demo", [(random_adapter(0.3), 1.0)])
    sampling = Sampling(1, 4.0, method="sdd-gated", concept="bomb, <|endoftext|>")
    with pytest.raises(BadInput, match=r"the model reads nothing in .<.endoftext.>."):
        generate(gated, JOBS[:1], sampling, tmp_path / "out", {})
    assert not (tmp_path / "out").exists()


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
    with pytest.raises(BadInput, match="needs a concept"):
        check_sampling(Sampling(method="neg"))
    with pytest.raises(BadInput, match="not available; expected one of: sd, neg"):
        check_sampling(Sampling(method="magic"))
    with pytest.raises(BadInput, match=r"above 1, found 0\.5"):
        check_sampling(Sampling(method="neg", concept="bomb"), [Job("a", 1, guidance=0.5)])
    jobs = [Job("a", 1, guidance=0.5), Job("a", 1)]  # the one is told of when it is drawn
    check_sampling(Sampling(method="neg", concept="bomb"), jobs)
    with pytest.raises(BadInput, match=r"method sld-max: .*above 1, found 1"):
        check_sampling(Sampling(method="sld-max", concept="bomb", guidance=1.0))
    check_sampling(Sampling(method="neg", concept="bomb", guidance=1), [Job("a", 1, guidance=2)])
    check_sampling(Sampling(method="sdd-gated", concept="bomb", guidance=1))
    with pytest.raises(BadInput, match=r"a multiple of 8, .*found 100"):
        check_sampling(Sampling(height=100))
