"""A run's folder: its files, when it is refused, how it goes on after a kill."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.short_run import SHORT, names_in, short

from sdd_lora import Adapter, Recipe, train
from sdd_lora.checkpoint.locate import DEMO_FOLDER
from sdd_lora.errors import BadInput, SddLoraError
from sdd_lora.io.atomic import sha256_of
from sdd_lora.io.safetensors import read_header
from sdd_lora.runs import before_after
from sdd_lora.runs import train as one_run
from sdd_lora.runs.folder import lock
from sdd_lora.runs.measure import measure
from sdd_lora.sd.model import fingerprint, load_training_parts
from sdd_lora.training.trainer import Trainer


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    recipe = short(
        measure__detector="judge",
        measure__images=2,
        measure__steps=3,
        measure__prompts={"concept": ["a bomb"], "kept": ["a cat, noto style", "a cat and an axe"]},
    )
    return folder, recipe, train(recipe, folder)


def test_the_folder_holds_what_the_interface_says(measured):
    folder, recipe, adapter = measured
    assert names_in(folder) == [
        "README.md",
        "adapter.json",
        "adapter.peft.safetensors",
        "adapter.safetensors",
        "before-after.png",
        "metrics.json",
        "recipe.yaml",
    ]
    assert Recipe.load(folder / "recipe.yaml") == recipe
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["recipe_sha256"] == recipe.sha256
    assert metrics["base"]["fingerprint"] == fingerprint(load_training_parts("demo").unet)
    assert metrics["adapter"] == {
        "sha256": sha256_of(folder / "adapter.safetensors"),
        "parameters": adapter.parameters,
        "bytes": (folder / "adapter.safetensors").stat().st_size,
    }
    assert metrics["training"]["iterations"] == 3
    assert {(m["name"], m["group"]) for m in metrics["measures"]} == {
        ("concept drawn", "weapons"),
        ("noun kept", "animals"),
        ("noun kept beside an erased one", "pairs"),
        ("style kept", "all"),
    }
    assert "bomb" in (folder / "README.md").read_text()
    header = read_header(folder / "adapter.safetensors").metadata
    assert header["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    assert len(header["modelspec.thumbnail"]) < 20_100


def test_the_two_files_hold_the_returned_adapter(measured):
    folder, _, adapter = measured
    kohya, peft = Adapter.load(folder), Adapter.load(folder / "adapter.peft.safetensors")
    assert len(adapter.factors) == 32
    for name in adapter.factors:
        delta = adapter.delta(name)
        assert delta.abs().max() > 0
        assert (kohya.delta(name) - delta).norm() < 2e-3 * delta.norm()
        assert (peft.delta(name) - delta).norm() < 2e-3 * delta.norm()


def test_a_folder_that_holds_another_run_is_refused(measured):
    folder, recipe, _ = measured
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    with pytest.raises(BadInput, match=r"holds another run.*`force=True`"):
        train(short(), folder)
    with pytest.raises(BadInput, match="belongs to another recipe"):
        train(short(), folder, resume=True)
    with pytest.raises(BadInput, match="finished run; nothing to resume"):
        train(recipe, folder, resume=True)
    assert before == {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_a_forced_run_takes_an_earlier_ones_place_whole_or_not_at_all(
    measured, tmp_path, monkeypatch
):
    folder = shutil.copytree(measured[0], tmp_path / "run")
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    with pytest.raises(SddLoraError, match="the loss is nan"):
        train(short(optimizer__learning_rate=1e30), folder, force=True)
    assert contents(folder) == before
    step = Trainer.step

    def stopped(trainer):
        if trainer.iteration == 2:
            raise KeyboardInterrupt
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", stopped)
    with pytest.raises(KeyboardInterrupt, match="iteration 2 of 3"):
        train(short(), folder, force=True)
    monkeypatch.undo()
    assert contents(folder) == before
    train(short(), folder, resume=True, keep_state=True)
    train(short(), tmp_path / "alone")
    assert names_in(folder) == [
        "README.md",
        "adapter.json",
        "adapter.peft.safetensors",
        "adapter.safetensors",
        "metrics.json",
        "notes.txt",
        "recipe.yaml",
        "state",
    ]
    name = "adapter.safetensors"
    assert (folder / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    with pytest.raises(BadInput, match="finished run; nothing to resume"):
        train(short(), folder, resume=True)


def test_a_finished_run_goes_on_for_more_iterations_as_if_it_had_been_longer(tmp_path):
    folder, longer = tmp_path / "run", short(training__iterations=5)
    train(short(), folder, keep_state=True)
    with pytest.raises(BadInput, match="add `resume=True` to continue it"):
        train(longer, folder)
    with pytest.raises(BadInput, match="another recipe"):
        train(short(training__iterations=5, training__seed=1), folder, resume=True)
    with pytest.raises(BadInput, match="another recipe"):
        train(short(training__iterations=2), folder, resume=True)
    train(longer, folder, resume=True)
    train(longer, tmp_path / "at once")
    for name in ("adapter.safetensors", "recipe.yaml"):
        assert (folder / name).read_bytes() == (tmp_path / "at once" / name).read_bytes()
    assert not (folder / "state").exists()
    with pytest.raises(BadInput, match=r"whose training state was not kept .*lora\.init"):
        train(short(training__iterations=6), folder, resume=True)


def test_a_folder_that_holds_other_files_is_not_ours_to_clear(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(BadInput, match="holds other files"):
        train(short(), tmp_path, force=True)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_two_do_not_train_into_one_folder(tmp_path):
    with lock(tmp_path), pytest.raises(BadInput, match="another process"):
        train(short(), tmp_path)


def test_a_measurement_that_fails_leaves_the_folder_as_it_was(measured, tmp_path, monkeypatch):
    folder, recipe, adapter = measured
    folder = shutil.copytree(folder, tmp_path / "run")
    before = contents(folder)

    def fails(*_):
        raise BadInput("no such file")

    monkeypatch.setattr(before_after, "measure_before_after", fails)
    for out in (folder, tmp_path / "new"):
        with pytest.raises(BadInput, match="no such file"):
            measure(adapter, recipe, out, force=True)
    assert contents(folder) == before and not (tmp_path / "new").exists()


def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(tmp_path):
    (tmp_path / "r.yaml").write_text(SHORT.replace("iterations: 3", "iterations: 12"))
    program = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from sdd_lora.training import trainer; trainer._CHECKPOINT_EVERY_S = 0\n"
        "from sdd_lora import Recipe, train\n"
        "train(Recipe.load(sys.argv[1]), sys.argv[2])\n"
    )

    recipe = Recipe.load(tmp_path / "r.yaml")
    train(recipe, tmp_path / "whole")
    killed = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "r.yaml"), str(tmp_path / "killed")],
        stderr=subprocess.DEVNULL,
    )
    while not (tmp_path / "killed" / "state" / "state.pt").exists():
        time.sleep(0.05)
    time.sleep(0.3)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "adapter.safetensors").exists()
    train(recipe, tmp_path / "killed", resume=True)
    for name in ("adapter.safetensors", "adapter.peft.safetensors"):
        assert sha256_of(tmp_path / "whole" / name) == sha256_of(tmp_path / "killed" / name)


def test_the_recipe_of_the_recipes_readme_trains(tmp_path):
    folder = Path(__file__).parents[2] / "recipes"
    text = (folder / "README.md").read_text("utf-8").split("```yaml\n")[1].split("```")[0]
    recipe = Recipe.parse(text, folder=folder, overrides={"training.iterations": 1})
    train(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "README.md").exists()


def test_a_wrong_model_costs_no_earlier_run(measured):
    folder, _, _ = measured
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    with pytest.raises(BadInput, match="no such file or folder"):
        train(short(model="gone/at/all"), folder, force=True)
    assert before == {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}


def test_what_could_not_be_measured_is_refused_before_training(tmp_path):
    recipe = short(
        concepts=["nudity"], measure__detector="judge", measure__prompts={"concept": ["a body"]}
    )
    with pytest.raises(BadInput, match="knows none of the concepts"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_to_carry_over_to_that_is_not_there_costs_no_training(tmp_path):
    prompts = {"concept": ["a bomb"]}
    for wrong in ("nope.safetensors", str(tmp_path)):
        recipe = short(
            measure__detector="judge", measure__prompts=prompts, measure__transfer=[wrong]
        )
        with pytest.raises(BadInput, match=r"measure\.transfer: "):
            train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_concept_that_is_encoded_as_the_empty_prompt_is_refused(tmp_path):
    with pytest.raises(BadInput, match="empty prompt"):
        train(short(concepts=["bomb", "<|endoftext|>"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("kept", "warnings"), [(3, 1), (60, 0)])
def test_a_closed_form_that_keeps_little_is_warned_of(tmp_path, monkeypatch, kept, warnings):
    said = []

    def stops(*_):
        raise BadInput("far enough")

    monkeypatch.setattr(one_run, "_run_training", stops)
    monkeypatch.setattr(one_run, "warn", said.append)
    prompts = [f"thing {i}" for i in range(kept)]
    for init in ("closed-form", "random"):
        with pytest.raises(BadInput, match="far enough"):
            train(short(lora__init=init, preserve__prompts=prompts), tmp_path / "run")
    assert len(said) == warnings and all("preserve.prompts" in text for text in said)


def test_a_training_whose_measuring_failed_is_measured_without_training_again(
    tmp_path, monkeypatch
):
    recipe = short(
        measure__detector="judge",
        measure__images=1,
        measure__steps=2,
        measure__prompts={"concept": ["a bomb"]},
    )

    def fails(*_):
        raise SddLoraError("out of memory")

    monkeypatch.setattr(before_after, "measure_before_after", fails)
    with pytest.raises(SddLoraError, match=r"out of memory\n.*`resume=True`"):
        train(recipe, tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setattr(Trainer, "step", None)
    otherwise = recipe.model_copy(
        update={"measure": recipe.measure.model_copy(update={"steps": 3})}
    )
    with pytest.raises(BadInput, match="another recipe"):
        train(short(training__seed=1), tmp_path / "run", resume=True)
    train(otherwise, tmp_path / "run", resume=True)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["measures"] and metrics["training"]["iterations"] == 3
    assert Recipe.load(tmp_path / "run" / "recipe.yaml") == otherwise


def test_prompts_that_no_detector_looks_at_are_told(tmp_path, monkeypatch):
    told = []

    def stops(*_):
        raise BadInput("far enough")

    monkeypatch.setattr(one_run, "_run_training", stops)
    monkeypatch.setattr(one_run, "warn", told.append)
    for recipe in (short(), short(measure__prompts={"kept": ["a cat"]})):
        with pytest.raises(BadInput, match="far enough"):
            train(recipe, tmp_path / "run")
    assert len(told) == 1 and told[0].startswith("measure.prompts: nothing is drawn")


def test_memory_that_runs_out_before_the_first_iteration_gives_advice_too(tmp_path, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(one_run, "Trainer", fails)
    with pytest.raises(SddLoraError, match=r"out of memory.*rollout\.batch\"\]=1"):
        train(short(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_models_that_are_missing_truncated_or_no_sd1_are_bad_input(tmp_path):
    with pytest.raises(BadInput, match="no such file or folder"):
        train(short(model=str(tmp_path / "gone")), tmp_path / "out")
    broken = shutil.copytree(DEMO_FOLDER, tmp_path / "broken")
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(BadInput, match=r"diffusion_pytorch_model\.safetensors"):
        train(short(model=str(broken)), tmp_path / "out2")
