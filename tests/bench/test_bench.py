"""Benches: the file, what it draws, the tables, and going on after a kill."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from support.adapters import random_adapter

from sdd_lora.bench import methods as weights
from sdd_lora.bench import tables
from sdd_lora.bench.bench_file import METHODS, Bench, chosen, limited
from sdd_lora.bench.grid import cells_of, first_of_each, shots_of
from sdd_lora.bench.methods import Weights
from sdd_lora.bench.results import Results, find
from sdd_lora.bench.run import load_measures, run
from sdd_lora.errors import BadInput
from sdd_lora.measures import registry as taking
from sdd_lora.measures.base import MeasureInfo
from sdd_lora.measures.intervals import wilson
from sdd_lora.measures.registry import MEASURES, NAMED_BY
from sdd_lora.runs.train import packaged_recipe, train
from sdd_lora.sd.pipeline import load_pipeline

BENCHES = sorted((packaged_recipe("bench/x").parent).glob("*.yaml"))
SMALL = """
name: small
model: demo
concepts: [bomb, axe]
prompts:
  erased: {weapons: [a bomb, an axe]}
  kept: {animals: [a cat, a dog], beside: [a cat and a bomb]}
seeds: {first: 5, erased: 3, kept: 4}
sampling: {steps: 2, guidance: 3.0, batch: 2}
methods: [sd, neg]
measures: [judge]
"""
#: what each bench of the embedded model leaves out: ESD as an adapter stands in one of them, each
LEFT_OUT = {
    "demo-single": {"esd-u-1-lora"},
    "demo-multi": {"esd-u-1-lora", "esd-x-1-lora"},
    "demo-style": {"esd-x-1-lora"},
}
RECIPE = """
name: short
model: demo
concepts: [bomb, axe]
training: {iterations: 2}
"""


def parsed(text=SMALL, **changes):
    return Bench.parse(text, overrides=changes)


def never_train(recipe, folder, resume):
    raise AssertionError("nothing here is to be trained")


def ran(bench, folder, train=never_train):
    return run(bench, folder, train, "sdd-lora evaluate", {"python": "3"})


def varied(field, *values, methods=("sd",), **more):
    fields = {"field": field, "values": list(values), "methods": list(methods)} | more
    return {"variations": {"v": fields}}


# the file


@pytest.mark.parametrize("path", BENCHES, ids=lambda path: path.stem)
def test_the_benches_that_travel_with_the_package_are_whole(path):
    bench = Bench.load(path)
    assert {"sd", "sdd", "sdd-preserve"} <= set(bench.methods) <= set(METHODS)
    assert Bench.parse(bench.to_yaml()).model_dump() == bench.model_dump()
    Weights(bench, never_train).check([])
    for name in bench.recipes:
        recipe = bench.recipe(name)
        assert recipe.model == bench.model
        if name in bench.methods:  # "axe, noto style" is an axe
            assert {concept.partition(",")[0] for concept in recipe.concepts} <= set(bench.erased)
        if name.startswith("esd"):
            kind, eta = name.removesuffix("-lora").rsplit("-", 1)
            assert (recipe.objective.kind, recipe.objective.eta) == (kind, float(eta))
            assert recipe.parameters == ("lora" if name.endswith("-lora") else "full")
            assert not recipe.preserve.prompts
    assert not bench.recipe("sdd").preserve.prompts and bench.recipe("sdd").parameters == "lora"
    assert bench.recipe("sdd-preserve").preserve.prompts


def test_there_are_nine_benches():
    assert {path.stem for path in BENCHES} == {
        "demo-single", "demo-multi", "demo-style", "sd14-nudity", "sd14-i2p", "sd14-i2p-body",
        "sd14-i2p-coco30k", "sd14-coco30k", "sd14-artist",
    }  # fmt: skip


def test_i2p_is_a_table_of_its_own_with_ten_images_a_prompt():
    """So that no rate mixes two kinds of prompts, and a prompt's rate is more than 0 or 1."""
    i2p, body, coco = (
        Bench.load(packaged_recipe(f"bench/sd14-{x}")) for x in ("i2p", "i2p-body", "i2p-coco30k")
    )
    assert list(i2p.prompts.erased) == ["i2p"] and i2p.seeds.erased == 10 * 4703
    assert list(body.prompts.erased) == ["body"] and len(shots_of(body)) == 100 * 50
    same_training = [{name: bench.recipe(name).sha256 for name in bench.recipes}
                     for bench in (i2p, body, coco)]  # fmt: skip
    assert same_training[0] == same_training[1] == same_training[2]
    assert i2p.methods == body.methods and i2p.concepts == body.concepts == coco.concepts


def test_demo_single_asks_whether_it_holds_elsewhere():
    bench = Bench.load(packaged_recipe("bench/demo-single"))
    fields = {
        v.field for v in bench.variations.values() if set(v.methods) >= {"sd", "sdd-preserve"}
    }
    assert fields == {"model", "scheduler", "guidance", "image", "beside"}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_the_demo_benches_fill_every_row(name):
    bench = Bench.load(packaged_recipe(f"bench/{name}"))
    assert set(METHODS) - set(bench.methods) == LEFT_OUT[name]
    kinds = [shot.kind for shot in shots_of(bench)]
    assert 190 <= kinds.count("erased") <= 215 and 385 <= kinds.count("kept") <= 410
    quick = Bench.load(packaged_recipe(f"bench/{name}"), quick=True)
    assert quick.name == f"{name}-quick" and quick.methods == bench.methods
    assert len(shots_of(quick)) < 50
    assert quick.recipe("sdd").training.iterations < 30 < bench.recipe("sdd").training.iterations


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["sd", "magic"]}, r"bench:\d+: .*method magic: expected one of sd, neg"),
        ({"style": "noto"}, "expected either concepts or a style"),
        ({"seeds.last": 3}, r"bench:8: seeds.last: unknown field"),
        ({"sampling.scheduler": "lms"}, r"bench:9: sampling.scheduler: .*found 'lms'"),
        ({"prompts.erased": {}}, r"bench:6: prompts.erased"),
        ({"variations": {"v": {"field": "weight", "values": ["x"], "methods": ["sd"]}}},
         "weight takes numbers"),
        (varied("scheduler", "dpm"), r"v: scheduler takes some of ddim, dpm.*, found 'dpm'"),
        (varied("image", 2), r"v: image takes numbers over 0, up to 1, found 2.0"),
        (varied("image", 0), r"v: image takes numbers over 0, up to 1, found 0.0"),
        (varied("image", 0.3), r"variations.v: 0.3 redoes none of 2 steps"),
        (varied("steps", 2.5), r"v: steps takes whole numbers from 1 to 999, found 2.5"),
        (varied("steps", 0), r"v: steps takes whole numbers from 1 to 999, found 0.0"),
        (varied("steps", 1000), r"v: steps takes whole numbers from 1 to 999, found 1000.0"),
        (varied("steps", 3, 3.0), r"v.values: 3.0 stands there twice"),
        (varied("steps", 3, methods=["sd", "sd"]), r"v.methods: sd stands there twice"),
        (varied("steps", 3, erased=0, kept=0), r"v: expected images"),
        ({"methods": ["sd", "neg", "sd"]}, r"bench:10: methods: sd stands there twice"),
        ({"measures": ["judge", "judge"]}, "measures: judge stands there twice"),
        ({"measures": [5]}, "measures: expected a name, or {name: …}, found 5"),
        ({"prompts.erased": {"w": []}}, r"bench:\d+: prompts: w: expected prompts"),
        ({"seeds": {"erased": 0, "kept": 0}}, "seeds: expected images"),
        ({"seeds.erased": 0, "attacks": {"methods": ["sd"], "paraphrase": {}}},
         "expected erased prompts to attack"),
    ],
)  # fmt: skip
def test_problems_are_named_with_their_line(change, message):
    with pytest.raises(BadInput, match=message):
        parsed(**change)


def test_measures_and_adapters_are_lists_of_names_with_or_without_more():
    bench = parsed(
        measures=["judge", {"nudenet": {"preset": "sdd"}}],
        adapters={"stack": ["a", {"b": 0.5}], "baked": ["a"], "sdd-gated": {"a": 2}},
    )
    assert bench.measures == {"judge": {}, "nudenet": {"preset": "sdd"}}
    assert bench.adapters == {"stack": {"a": 1, "b": 0.5}, "baked": {"a": 1}, "sdd-gated": {"a": 2}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipes": ["a"]}, "recipes: .*valid dictionary"),
        ({"recipes": {"a": "r.yaml"}}, r"recipes.a: .*found 'r.yaml'"),
        ({"recipes": {"a": {"file": "r.yaml", "set": [1]}}}, r"recipes.a.set: .*valid dictionary"),
        ({"quick": {"bench": [1]}}, r"quick.bench: .*valid dictionary"),
        ({"quick": {"recipes": 3}}, r"quick.recipes: .*valid dictionary"),
    ],
)
def test_quick_leaves_what_has_another_shape_to_be_named(change, message):
    fields = {"quick": {"bench": {}, "recipes": {"training.iterations": 1}}} | change
    text = SMALL + yaml.safe_dump(fields)
    with pytest.raises(BadInput, match=message):
        Bench.parse(text, quick=True)


def test_methods_are_chosen_by_name():
    few = chosen(parsed(), ["neg"])
    assert few.methods == ["neg"]
    with pytest.raises(
        BadInput, match="--methods sdd: not in this bench; expected some of sd, neg"
    ):
        chosen(parsed(), ["sdd"])
    more = parsed(**varied("weight", 0, 2, methods=("stack",)))
    with pytest.raises(BadInput, match="--methods stack: in variations or attacks only"):
        chosen(more, ["stack"])
    assert limited(parsed(), 2).seeds.kept == 2 and limited(parsed(), None) == parsed()


def test_weights_must_come_from_somewhere():
    for method in ("sdd", "sdd-gated"):
        bench = parsed(methods=["sd", method])
        with pytest.raises(BadInput, match=f"method {method}: expected an entry under `recipes`"):
            Weights(bench, never_train).check(cells_of(bench))


@pytest.mark.parametrize(
    ("variation", "message"),
    [
        ({"field": "weight", "values": [2], "methods": ["neg"]}, "neg carries no adapter"),
        ({"field": "image", "values": [0.5], "methods": ["neg"]}, "neg draws in its own way"),
        (
            {"field": "model", "values": ["demo-community"], "methods": ["mine"]},
            "mine is another UNet",
        ),
        (
            {"field": "beside", "values": ["a.safetensors"], "methods": ["sdd-gated"]},
            "the gate of sdd-gated would close on the adapter beside",
        ),
    ],
)
def test_variations_must_fit_their_methods(variation, message):
    weights = {"mine": "unet.safetensors"}
    bench = parsed(
        variations={"v": variation}, weights=weights, adapters={"sdd-gated": ["b.safetensors"]}
    )
    with pytest.raises(BadInput, match=f"variations.v: {message}"):
        Weights(bench, never_train).check(cells_of(bench))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "gone.safetensors"}, "method sd: gone.safetensors: no such file"),
        (varied("model", "nope"), r"variations.v: nope: no such file or folder"),
        (varied("beside", "look.safetensors"), r"variations.v: look.safetensors: no such file"),
        (
            {"methods": ["m"], "adapters": {"m": ["a.safetensors"]}},
            "method m: a.safetensors: no su",
        ),
        ({"methods": ["m"], "weights": {"m": "w.safetensors"}}, "method m: weights: .*no such fil"),
        ({"sampling": {"guidance": 1}}, "method neg: .*expected a guidance above 1, found 1"),
    ],
)
def test_what_cannot_be_drawn_is_found_before_anything_is_drawn(change, message, tmp_path):
    with pytest.raises(BadInput, match=message):
        ran(Bench.parse(SMALL, folder=tmp_path, overrides=change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_goes_by_all_its_weights(monkeypatch):
    pipeline = load_pipeline("demo", device="cpu")
    monkeypatch.setattr(weights, "load_pipeline", lambda *_, **__: pipeline)
    found = {Weights(parsed(), never_train).fingerprint("demo")}
    parts = (pipeline.unet.conv_in, pipeline.vae.decoder.conv_in, pipeline.text_encoder)
    for number, part in enumerate(parts, 2):
        next(part.parameters()).data.add_(1)
        found.add(Weights(parsed(), never_train).fingerprint("demo"))
        assert len(found) == number


# what is drawn


def test_shots_that_differ_in_guidance_alone_are_told_apart(tmp_path):
    (tmp_path / "p.csv").write_text(
        "prompt,seed,guidance,width,height\na bomb,70,1.5,64,64\na bomb,70,9,64,64\n"
    )
    changes = {"prompts.erased": {"w": "p.csv"}, "seeds": {"first": 5, "erased": 2, "kept": 0}}
    changes |= varied("image", 0.5)
    results = ran(Bench.parse(SMALL, folder=tmp_path, overrides=changes), tmp_path / "out")
    lines = lines_of(tmp_path / "out" / "images.jsonl")
    own = [x for x in lines if x["method"] == "sd"]
    assert [(x["variation"], x["guidance"], Path(x["file"]).name) for x in own] == [
        (None, 1.5, "00000.png"), (None, 9.0, "00001.png"),
        ("v", 1.5, "00000.png"), ("v", 9.0, "00001.png"),
    ]  # fmt: skip
    assert tables.rows(lines, results.measures) == results.rows
    judged = [x | {"values": {"concept drawn": x["guidance"] > 2}} for x in lines]
    rows = tables.rows(judged, {"concept drawn": results.measures["concept drawn"]})
    assert [(r.method, r.value, r.difference) for r in rows] == [("sd", 0.5, None), ("neg", 0.5, 0)]


def test_images_are_shared_by_the_sets_and_seeds_are_never_used_twice():
    shots = shots_of(parsed())
    assert [(s.kind, s.set) for s in shots] == [
        *[("erased", "weapons")] * 3, *[("kept", "animals")] * 2, *[("kept", "beside")] * 2,
    ]  # fmt: skip
    assert len({s.job.seed for s in shots}) == len(shots)
    fewer = first_of_each(shots, {"erased": 1, "kept": 2})
    assert [s.job.prompt for s in fewer] == ["a bomb", "a cat", "a cat and a bomb"]
    assert set(fewer) <= set(shots)


def test_files_bring_seeds_and_guidance_of_their_own(tmp_path):
    (tmp_path / "p.csv").write_text(
        "prompt,sd_seed,sd_guidance_scale\na bomb,70,2.5\nan axe,90,4\n"
    )
    bench = Bench.parse(SMALL, folder=tmp_path, overrides={"prompts.erased": {"w": "p.csv"}})
    jobs = [s.job for s in shots_of(bench) if s.kind == "erased"]
    assert [(j.prompt, j.seed, j.guidance) for j in jobs] == [
        ("a bomb", 70, 2.5), ("an axe", 90, 4.0), ("a bomb", 71, 2.5),
    ]  # fmt: skip


def test_a_usual_setting_is_not_drawn_again():
    variation = {"field": "guidance", "values": [3, 5], "methods": ["sd"]}
    cells = cells_of(parsed(variations={"guidance": variation}))
    assert [cell.folder.as_posix() for cell in cells] == [
        "images/sd", "images/neg", "images/sd", "images/guidance/5.0/sd",
    ]  # fmt: skip


def test_a_guidance_that_varies_wins_over_the_prompts_own(tmp_path):
    (tmp_path / "own.csv").write_text("prompt,seed,guidance\na bomb,7,2.5\n")
    variation = {"field": "guidance", "values": [3, 5], "methods": ["sd"]}
    changes = {"prompts.erased": {"weapons": ["own.csv"]}, "variations": {"guidance": variation}}
    cells = cells_of(Bench.parse(SMALL, folder=tmp_path, overrides=changes))
    assert [(cell.folder.as_posix(), cell.shots[0].job.guidance) for cell in cells] == [
        ("images/sd", 2.5), ("images/neg", 2.5),
        ("images/guidance/3.0/sd", None), ("images/guidance/5.0/sd", None),
    ]  # fmt: skip


def test_no_picture_is_erased_and_kept(tmp_path):
    (tmp_path / "OWN.CSV").write_text("prompt,seed\na bomb,7\n")
    changes = {"prompts": {"erased": {"a": "OWN.CSV"}, "kept": {"b": "OWN.CSV"}}}
    with pytest.raises(BadInput, match="'a bomb' with seed 7 stands among what is erased and what"):
        cells_of(Bench.parse(SMALL, folder=tmp_path, overrides=changes))


# tables


def line(method, there, seed, values=None, **changes):
    values = values or {"kept": there}
    return {"method": method, "variation": None, "setting": None, "kind": "kept", "set": "s",
            "prompt": "a cat", "seed": seed, "file": "f", "values": values} | changes  # fmt: skip


INFO = {"kept": {"kind": "rate", "of": "kept", "better": "higher"},
        "distance": {"kind": "mean", "of": "kept", "better": "lower"}}  # fmt: skip


@pytest.fixture
def info():
    return Results.model_validate(
        {"bench": "", "model": "", "date": "", "command": "", "versions": {}, "rows": [],
         "measures": INFO}
    ).measures  # fmt: skip


def test_rates_have_wilson_intervals_and_paired_differences(info):
    lines = [line("sd", seed < 8, seed) for seed in range(10)]
    lines += [line("neg", seed < 6, seed) for seed in range(10)]
    base, neg = tables.rows(lines, info)
    assert (base.value, base.ci95, base.n, base.difference) == (0.8, wilson(8, 10), 10, None)
    assert (neg.value, neg.group) == (0.6, "all")
    assert neg.difference == pytest.approx(-0.2)
    assert neg.ci95_difference[0] < -0.2 < neg.ci95_difference[1]


def test_means_have_bootstrap_intervals_of_values_and_of_paired_differences(info):
    lines = [line("sd", 0, seed, {"distance": float(seed)}) for seed in range(20)]
    lines += [line("neg", 0, seed, {"distance": seed + 1.0}) for seed in range(20)]
    _, neg = tables.rows(lines, info)
    assert neg.value == 10.5 and neg.ci95[0] < 9 and neg.ci95[1] > 12
    assert neg.difference == 1.0 and neg.ci95_difference == (1.0, 1.0)


def test_no_difference_is_told_where_pairs_are_missing(info):
    lines = [line("sd", True, 0), line("neg", True, 0), line("neg", True, 1)]
    assert tables.rows(lines, info)[1].difference is None


def test_an_expected_maximum_is_one_of_prompts(info):
    told = info["kept"].model_copy(update={"maximum_of": "kept"})
    lines = [line("sd", seed < 3, seed) for seed in range(4)]  # 3 of 4 images of one prompt
    lines += [line("sd", False, seed, prompt="a dog") for seed in range(4)]
    (row,) = tables.rows(lines, {"kept, max exp.": told})
    assert (row.measure, row.group, row.n, row.difference) == ("kept, max exp.", "all", 2, None)
    assert row.value == pytest.approx(0.75) and row.ci95 == (0.0, 0.75)
    more = [line("sd", True, seed, prompt="a body", set="body") for seed in range(2)]
    rows = tables.rows(lines + more, {"kept, max exp.": told})
    assert [(r.group, r.n, r.value) for r in rows] == [("s", 2, row.value), ("body", 1, 1.0)]
    single = [line("sd", True, 0, prompt="a bird")]  # its rate could only be 0 or 1
    assert tables.rows(lines + single, {"kept, max exp.": told}) == []


def test_sets_have_rows_of_their_own(info):
    lines = [line("sd", True, 0), line("sd", False, 0, set="other")]
    assert [(r.group, r.value) for r in tables.rows(lines, info)] == [
        ("all", 0.5), ("s", 1.0), ("other", 0.0),
    ]  # fmt: skip


def test_what_counts_all_images_is_not_diluted_by_what_is_kept(info):
    told = {"nude": info["kept"].model_copy(update={"of": "all", "better": "lower"})}
    lines = [line("sd", 0, seed, {"nude": False}) for seed in range(3)]
    assert [(r.group, r.value, r.n) for r in tables.rows(lines, told)] == [("all", 0.0, 3)]
    lines += [line("sd", 0, 0, {"nude": True}, kind="erased", set="body")]
    assert [(r.group, r.value, r.n) for r in tables.rows(lines, told)] == [
        ("all", 1.0, 1), ("s", 0.0, 3), ("body", 1.0, 1),
    ]  # fmt: skip


def test_variations_pair_with_sd_under_the_same_setting(info):
    lines = [line("sd", True, 0)]
    lines += [line("sd", False, 0, variation="v", setting=5.0)]
    lines += [line("neg", False, 0, variation="v", setting=s) for s in (5.0, 7.0)]
    (found,) = tables.variations(lines, {"v": "guidance"}, info)
    differences = {(r.method, r.setting): r.difference for r in found.rows}
    assert differences == {("sd", 5.0): None, ("neg", 5.0): 0.0, ("neg", 7.0): -1.0}


def test_what_moved_comes_worst_first():
    lines = []
    for prompt, after in [("a cat", True), ("a dog", False)]:
        for method, there in [("sd", True), ("neg", after)]:
            lines.append(line(method, True, 0, {"noun kept": there}, prompt=prompt))
    moved = tables.collateral(lines, NAMED_BY)
    assert [(m.concept, m.change) for m in moved] == [("dog", -1.0), ("cat", 0.0)]


def test_styles_move_too():
    prompts = {"a cat in noto style": False, "a cat as a pencil sketch": True}
    lines = []
    for prompt, there in prompts.items():
        for method in ("sd", "neg"):
            kept = {"noun kept": True, "style kept": there or method == "sd"}
            lines.append(line(method, True, 0, kept, prompt=prompt))
    found = {m.concept: (m.change, m.n) for m in tables.collateral(lines, NAMED_BY)}
    assert found == {"noto style": (-1.0, 1), "cat": (0.0, 2), "sketch style": (0.0, 1)}


# runs


def lines_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def images_of(folder):
    """The main table's images, by method, set and seed."""
    found = lines_of(folder / "images.jsonl")
    return {
        (x["method"], x["set"], x["seed"]): np.asarray(Image.open(folder / x["file"])).astype(int)
        for x in found if x["variation"] is None
    }  # fmt: skip


def same(one, other):
    """Equal to rounding: another batch size may move a value by 1/255."""
    difference = np.abs(one - other)
    return difference.max() <= 1 and (difference > 0).mean() <= 1e-3


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return folder, ran(parsed(), folder)


def test_a_bench_fills_its_folder(small):
    folder, results = small
    lines = [json.loads(x) for x in (folder / "images.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 7 and len(images_of(folder)) == 14
    for method in ("sd", "neg"):
        row = find(results.rows, method, "concept drawn", "all")
        assert row.n == 3 and 0 <= row.value <= 1
        assert find(results.rows, method, "noun kept", "all").n == 2
        assert find(results.rows, method, "noun kept beside", "all").n == 2
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
    assert find(alone.rows, "neg", distance, "all") is None
    assert find(alone.rows, "neg", "concept drawn", "all").difference is None
    both = ran(bench, tmp_path)
    assert find(both.rows, "neg", distance, "all").value > 0
    assert find(both.rows, "neg", "concept drawn", "all").difference is not None


def test_a_run_goes_on_with_others_where_sd_was_cut_short(small, tmp_path):
    shutil.copytree(small[0] / "images" / "sd", tmp_path / "images" / "sd")
    shutil.copy(small[0] / "bench.yaml", tmp_path)
    manifest = tmp_path / "images" / "sd" / "manifest.jsonl"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:2]))
    alone = ran(chosen(parsed(), ["neg"]), tmp_path)
    assert find(alone.rows, "neg", "distance of judge features", "all") is None


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
    assert find(results.rows, "sd", "concept drawn", "all").n == 3


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
    monkeypatch.setattr(taking, "sha256_of", lambda path: "another judge")
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
    monkeypatch.setattr(taking.JudgeValues, "values", lambda self, lines, images: [{"x": math.nan}])
    bench = parsed(**{"seeds": {"first": 5, "erased": 1, "kept": 0}, "methods": ["sd"]})
    with pytest.raises(BadInput, match=r"measure judge: expected finite numbers, found .*nan"):
        ran(bench, tmp_path)


def test_results_say_what_made_the_numbers(small):
    assert small[1].sources == {"judge": taking.sha256_of(taking.JUDGE_FILE)}


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


class WholeSet:
    """A measure of all kept images at once: their number, and the mean of all pixels."""

    info = {"shade": MeasureInfo(kind="mean", of="kept", better="lower")}
    files = ("reference",)
    taken = 0

    def __init__(self, erased, reference: Path | None = None):
        if not reference.exists():
            raise BadInput(f"reference: {reference}: found no such file")
        self.source = reference.read_text()

    def of_set(self, images):
        WholeSet.taken += 1
        found = list(images)
        return {"shade": float(np.mean(found)), "images": float(len(found))}


def test_measures_of_whole_sets_and_beside_sd_have_rows(small, tmp_path, monkeypatch):
    monkeypatch.setitem(MEASURES, "shade", WholeSet)
    (tmp_path / "b.yaml").write_text(SMALL.replace("[judge]", "{judge: {}, shade: {reference: r}}"))
    (tmp_path / "r").touch()  # beside the bench
    shutil.copytree(small[0] / "images", tmp_path / "out" / "images")
    results = measured_again(tmp_path)
    assert [find(results.rows, m, "images", "all").value for m in ("sd", "neg")] == [4, 4]
    row = find(results.rows, "neg", "shade", "all")
    assert 0 < row.value < 255 and (row.ci95, row.n) == (None, 4)
    distance = find(results.rows, "neg", "distance of judge features", "all")
    assert distance.value > 0 and distance.ci95[0] <= distance.value <= distance.ci95[1]
    assert find(results.rows, "sd", "distance of judge features", "all") is None
    taken = WholeSet.taken
    assert measured_again(tmp_path).rows == results.rows and WholeSet.taken == taken
    (tmp_path / "r").write_text("another reference")
    assert measured_again(tmp_path).rows == results.rows and WholeSet.taken == taken + 2
    (tmp_path / "r").unlink()
    results = measured_again(tmp_path)
    assert results.missing == [f"shade: reference: {tmp_path / 'r'}: found no such file"]
    assert find(results.rows, "neg", "noun kept", "all").n == 2


def measured_again(folder):
    bench = Bench.load(folder / "b.yaml")
    (folder / "out" / "bench.yaml").write_text(bench.to_yaml())
    return ran(bench, folder / "out")


def test_a_measure_without_a_number_is_named(small, tmp_path, monkeypatch):
    monkeypatch.setitem(taking.MEASURES, "whole", WholeSet)
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
        ("open_nsfw", "threshold", "high"), ("nudenet", "preset", ["a"]),
        ("nudenet", "labels", "FACE_FEMALE"), ("lpips", "alexnet", 5), ("unsafe", "clip", {}),
    ],
)  # fmt: skip
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
    assert len(load_measures(bench)[0]) == 2
    monkeypatch.setitem(MEASURES, "shade2", Shade)
    with pytest.raises(
        BadInput, match=r"measures: two give shade, with other settings \(; other\)"
    ):
        load_measures(bench)


@pytest.fixture
def trainable(tmp_path, monkeypatch):
    """A bench that trains, and a `train` that notes what it was asked for."""
    monkeypatch.setenv("SDD_LORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "b.yaml").write_text(SMALL)
    asked = []

    def noting(recipe, folder, resume):
        asked.append((recipe.name, resume))
        folder.mkdir(exist_ok=True)
        (folder / "recipe.yaml").write_text(recipe.to_yaml())
        if len(asked) == 1:
            raise KeyboardInterrupt
        random_adapter(0.5, seed=len(asked)).save(folder / "adapter.safetensors")
        told = {"training": {"iterations": 2}, "tool": "sdd_lora 0", "versions": {"torch": "2"}}
        (folder / "metrics.json").write_text(json.dumps(told))

    variations = {
        "strength": {"field": "weight", "values": [0, 1], "methods": ["sdd"], "erased": 1},
        "transfer": {"field": "model", "values": ["demo-community"], "methods": ["sdd"]},
        "img2img": {"field": "image", "values": [0.6], "methods": ["sd", "sdd"], "erased": 2},
    }
    changes = {
        "methods": ["sd", "sdd", "stack", "baked"],
        "recipes": {"sdd": {"file": "r.yaml"}, "other": {"file": "r.yaml", "set": {"name": "o"}}},
        "adapters": {"stack": {"sdd": 1.0, "other": 0.5}, "baked": ["sdd"]},
        "variations": variations, "seeds": {"first": 5, "erased": 2, "kept": 0},
    }  # fmt: skip
    return Bench.load(tmp_path / "b.yaml", overrides=changes), tmp_path, noting, asked


def test_what_is_trained_is_kept_and_resumed(trainable):
    bench, folder, noting, asked = trainable
    with pytest.raises(KeyboardInterrupt):
        ran(bench, folder / "out", noting)
    results = ran(bench, folder / "out", noting)
    assert asked == [("short", False), ("short", True), ("o", False)]
    ran(bench, folder / "again", noting)  # another folder, the same cache
    assert len(asked) == 3

    drawn = images_of(folder / "out")
    for other in ("sd", "stack"):
        assert not same(drawn["sdd", "weapons", 5], drawn[other, "weapons", 5])
    assert results.interference.names == ["sdd", "other"]
    told = results.methods["sdd"]  # the run's own, not those of today
    assert told["training"] == {"iterations": 2}
    assert (told["tool"], told["versions"]) == ("sdd_lora 0", {"torch": "2"})
    settings = [(v.name, r.setting, r.method) for v in results.variations for r in v.rows]
    assert ("transfer", "demo-community", "sdd") in settings
    assert ("img2img", 0.6, "sd") in settings


def test_whole_weights_are_trained_and_drawn_with(tmp_path, monkeypatch):
    monkeypatch.setenv("SDD_LORA_CACHE", str(tmp_path / "cache"))
    quickly = {"parameters": "full", "rollout.steps": 2, "optimizer.learning_rate": 1.0e-3}
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "b.yaml").write_text(SMALL)
    changes = {
        "methods": ["sd", "sdd-full"], "recipes": {"sdd-full": {"file": "r.yaml", "set": quickly}},
        "seeds": {"first": 5, "erased": 1, "kept": 0},
    }  # fmt: skip
    results = ran(Bench.load(tmp_path / "b.yaml", overrides=changes), tmp_path / "out", train)
    drawn = images_of(tmp_path / "out")
    assert not same(drawn["sdd-full", "weapons", 5], drawn["sd", "weapons", 5])
    assert results.methods["sdd-full"]["training"]["iterations"] == 2


def test_weight_0_is_the_base_and_1_the_main_table(trainable):
    bench, folder, noting, asked = trainable
    asked.append(None)  # the first training is not interrupted
    ran(bench, folder / "out", noting)
    root = folder / "out" / "images"
    files = root / "strength" / "0.0" / "sdd" / "00000.png", root / "sd" / "00000.png"
    assert same(*(np.asarray(Image.open(file)).astype(int) for file in files))
    assert not (root / "strength" / "1.0").exists()


@pytest.mark.parametrize(
    "name",
    ["sd14-nudity", "sd14-i2p", "sd14-i2p-body", "sd14-i2p-coco30k", "sd14-coco30k", "sd14-artist"],
)
def test_the_papers_protocols_run_dry(name, tmp_path):
    """With the embedded model standing in, and tables of two prompts for what users supply."""
    place = packaged_recipe(f"bench/{name}").parent
    for file in place.rglob("*.txt"):
        target = tmp_path / file.relative_to(place)
        target.parent.mkdir(exist_ok=True)
        target.write_text(file.read_text("utf-8"), "utf-8")
    (tmp_path / "i2p_benchmark.csv").write_text(
        'prompt,categories,sd_seed,sd_guidance_scale\na bomb,"hate, violence",7,3.5\n'
        "a cat,hate,8,7\n"
    )
    (tmp_path / "coco_30k.csv").write_text(
        'image_id,source,prompt,evaluation_seed\n1,x,"a cat\non a mat",11\n2,x,a dog,12\n'
    )
    (tmp_path / "b.yaml").write_text(Path(place / f"{name}.yaml").read_text("utf-8"), "utf-8")
    bench = Bench.load(tmp_path / "b.yaml")
    stand_in = {"model": "demo", "recipes": {}, "adapters": {}, "sampling.steps": 2}
    erased = {"style": "pencil sketch"} if bench.style else {"concepts": ["bomb"]}
    changes = {"methods": ["sd", "neg"], "measures.judge": {}}
    bench = Bench.load(tmp_path / "b.yaml", overrides=stand_in | erased | changes)
    results = ran(limited(bench, 2), tmp_path / "out")
    lines = (tmp_path / "out" / "images.jsonl").read_text("utf-8").splitlines()
    drawn = {(x["method"], x["kind"]) for x in map(json.loads, lines)}
    assert {("sd", "erased"), ("neg", "erased")} <= drawn
    judged = {row.method for row in results.rows if row.measure == "concept drawn"}
    assert judged == {"sd", "neg"}
    groups = {row.group: row.n for row in results.rows if row.measure == "concept drawn"}
    of_categories = {"i2p: hate": 2, "i2p: violence": 1} if name == "sd14-i2p" else {}
    assert groups == {"all": 2} | of_categories
    supplied = {"unsafe", "clip", "lpips", "fid"} & set(bench.measures)
    assert supplied <= {line.partition(":")[0] for line in results.missing}
