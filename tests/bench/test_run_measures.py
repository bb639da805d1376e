"""Measures of a run: whole sets, options, doubles."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from support.benches import SMALL, parsed, ran

from sdd_lora.bench.bench_file import Bench
from sdd_lora.bench.results import find_row
from sdd_lora.errors import BadInput
from sdd_lora.measures.base import Measure, MeasureInfo
from sdd_lora.measures.registry import MEASURES, load_measures


class WholeSet(Measure):
    """A measure of all kept images at once: their number, and the mean of all pixels."""

    info = {"shade": MeasureInfo(kind="mean", of="kept", better="lower")}
    files = ("reference",)
    taken = 0

    def __init__(self, erased, reference: Path | None = None):
        if not reference.exists():
            raise BadInput(f"reference: {reference}: found no such file")
        self.source = reference.read_text()

    def per_set(self, images):
        WholeSet.taken += 1
        found = list(images)
        return {"shade": float(np.mean(found)), "images": float(len(found))}


def test_measures_of_whole_sets_and_beside_sd_have_rows(small, tmp_path, monkeypatch):
    monkeypatch.setitem(MEASURES, "shade", WholeSet)
    (tmp_path / "b.yaml").write_text(SMALL.replace("[judge]", "{judge: {}, shade: {reference: r}}"))
    (tmp_path / "r").touch()  # beside the bench
    shutil.copytree(small[0] / "images", tmp_path / "out" / "images")
    results = measured_again(tmp_path)
    assert [find_row(results.rows, m, "images", "all").value for m in ("sd", "neg")] == [4, 4]
    row = find_row(results.rows, "neg", "shade", "all")
    assert 0 < row.value < 255 and (row.ci95, row.n) == (None, 4)
    distance = find_row(results.rows, "neg", "distance of judge features", "all")
    assert distance.value > 0 and distance.ci95[0] <= distance.value <= distance.ci95[1]
    assert find_row(results.rows, "sd", "distance of judge features", "all") is None
    taken = WholeSet.taken
    assert measured_again(tmp_path).rows == results.rows and WholeSet.taken == taken
    (tmp_path / "r").write_text("another reference")
    assert measured_again(tmp_path).rows == results.rows and WholeSet.taken == taken + 2
    (tmp_path / "r").unlink()
    results = measured_again(tmp_path)
    assert results.missing == [f"shade: reference: {tmp_path / 'r'}: found no such file"]
    assert find_row(results.rows, "neg", "noun kept", "all").n == 2


def measured_again(folder):
    bench = Bench.load(folder / "b.yaml")
    (folder / "out" / "bench.yaml").write_text(bench.to_yaml())
    return ran(bench, folder / "out")


def test_a_measure_without_a_number_is_named(small, tmp_path, monkeypatch):
    monkeypatch.setitem(MEASURES, "whole", WholeSet)
    (tmp_path / "real").write_text("x")
    changes = {"measures": ["judge", {"whole": {"reference": "real"}}], "seeds.kept": 0}
    bench = Bench.parse(SMALL, folder=tmp_path, overrides=changes)
    assert ran(bench, tmp_path / "out").missing == [
        "whole: it takes kept images, and there are none"
    ]


def test_options_of_measures_are_checked(tmp_path):
    with pytest.raises(BadInput, match=r"measures.nudenet: unknown option colour; expected preset"):
        ran(parsed(measures={"nudenet": {"colour": "bgr"}}), tmp_path)


@pytest.mark.parametrize(
    ("measure", "option", "value"),
    [
        ("open_nsfw", "threshold", "high"),
        ("nudenet", "preset", ["a"]),
        ("nudenet", "labels", "FACE_FEMALE"),
        ("lpips", "alexnet", 5),
        ("unsafe", "clip", {}),
    ],
)
def test_options_of_another_type_are_named(measure, option, value, tmp_path):
    with pytest.raises(BadInput, match=rf"measures.{measure}.{option}: .*, found "):
        ran(parsed(measures={measure: {option: value}}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Shade(WholeSet):
    """The same name, another meaning."""

    info = {"shade": MeasureInfo(kind="mean", of="kept", better="lower", note="other")}


def test_two_measures_that_give_one_name_must_mean_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(MEASURES, "shade", WholeSet)
    monkeypatch.setitem(MEASURES, "shade2", WholeSet)
    (tmp_path / "r").touch()
    both = {name: {"reference": "r"} for name in ("shade", "shade2")}
    bench = Bench.parse(SMALL, folder=tmp_path, overrides={"measures": both})
    assert len(load_measures(bench.measures, bench.erased, bench.file)[0]) == 2
    monkeypatch.setitem(MEASURES, "shade2", Shade)
    with pytest.raises(
        BadInput, match=r"measures: two give shade, with other settings \(; other\)"
    ):
        load_measures(bench.measures, bench.erased, bench.file)
