"""Running out of memory changes no image; shards draw beside each other into one folder."""

import json

import numpy as np
import pytest
import torch

from sdd_lora.errors import BadInput, SddLoraError
from sdd_lora.generation import images as drawing
from sdd_lora.generation.images import draw, generate
from sdd_lora.generation.manifest import as_line, drawn_in, is_drawn, merge_parts
from sdd_lora.generation.methods import METHODS
from sdd_lora.generation.sampling import Sampling, jobs_for
from sdd_lora.io.atomic import locked
from sdd_lora.io.distributed import Shard
from sdd_lora.sd.pipeline import load_pipeline

SAMPLING = Sampling(steps=2, guidance=4.0, batch=4)
JOBS = jobs_for(["a cat", "a bus"], 5, first_seed=7)


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("demo")


def out_of_memory_beyond(most, monkeypatch):
    """A device that holds `most` images at once; the batches that were tried."""
    sample, tried = METHODS["sd"], []

    def limited(pipeline, prompts, generators, sampling):
        tried.append(len(prompts))
        if len(prompts) > most:
            torch.randn(4, generator=generators[0])  # noise that was drawn is drawn again
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return sample(pipeline, prompts, generators, sampling)

    monkeypatch.setitem(drawing.METHODS, "sd", limited)
    return tried


def test_out_of_memory_goes_on_with_half_the_batch(pipeline, monkeypatch, caplog):
    whole = dict(draw(pipeline, JOBS, SAMPLING, "test"))
    tried = out_of_memory_beyond(1, monkeypatch)
    found = dict(draw(pipeline, JOBS, SAMPLING, "test"))
    assert tried == [4, 2, 1, 1, 1, 1, 1]
    assert "going on with 1" in caplog.text
    for index, image in whole.items():
        assert np.abs(image.astype(int) - found[index]).max() <= 1


def test_out_of_memory_with_one_image_gives_advice(pipeline, monkeypatch):
    out_of_memory_beyond(0, monkeypatch)
    with pytest.raises(SddLoraError, match="precision fp16"):
        dict(draw(pipeline, JOBS[:1], SAMPLING, "test"))


def test_shards_draw_what_one_call_does_and_a_later_call_merges(pipeline, tmp_path):
    one, parts = tmp_path / "one", tmp_path / "parts"
    generate(pipeline, JOBS, SAMPLING, one, {})
    assert generate(pipeline, JOBS, SAMPLING, parts, {}, Shard(2, 2)) == 2
    assert sorted(p.name for p in parts.glob("*.png")) == ["00001.png", "00003.png"]
    assert generate(pipeline, JOBS, SAMPLING, parts, {}, Shard(2, 2)) == 0
    assert generate(pipeline, JOBS, SAMPLING, parts, {}, Shard(1, 2)) == 3
    assert drawn_in(parts).keys() == set(JOBS)
    assert not (parts / "manifest.jsonl").exists()
    assert generate(pipeline, JOBS, SAMPLING, parts, {}) == 0
    assert is_drawn(parts, JOBS, SAMPLING, {})
    assert not list(parts.glob("manifest.*.jsonl"))
    text = (one / "manifest.jsonl").read_text()
    assert (parts / "manifest.jsonl").read_text() == text
    for line in map(json.loads, text.splitlines()):
        assert (one / line["file"]).read_bytes()
        assert (parts / line["file"]).read_bytes()


def test_a_killed_shards_cut_line_is_drawn_again(pipeline, tmp_path):
    generate(pipeline, JOBS, SAMPLING, tmp_path, {}, Shard(1, 2))
    (part,) = tmp_path.glob("manifest.*.jsonl")
    part.write_text(part.read_text()[:-9])
    assert generate(pipeline, JOBS, SAMPLING, tmp_path, {}, Shard(1, 2)) == 1
    assert len(drawn_in(tmp_path)) == 3


def test_shards_share_a_folder_but_not_with_a_whole_call(pipeline, tmp_path):
    with locked(tmp_path, shared=True):
        assert generate(pipeline, JOBS, SAMPLING, tmp_path, {}, Shard(1, 5)) == 1
        with pytest.raises(BadInput, match="another process"):
            generate(pipeline, JOBS, SAMPLING, tmp_path, {})
    with locked(tmp_path), pytest.raises(BadInput, match="another process"):
        generate(pipeline, JOBS, SAMPLING, tmp_path, {}, Shard(2, 5))


def test_a_manifest_of_more_than_99999_images_keeps_the_jobs_order(tmp_path):
    names = ["99999.png", "100000.png"]
    entries = [{"file": name, "prompt": "a cat", "seed": 1} for name in names]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "manifest.jsonl").write_text("".join(map(as_line, reversed(entries))))
    merge_parts(tmp_path)
    assert [
        json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()
    ] == entries


def test_a_folder_of_one_precision_is_not_completed_in_another(pipeline, tmp_path):
    generate(pipeline, JOBS[:1], SAMPLING, tmp_path, {})
    assert "precision" not in json.loads((tmp_path / "settings.json").read_text())
    half = load_pipeline("demo", dtype=torch.bfloat16)
    with pytest.raises(BadInput, match=r"drawn in fp32.*be drawn in bf16.*`precision='fp32'`"):
        generate(half, JOBS[:2], SAMPLING, tmp_path, {})
    generate(half, JOBS[:1], SAMPLING, tmp_path / "half", {})
    assert is_drawn(tmp_path / "half", JOBS[:1], SAMPLING, {})
    with pytest.raises(BadInput, match="`precision='bf16'`"):
        generate(pipeline, JOBS[:2], SAMPLING, tmp_path / "half", {})


def test_black_images_are_counted(pipeline, monkeypatch, caplog):
    black = np.zeros((2, 64, 64, 3), np.uint8), 0
    monkeypatch.setattr(drawing, "_draw_batch", lambda *_: black)
    list(draw(pipeline, JOBS[:2], SAMPLING, "test"))
    assert "2 of 2 images are all black, in fp32" in caplog.text
