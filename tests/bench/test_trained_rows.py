"""Rows whose weights are trained; and the papers' protocols, dry."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.adapters import random_adapter
from support.benches import RECIPE, SMALL, images_of, ran, same

from sdd_lora.bench.bench_file import Bench, limited
from sdd_lora.runs.many import packaged_recipe
from sdd_lora.runs.train import train


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    """Results of a bench whose first training is interrupted, its folder, and what was trained."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("trained")
        bench, noting, asked = trainable(folder, patch)
        with pytest.raises(KeyboardInterrupt):
            ran(bench, folder / "out", noting)
        results = ran(bench, folder / "out", noting)
        few = bench.model_copy(update={"methods": ["sd", "sdd", "stack"], "variations": {}})
        ran(few, folder / "again", noting)  # another folder, the same cache
    return results, folder / "out", asked


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
        "variations": variations,
        "seeds": {"first": 5, "erased": 2, "kept": 0},
    }
    return Bench.load(tmp_path / "b.yaml", overrides=changes), noting, asked


def test_what_is_trained_is_kept_and_resumed(trainings):
    results, folder, asked = trainings
    assert asked == [("short", False), ("short", True), ("o", False)]
    drawn = images_of(folder)
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
        "methods": ["sd", "sdd-full"],
        "recipes": {"sdd-full": {"file": "r.yaml", "set": quickly}},
        "seeds": {"first": 5, "erased": 1, "kept": 0},
    }
    results = ran(Bench.load(tmp_path / "b.yaml", overrides=changes), tmp_path / "out", train)
    drawn = images_of(tmp_path / "out")
    assert not same(drawn["sdd-full", "weapons", 5], drawn["sd", "weapons", 5])
    assert results.methods["sdd-full"]["training"]["iterations"] == 2


def test_weight_0_is_the_base_and_1_the_main_table(trainings):
    root = trainings[1] / "images"
    files = root / "strength" / "0.0" / "sdd" / "00000.png", root / "sd" / "00000.png"
    assert same(*(np.asarray(Image.open(file)).astype(int) for file in files))
    assert not (root / "strength" / "1.0").exists()


@pytest.mark.parametrize("name", ["sd14-i2p", "sd14-coco30k", "sd14-artist"])
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
