"""`sdd-lora evaluate` as a user types it."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from sdd_lora.checkpoint.locate import DEMO_FOLDER

BENCH = """
name: small
model: demo
concepts: [bomb, axe]
prompts: {erased: {weapons: [a bomb, an axe]}, kept: {animals: [a cat]}}
seeds: {first: 5, erased: 4, kept: 4}
sampling: {steps: 2, guidance: 3.0}
methods: [sd, neg]
measures: [judge]
quick: {bench: {seeds.erased: 1, seeds.kept: 1}}
"""


@pytest.fixture(autouse=True)
def bench(tmp_path, monkeypatch):
    (tmp_path / "b.yaml").write_text(BENCH)
    monkeypatch.chdir(tmp_path)


def test_a_table_comes_out(call, tmp_path, monkeypatch):
    typed = ["evaluate", "b.yaml", "--quick"]
    monkeypatch.setattr(sys, "argv", ["sdd-lora", *typed])
    printed = call(*typed).out
    assert "concept drawn % ↓" in printed and "noun kept % ↑" in printed
    assert [row.split()[0] for row in printed.splitlines()[1:3]] == ["sd", "neg"]
    told = json.loads((tmp_path / "bench" / "small-quick" / "results.json").read_text())
    assert told["bench"] == "small-quick" and told["command"] == "sdd-lora evaluate b.yaml --quick"
    assert set(told["rows"][0]) >= {"method", "measure", "group", "value", "ci95", "n"}
    assert {row["n"] for row in told["rows"]} == {1}


def test_methods_and_limit(ask):
    told = ask("evaluate", "b.yaml", "--methods", "neg", "--limit", 2, "-o", "out", "-q")
    assert told["folder"] == "out"
    assert {row["method"] for row in told["rows"]} == {"neg"}
    assert {row["n"] for row in told["rows"]} == {2}


CODE = """
from sdd_lora.generation.methods.sd import sample


def of_a_cat(pipeline, prompts, generators, sampling):
    return sample(pipeline, ["a cat"] * len(prompts), generators, sampling)
"""


def test_rows_of_ones_own_of_every_kind_stand_below_those_of_the_bench(ask, tmp_path):
    (tmp_path / "own.py").write_text(CODE)
    published = Path(__file__).parents[2] / "adapters" / "demo" / "weapons"
    (tmp_path / "mine.safetensors").symlink_to(published / "adapter.safetensors")
    unet = DEMO_FOLDER / "unet" / "diffusion_pytorch_model.safetensors"
    ask("evaluate", "b.yaml", "--quick", "--methods", "sd", "-o", "out", "-q")
    own = {
        "code": "own.py:of_a_cat",
        "file": "mine.safetensors",
        "run": published,
        "whole": unet,
        "pictures": "out/images/sd",
    }
    rows = [word for name, what in own.items() for word in ("--row", f"{name}={what}")]
    told = ask("evaluate", "b.yaml", "--quick", "--methods", "sd", *rows, "-o", "out", "-q")
    assert list(dict.fromkeys(row["method"] for row in told["rows"])) == ["sd", *own]

    def pixels(name):
        first = min((tmp_path / "out" / "images" / name).glob("*.png"))
        return Image.open(first).tobytes()

    assert pixels("sd") == pixels("whole") == pixels("pictures")
    assert pixels("file") == pixels("run")
    assert len(set(map(pixels, ["sd", "file", "code"]))) == 3


def test_a_row_of_ones_own_is_attacked_too(ask, tmp_path):
    published = Path(__file__).parents[2] / "adapters" / "demo" / "weapons"
    attacks = "attacks={methods: [sd], targets: 1, completion: {steps: 1}}"
    row = ("--row", f"mine={published}", "--row", "pictures=out/images/sd")
    quick = ("evaluate", "b.yaml", "--quick", "--methods", "sd", "-o", "out", "-q")
    ask(*quick)
    told = ask(*quick, *row, "--set", attacks)
    assert {row["method"] for row in told["attacks"]} == {"sd", "mine"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--row", "mine"], "--row mine: expected NAME=WHAT, such as mine=my-lora.safetensors"),
        (["--row", "sd=gone.safetensors"], "--row sd: a row of the bench; choose another name"),
        (["--row", "mine=gone.safetensors"], "method mine: gone.safetensors: no such file"),
        (["--row", "mine=gone.py:draw"], "gone.py:draw: can't import it"),
        (["--methods", "sega"], "--methods sega: not in this bench; expected some of sd, neg"),
        (["--set", "model=gone/at/all"], "no such file or folder"),
        (["--set", "methods=[sdd]"], "method sdd: expected an entry under `recipes`"),
        (["--set", "measures=[magic]"], "measure magic: expected one of judge"),
        (["--set", "concept=" + "bomb " * 99], "too long: the model would not read"),
    ],
)
def test_bad_input_is_one_clear_line(refused, tmp_path, arguments, message):
    assert message in refused("evaluate", "b.yaml", "-o", "out", *arguments)
    assert not (tmp_path / "out").exists()
