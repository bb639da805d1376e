"""Runs: what is written, gone on with, refused."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from support.benches import SMALL, images_of, lines_of, parsed, ran, same, varied

from sdd_lora.bench.bench_file import Bench, chosen
from sdd_lora.bench.methods import Weights
from sdd_lora.bench.results import Results, find_row
from sdd_lora.errors import BadInput
from sdd_lora.measures import judge


def test_a_bench_fills_its_folder(small):
    folder, results = small
    lines = [json.loads(x) for x in (folder / "images.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 7 and len(images_of(folder)) == 14
    for method in ("sd", "neg"):
        row = find_row(results.rows, method, "concept drawn", "all")
        assert row.n == 3 and 0 <= row.value <= 1
        assert find_row(results.rows, method, "noun kept", "all").n == 2
        assert find_row(results.rows, method, "noun kept beside", "all").n == 2
    assert all("concept drawn" in x["values"] for x in lines if x["kind"] == "erased")
    assert Results.load(folder) == results
    assert (folder / "results.csv").exists() and (folder / "results.md").exists()
    drawn = images_of(folder)
    assert not same(drawn["sd", "weapons", 5], drawn["neg", "weapons", 5])


def test_a_finished_bench_draws_and_measures_nothing_again(small):
    folder, results = small
    times = {p: p.stat().st_mtime_ns for p in folder.rglob("*.png")}
    values = (folder / "images" / "sd" / "values.jsonl").read_text()
    again = ran(parsed(), folder)
    assert again.rows == results.rows
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.png")} == times
    assert (folder / "images" / "sd" / "values.jsonl").read_text() == values


def test_distances_come_once_sd_is_there_to_be_compared_with(tmp_path):
    bench = parsed(**{"seeds": {"first": 5, "erased": 1, "kept": 1}})
    distance = "distance of judge features"
    alone = ran(chosen(bench, ["neg"]), tmp_path)
    assert find_row(alone.rows, "neg", distance, "all") is None
    assert find_row(alone.rows, "neg", "concept drawn", "all").difference is None
    both = ran(bench, tmp_path)
    assert find_row(both.rows, "neg", distance, "all").value > 0
    assert find_row(both.rows, "neg", "concept drawn", "all").difference is not None


def test_a_run_goes_on_with_others_where_sd_was_cut_short(small, tmp_path):
    shutil.copytree(small[0] / "images" / "sd", tmp_path / "images" / "sd")
    shutil.copy(small[0] / "bench.yaml", tmp_path)
    manifest = tmp_path / "images" / "sd" / "manifest.jsonl"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:2]))
    alone = ran(chosen(parsed(), ["neg"]), tmp_path)
    assert find_row(alone.rows, "neg", "distance of judge features", "all") is None


@pytest.mark.parametrize("name", ["manifest.jsonl", "values.jsonl"])
def test_a_line_cut_within_a_character_is_left_out(small, tmp_path, name):
    shutil.copytree(small[0], tmp_path / "out")
    path = tmp_path / "out" / "images" / "neg" / name
    path.write_bytes(path.read_bytes().rstrip(b"}\n") + "é".encode()[:1])
    values = [row.value for row in ran(parsed(), tmp_path / "out").rows]
    assert values == pytest.approx([row.value for row in small[1].rows])


def test_a_damaged_image_is_named_and_drawn_anew_once_deleted(small, tmp_path):
    shutil.copytree(small[0], tmp_path / "out")
    image = tmp_path / "out" / "images" / "sd" / "00000.png"
    (image.parent / "values.jsonl").unlink()
    for damaged in (image.read_bytes()[:100], image.read_bytes().replace(b"\rIHDR", b"\x05IHDR")):
        image.write_bytes(damaged)
        with pytest.raises(BadInput, match=r"00000\.png: can't read this image; delete it and run"):
            ran(parsed(), tmp_path / "out")
    image.unlink()
    values = [row.value for row in ran(parsed(), tmp_path / "out").rows]
    assert values == pytest.approx([row.value for row in small[1].rows], rel=0.01)


def test_what_is_drawn_anew_may_have_one_side_of_its_own_and_must_be_whole(tmp_path):
    (tmp_path / "own.csv").write_text("prompt,width\na bomb,128\n")
    changes = {"prompts.erased": {"weapons": "own.csv"}, "methods": ["sd"]}
    changes |= {"seeds": {"first": 5, "erased": 1, "kept": 0}} | varied("image", 0.5, erased=1)
    bench = Bench.parse(SMALL, folder=tmp_path, overrides=changes)
    results = ran(bench, tmp_path / "out")
    assert [row.n for row in results.variations[0].rows if row.group == "all"] == [1]
    shutil.rmtree(tmp_path / "out" / "images" / "v")
    image = tmp_path / "out" / "images" / "sd" / "00000.png"
    image.write_bytes(image.read_bytes()[:-300])
    with pytest.raises(BadInput, match=r"00000\.png: can't read this image; delete it and run"):
        ran(bench, tmp_path / "out")


def test_sizes_of_prompts_are_no_matter_to_the_judge(tmp_path):
    (tmp_path / "own.csv").write_text("prompt,width\na bomb,64\nan axe,128\n")
    changes = {"prompts.erased": {"weapons": "own.csv"}, "methods": ["sd"]}
    results = ran(Bench.parse(SMALL, folder=tmp_path, overrides=changes), tmp_path / "out")
    assert find_row(results.rows, "sd", "concept drawn", "all").n == 3


def test_a_finished_cell_loads_no_pipeline(small, monkeypatch):
    def load(self, cell):
        raise AssertionError("nothing is to be drawn")

    monkeypatch.setattr(Weights, "pipeline", load)
    folder, results = small
    assert ran(parsed(), folder).rows == results.rows
    (folder / "images" / "sd" / "00001.png").rename(folder / "images" / "moved.png")
    with pytest.raises(AssertionError, match="nothing is to be drawn"):
        ran(parsed(), folder)
    (folder / "images" / "moved.png").rename(folder / "images" / "sd" / "00001.png")


def test_values_are_kept_under_what_made_them(small, tmp_path, monkeypatch):
    shutil.copytree(small[0], tmp_path / "out")
    values = tmp_path / "out" / "images" / "sd" / "values.jsonl"
    before = len(lines_of(values))
    ran(parsed(), tmp_path / "out")
    assert len(lines_of(values)) == before
    monkeypatch.setattr(judge, "sha256_of", lambda path: "another judge")
    ran(parsed(), tmp_path / "out")
    assert len(lines_of(values)) == 2 * before


def test_values_that_are_none_are_refused(small, tmp_path):
    shutil.copytree(small[0], tmp_path / "out")
    values = tmp_path / "out" / "images" / "sd" / "values.jsonl"
    for line, found in {
        "{}": "None as measure",
        '{"measure": "judge", "file": ["a"]}': r"\['a'\] as file",
        '{"measure": "judge", "file": "a", "values": 5}': "5 as values",
    }.items():
        values.write_text(line + "\n")
        with pytest.raises(
            BadInput, match=f"values.jsonl: expected a JSON object a line: found {found}"
        ):
            ran(parsed(), tmp_path / "out")


def test_a_measure_that_gives_no_number_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(judge.JudgeMeasure, "per_image", lambda *_: [{"x": math.nan}])
    bench = parsed(**{"seeds": {"first": 5, "erased": 1, "kept": 0}, "methods": ["sd"]})
    with pytest.raises(BadInput, match=r"measure judge: expected finite numbers, found .*nan"):
        ran(bench, tmp_path)


def test_results_say_what_made_the_numbers(small):
    assert small[1].sources == {"judge": judge.sha256_of(judge.JUDGE_FILE)}


def test_another_benchs_folder_is_refused(small):
    with pytest.raises(BadInput, match="holds images of another bench"):
        ran(parsed(**{"seeds.first": 6}), small[0])


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(BadInput, match="holds something else"):
        ran(parsed(), tmp_path)


def test_a_killed_run_goes_on_with_no_image_twice_and_none_missing(tmp_path, small):
    (tmp_path / "b.yaml").write_text(SMALL)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "sdd_lora", "evaluate", tmp_path / "b.yaml", "-o", out]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    manifest = out / "images" / "sd" / "manifest.jsonl"
    deadline = time.monotonic() + 300
    while not manifest.exists() or not manifest.read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "images.jsonl").exists()
    manifest.write_text(manifest.read_text()[:-5])  # a line cut short
    ran(parsed(), out)
    drawn, expected = images_of(out), images_of(small[0])
    assert drawn.keys() == expected.keys()
    assert all(same(drawn[key], expected[key]) for key in expected)
    names = [json.loads(x)["file"] for x in manifest.read_text().splitlines()]
    assert len(names) == len(set(names)) == 7
    assert len(list((out / "images" / "sd").glob("*.png"))) == 7
