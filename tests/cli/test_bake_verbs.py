"""bake and unbake from the command line: exit codes, JSON, and nothing written on refusal."""

import json
import logging

import checkpoint_models as models
import pytest

from sdd_lora.cli import app
from sdd_lora.safetensors_file import read_tensors


@pytest.fixture
def run(capsys):
    """Call the command line in this process; stdout and stderr of what it printed."""

    def call(*arguments, code=0):
        logging.getLogger("sdd_lora").handlers.clear()  # they hold an earlier test's stderr
        with pytest.raises(SystemExit) as ended:
            app(list(map(str, arguments)))
        printed = capsys.readouterr()
        assert ended.value.code == code, printed.err
        return printed

    yield call
    logging.getLogger("sdd_lora").handlers.clear()


@pytest.fixture
def files(tmp_path):
    tensors = models.cast(models.ldm_tensors(ema=True), "fp16")
    model = models.write(tmp_path / "m.safetensors", tensors)
    a = models.adapter(name="a").save(tmp_path / "a.safetensors")
    b = models.adapter(seed=1, name="b").save(tmp_path / "b.safetensors")
    return model, a, b


def test_there_and_back(run, files, tmp_path):
    model, a, b = files
    out, undo = tmp_path / "out.safetensors", tmp_path / "undo"
    done = run("bake", model, a, f"{b}:-0.5", "-o", out, "--undo", undo, "--json")
    report = json.loads(done.out)
    assert [(x["name"], x["weight"]) for x in report["adapters"]] == [("a", 1.0), ("b", -0.5)]
    assert len(report["tensors"]) == 64 and 0.9 < report["realised"] < 1.1
    assert report["copies"] == ["unet: weights", "unet: EMA copy"]
    back = run("unbake", out, undo, "-o", tmp_path / "back.safetensors")
    assert "as before the bake" in back.out
    assert (tmp_path / "back.safetensors").read_bytes() == model.read_bytes()


def test_in_place_says_how_to_undo(run, files):
    model, a, _ = files
    before = model.read_bytes()
    done = run("bake", model, a, "--in-place")
    command = done.out.splitlines()[-1].removeprefix("undo: sdd-lora ").split()
    run(*command)
    assert model.read_bytes() == before


def test_options_reach_the_bake(run, files, tmp_path):
    model, a, _ = files
    outputs = {}
    for name, options in {
        "nearest": [], "drop": ["--ema", "drop"],
        "random": ["--rounding", "stochastic", "--seed", "1"],
        "other": ["--rounding", "stochastic", "--seed", "2"],
    }.items():  # fmt: skip
        out = tmp_path / f"{name}.safetensors"
        run("bake", model, a, "-o", out, *options)
        outputs[name] = {k: v.tobytes() for k, v in read_tensors(out)[0].items()}
    assert len(outputs["drop"]) < len(outputs["nearest"])
    assert outputs["random"] != outputs["nearest"] and outputs["random"] != outputs["other"]


def test_bad_input_is_one_line_and_exit_code_2(run, files, tmp_path):
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
    ):
        done = run("bake", *arguments, code=2)
        assert done.err.startswith("sdd-lora: ") and done.err.count("\n") == 1
        assert not done.out
    assert sorted(path.name for path in tmp_path.iterdir()) == before
