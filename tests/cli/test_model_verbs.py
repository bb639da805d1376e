"""demo, train and generate from the command line, as a user types them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from sdd_lora.checkpoint.locate import COMMUNITY_FILE
from sdd_lora.recipe import Recipe

RECIPE = """
name: short
model: demo
concepts: [bomb, axe]
rollout: {steps: 3}
training: {iterations: 2}
"""


def test_the_quick_demo_end_to_end(ask, refused, tmp_path):
    result = ask("demo", "--quick", "-o", tmp_path / "run")
    groups = {(m["name"], m["group"]) for m in result["measures"]}
    assert ("concept drawn", "weapons") in groups and ("noun kept", "animals") in groups
    assert (tmp_path / "run" / "before-after.png").stat().st_size > 10_000
    assert "holds another run" in refused("demo", "--quick", "-o", tmp_path / "run")


def test_train_then_generate_with_the_adapter(ask, tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE)
    trained = subprocess.run(
        [sys.executable, "-m", "sdd_lora", "train", "r.yaml", "-o", "run", "-q"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert (trained.returncode, trained.stderr) == (0, "")
    told = ask(
        "generate",
        "demo",
        "--prompt",
        "a bomb",
        "--images",
        2,
        "--steps",
        2,
        "--adapter",
        f"{tmp_path / 'run'}:0.5",
        "-o",
        tmp_path / "out",
    )
    assert told == {"folder": str(tmp_path / "out"), "images": 2, "drawn": 2}
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["adapters"][0]["weight"] == 0.5


def test_images_of_a_model_that_changed_since_are_not_taken_for_its_own(ask, refused, tmp_path):
    path, out = tmp_path / "m.safetensors", tmp_path / "out"
    tensors = load_file(COMMUNITY_FILE)
    save_file(tensors, path)
    command = ["generate", path, "--prompt", "a cat", "--steps", 1, "-o", out]
    for drawn in (1, 0):
        assert ask(*command)["drawn"] == drawn
    key = next(key for key in tensors if key.startswith("first_stage_model.decoder"))
    save_file(tensors | {key: 2 * tensors[key]}, path)
    assert "another run (parts differ)" in refused(*command)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_result_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sdd_lora", "inspect", COMMUNITY_FILE],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "sdd-lora: stdout: the result can't be written: No space left on device\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "gone.yaml"], "gone.yaml"),
        (["train", "r.yaml", "--set", "lora.rank=none"], "lora.rank"),
        (["train", "r.yaml", "--set", "model=gone/at/all"], "no such file or folder"),
        (["train", "r.yaml", "--resume"], "no run to resume"),
        (["train", "r.yaml", "--resume", "--force"], "expected one of them"),
        (["train", "r.yaml", "-o", "x" * 300], "too long a name"),
        (["train", "r.yaml", "--set", " training.iterations =x"], "--set training.iterations: "),
        (["generate", "x" * 300, "--prompt", "x", "-o", "out"], "too long a name"),
        (["generate", "demo", "--prompt", "x", "-o", "out", "--guidance", "nan"], "finite number"),
        (["generate", "demo", "--prompt", "x", "-o", "out", "--seed", 2**64], "less than 2^63"),
        (["generate", "demo", "-o", "out"], "no prompt"),
        (["generate", "demo", "--prompt", "x", "--adapter", "gone:2", "-o", "out"], "gone"),
        (["generate", "demo", "--prompt", "x", "--method", "neg", "-o", "out"], "needs a concept"),
    ],
)
def test_bad_input_is_one_clear_line(refused, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "r.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    assert message in refused(*arguments)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.yaml"]


def test_debug_shows_where(call, tmp_path):
    assert "Traceback" in call("train", tmp_path / "gone.yaml", "--debug", code=2).err


def test_train_takes_what_the_unet_predicts(ask, call, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE)
    ask("train", recipe, "-o", tmp_path / "run", "--prediction", "v")
    assert Recipe.load(tmp_path / "run" / "recipe.yaml").prediction == "v_prediction"
    assert "epsilon" in call("train", recipe, "--prediction", "x0", code=2).err
