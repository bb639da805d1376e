"""bake and unbake from the command line: exit codes, JSON, and nothing written on refusal."""

import json
import shlex
import struct

import pytest
from support import checkpoint_models as models

from sdd_lora.io.safetensors import read_tensors


@pytest.fixture
def files(tmp_path):
    tensors = models.cast(models.ldm_tensors(ema=True), "fp16")
    model = models.write(tmp_path / "m.safetensors", tensors)
    a = models.adapter(name="a").save(tmp_path / "a.safetensors")
    b = models.adapter(seed=1, name="b").save(tmp_path / "b.safetensors")
    return model, a, b


def test_there_and_back(call, files, tmp_path):
    model, a, b = files
    out, undo = tmp_path / "out.safetensors", tmp_path / "undo"
    done = call("bake", model, a, f"{b}:-0.5", "-o", out, "--undo", undo, "--json")
    report = json.loads(done.out)
    assert [(x["name"], x["weight"]) for x in report["adapters"]] == [("a", 1.0), ("b", -0.5)]
    assert len(report["tensors"]) == 64 and 0.9 < report["realised"] < 1.1
    assert report["copies"] == ["unet: weights", "unet: EMA copy"]
    back = call("unbake", out, undo, "-o", tmp_path / "back.safetensors")
    assert "as before the bake" in back.out
    assert (tmp_path / "back.safetensors").read_bytes() == model.read_bytes()


@pytest.mark.parametrize("name", ["m.safetensors", "é's 模型 $x.safetensors"])
def test_in_place_says_how_to_undo(call, files, name):
    model, a, _ = files
    before, model = model.read_bytes(), model.rename(model.with_name(name))
    done = call("bake", model, a, "--in-place")
    command = shlex.split(done.out.splitlines()[-1].removeprefix("undo: sdd-lora "))
    call(*command)
    assert model.read_bytes() == before


def test_a_change_that_stopped_before_its_header_is_named(call, files):
    model, a, _ = files
    call("bake", model, a, "--in-place")
    undo = model.with_name(f"{model.name}.undo1")
    undo.rename(model.with_name(f"{model.name}.journal"))
    with open(model, "r+b") as file:
        file.write(struct.pack("<Q", 0))  # room was made, and nothing written in it
    for verb in ("inspect", "verify"):
        assert "roll it back" in call(verb, model, code=2).err


def test_what_is_read_is_not_replaced(call, files, tmp_path):
    model, a, b = files
    (tmp_path / "run").mkdir()
    adapter = a.rename(tmp_path / "run" / "adapter.safetensors")
    original = tmp_path / "original.safetensors"
    original.write_bytes(model.read_bytes())
    out = tmp_path / "o.safetensors"
    for arguments in (
        [model, adapter, "-o", adapter],
        ["demo", tmp_path / "run", "-o", tmp_path / "run"],
        [model, b, "-o", out, "--undo", b],
        [model, b, "-o", original, "--base", original],
    ):
        assert "would replace" in call("bake", *arguments, "--force", code=2).err
    assert adapter.exists() and not out.exists()


def test_options_reach_the_bake(call, files, tmp_path):
    model, a, _ = files
    outputs = {}
    for name, options in {
        "nearest": [],
        "drop": ["--ema", "drop"],
        "random": ["--rounding", "stochastic", "--seed", "1"],
        "other": ["--rounding", "stochastic", "--seed", "2"],
    }.items():
        out = tmp_path / f"{name}.safetensors"
        call("bake", model, a, "-o", out, *options)
        outputs[name] = {k: v.tobytes() for k, v in read_tensors(out)[0].items()}
    assert len(outputs["drop"]) < len(outputs["nearest"])
    assert outputs["random"] != outputs["nearest"] and outputs["random"] != outputs["other"]


def test_bad_input_is_one_line_and_exit_code_2(call, files, tmp_path):
    model, a, _ = files
    out = tmp_path / "o.safetensors"
    before = sorted(path.name for path in tmp_path.iterdir())
    for arguments in (
        [tmp_path / "nothing.safetensors", a, "-o", out],
        [model, tmp_path / "nothing.safetensors", "-o", out],
        [model, a],
        [model, a, "-o", model, "--force"],
        [model, a, "-o", a],
        [model, f"{a}:0", "-o", out],
        [a, a, "-o", out],
        [model, a, "-o", out, "--base", a],
        [model, a, "-o", out, "--seed", "7"],
        ["demo", a, "-o", out],
    ):
        done = call("bake", *arguments, code=2)
        assert done.err.startswith("sdd-lora: ") and done.err.count("\n") == 1
        assert not done.out
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_models_by_name_are_verified_and_inspected(call, files, tmp_path, monkeypatch):
    _, a, _ = files
    monkeypatch.chdir(tmp_path)
    done = call("inspect", "demo", "demo-community", "--json")
    folder, file = json.loads(done.out)["files"]
    assert (folder["kind"], folder["layout"], file["layout"]) == ("checkpoint", "diffusers", "ldm")
    absent = call("verify", "demo", "--adapter", a, "--json", code=1)
    assert not json.loads(absent.out)["presence"]["present"]
    call("bake", "demo", a, "-o", "baked")
    found = call("verify", "baked", "--adapter", a, "--base", "demo", "--json").out
    assert json.loads(found)["presence"]["strength"] == pytest.approx(1, abs=0.05)
    assert "no such file" in call("verify", "nothing", code=2).err
    assert "no such file" in call("inspect", "nothing.safetensors", code=2).err


def test_a_part_of_a_baked_stack_is_named_with_it(call, files, tmp_path):
    model, a, b = files
    pair, out = tmp_path / "pair.safetensors", tmp_path / "o.safetensors"
    call("stack", f"{a}:0.5", f"{b}:2", "-o", pair)
    call("bake", model, f"{pair}:0.5", "-o", out)
    text = call("verify", out, "--adapter", a, "--base", model).out
    assert "recorded as baked in with pair at weight 0.25" in text
