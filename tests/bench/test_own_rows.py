"""Rows and measures of the user's own: images drawn elsewhere, a method and a measure by name."""

import shutil

import pytest
from PIL import Image
from support.benches import SMALL, lines_of, parsed, ran

from sdd_lora.bench.bench_file import Bench
from sdd_lora.bench.results import find_row
from sdd_lora.errors import BadInput

OWN = """
import torch

from sdd_lora.generation.methods.sd import sample
from sdd_lora.measures.base import Measure, MeasureInfo


def of_a_cat(pipeline, prompts, generators, sampling):
    return sample(pipeline, ["a cat"] * len(prompts), generators, sampling)


class Bright(Measure):
    info = {"brightness": MeasureInfo(kind="mean", of="all", better="neither")}

    def __init__(self, erased, scale: float = 1.0):
        self.scale, self.source = scale, "own"

    def per_image(self, specs, images):
        return [{"brightness": self.scale * float(image.mean())} for image in images]
"""


def with_images(folder, tmp_path):
    changes = {"images": {"theirs": str(folder)}, "methods": ["sd", "theirs"]}
    return Bench.parse(SMALL, folder=tmp_path, overrides=changes)


def test_images_drawn_elsewhere_are_a_row(small, tmp_path):
    """By prompt and seed where a manifest names them, else by their order."""
    shutil.copytree(small[0] / "images" / "neg", tmp_path / "named")
    (tmp_path / "plain").mkdir()
    for image in sorted((tmp_path / "named").glob("*.png")):
        Image.open(image).save(tmp_path / "plain" / f"{image.stem}.webp", lossless=True)
    for source in ("named", "plain"):
        shutil.copytree(small[0] / "images" / "sd", tmp_path / source / "out" / "images" / "sd")
        out = tmp_path / source / "out"
        bench = with_images(tmp_path / source, tmp_path)
        (out / "bench.yaml").write_text(bench.to_yaml())
        rows = ran(bench, out).rows
        for row in small[1].rows:
            if row.method == "neg":
                assert find_row(rows, "theirs", row.measure, row.group).value == row.value


def test_missing_images_are_counted_before_anything_is_drawn(small, tmp_path):
    shutil.copytree(small[0] / "images" / "neg", tmp_path / "some")
    lines = (tmp_path / "some" / "manifest.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "some" / "manifest.jsonl").write_text("".join(lines[:-2]))
    with pytest.raises(BadInput, match="manifest lacks 2 of 7 images"):
        ran(with_images(tmp_path / "some", tmp_path), tmp_path / "out")
    (tmp_path / "some" / "manifest.jsonl").unlink()
    (tmp_path / "some" / "00003.png").unlink()
    with pytest.raises(BadInput, match=r"expected 7 pictures, .*found 6"):
        ran(with_images(tmp_path / "some", tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_method_and_a_measure_come_from_the_users_file(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    changes = {
        "code": {"cats": "own.py:of_a_cat"},
        "methods": ["sd", "cats"],
        "measures": {"judge": {}, "own.py:Bright": {"scale": 2.0}},
        "seeds": {"first": 5, "erased": 2, "kept": 0},
    }
    results = ran(Bench.parse(SMALL, folder=tmp_path, overrides=changes), tmp_path / "out")
    assert find_row(results.rows, "cats", "brightness", "all").n == 2
    assert results.methods["cats"]["code"] == "own.py:of_a_cat"
    files = [x["file"] for x in lines_of(tmp_path / "out" / "images.jsonl")]
    images = [(tmp_path / "out" / file).read_bytes() for file in files]
    assert len(set(images)) == 4
    with pytest.raises(BadInput, match="scale"):
        changes["measures"] = {"own.py:Bright": {"scale": "x"}}
        ran(Bench.parse(SMALL, folder=tmp_path, overrides=changes), tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measures": ["own.py:Gone"]}, "own.py has no Gone"),
        ({"measures": ["own.py:of_a_cat"]}, "expected a subclass"),
        ({"measures": ["nowhere:Thing"]}, "can't import it"),
        ({"code": {"m": "own.py:Gone"}, "methods": ["m"]}, "own.py has no Gone"),
        ({"code": {"m": "own.py"}, "methods": ["m"]}, "expected module:name"),
    ],
)
def test_code_that_is_not_there_is_named(tmp_path, change, message):
    (tmp_path / "own.py").write_text(OWN)
    with pytest.raises(BadInput, match=message):
        ran(Bench.parse(SMALL, folder=tmp_path, overrides=change), tmp_path / "out")


def test_black_images_are_named_and_counted_in_no_row(small, tmp_path):
    shutil.copytree(small[0], tmp_path / "out")
    image = tmp_path / "out" / "images" / "neg" / "00000.png"
    Image.new("RGB", (64, 64)).save(image)
    (image.parent / "values.jsonl").unlink()
    results = ran(parsed(), tmp_path / "out")
    assert find_row(results.rows, "neg", "concept drawn", "all").n == 2
    assert any("neg: 1 of 7 images are black" in note for note in results.notes)
    again = ran(parsed(), tmp_path / "out")
    assert (again.rows, again.notes) == (results.rows, results.notes)
