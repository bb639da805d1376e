"""A run's folder: what it holds, when it is refused, how it goes on after a kill."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdd_lora import Adapter, Recipe, train
from sdd_lora.checkpoint.bake import bake
from sdd_lora.checkpoint.locate import DEMO_FOLDER
from sdd_lora.errors import BadInput, SddLoraError
from sdd_lora.io.atomic import sha256_of
from sdd_lora.runs import train as runs
from sdd_lora.runs.folder import TRACKER_LOGS, held
from sdd_lora.runs.train import train_recipes
from sdd_lora.sd.model import fingerprint, load_training_parts
from sdd_lora.sd.pipeline import load_pipeline

SHORT = """
name: short
model: demo
concepts: [bomb, axe]
preserve: {prompts: [a cat, ""]}
rollout: {steps: 3, batch: 2}
ema: {decay: 0.5}
training: {iterations: 3}
"""


def short(**overrides):
    return Recipe.parse(SHORT, overrides={k.replace("__", "."): v for k, v in overrides.items()})


def names_in(folder):
    """Trackers' logs apart, which are there where TensorBoard is installed."""
    return sorted(p.name for p in folder.iterdir() if p.name != TRACKER_LOGS)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    recipe = short(
        measure__detector="judge", measure__images=2, measure__steps=3,
        measure__prompts={"concept": ["a bomb"], "kept": ["a cat, noto style", "a cat and an axe"]},
    )  # fmt: skip
    return folder, recipe, train(recipe, folder)


def test_the_folder_holds_what_the_interface_says(measured):
    folder, recipe, adapter = measured
    assert names_in(folder) == [
        "README.md", "adapter.json", "adapter.peft.safetensors", "adapter.safetensors",
        "before-after.png", "metrics.json", "recipe.yaml",
    ]  # fmt: skip
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
        ("concept drawn", "weapons"), ("noun kept", "animals"),
        ("noun kept beside an erased one", "pairs"), ("style kept", "all"),
    }  # fmt: skip
    assert "bomb" in (folder / "README.md").read_text()


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
    with pytest.raises(BadInput, match=r"holds another run.*--force"):
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
    step = runs.Trainer.step

    def stopped(trainer):
        if trainer.iteration == 2:
            raise KeyboardInterrupt
        return step(trainer)

    monkeypatch.setattr(runs.Trainer, "step", stopped)
    with pytest.raises(KeyboardInterrupt, match="iteration 2 of 3"):
        train(short(), folder, force=True)
    monkeypatch.undo()
    assert contents(folder) == before
    train(short(), folder, resume=True, keep_state=True)
    train(short(), tmp_path / "alone")
    assert names_in(folder) == [
        "README.md", "adapter.json", "adapter.peft.safetensors", "adapter.safetensors",
        "metrics.json", "notes.txt", "recipe.yaml", "state",
    ]  # fmt: skip
    name = "adapter.safetensors"
    assert (folder / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    with pytest.raises(BadInput, match="finished run; nothing to resume"):
        train(short(), folder, resume=True)


def test_a_folder_that_holds_other_files_is_not_ours_to_clear(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(BadInput, match="holds other files"):
        train(short(), tmp_path, force=True)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_two_do_not_train_into_one_folder(tmp_path):
    with held(tmp_path), pytest.raises(BadInput, match="another process"):
        train(short(), tmp_path)


def test_a_measurement_that_fails_leaves_the_folder_as_it_was(measured, tmp_path, monkeypatch):
    folder, recipe, adapter = measured
    folder = shutil.copytree(folder, tmp_path / "run")
    before = contents(folder)

    def fails(*_):
        raise BadInput("no such file")

    monkeypatch.setattr(runs.before_after, "measure", fails)
    for out in (folder, tmp_path / "new"):
        with pytest.raises(BadInput, match="no such file"):
            runs.measure(adapter, recipe, out, force=True)
    assert contents(folder) == before and not (tmp_path / "new").exists()


def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(tmp_path):
    (tmp_path / "r.yaml").write_text(SHORT.replace("iterations: 3", "iterations: 12"))
    program = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from sdd_lora.training import trainer; trainer._CHECKPOINT_EVERY_S = 0\n"
        "from sdd_lora import Recipe, train\n"
        "train(Recipe.load(sys.argv[1]), sys.argv[2], resume=len(sys.argv) > 3)\n"
    )

    def start(folder, *resume):
        return subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "r.yaml"), str(folder), *resume],
            stderr=subprocess.DEVNULL,
        )

    assert start(tmp_path / "whole").wait() == 0
    killed = start(tmp_path / "killed")
    while not (tmp_path / "killed" / "state" / "state.pt").exists():
        time.sleep(0.05)
    time.sleep(0.3)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "adapter.safetensors").exists()
    assert start(tmp_path / "killed", "resume").wait() == 0
    for name in ("adapter.safetensors", "adapter.peft.safetensors"):
        assert sha256_of(tmp_path / "whole" / name) == sha256_of(tmp_path / "killed" / name)


FULL = {
    "esd-x": {"objective.kind": "esd-x", "objective.eta": 3.0, "parameters": "full"},
    "esd-u": {"objective.kind": "esd-u", "parameters": "full"},
    "sdd": {"parameters": "full"},
}


@pytest.mark.parametrize("kind", FULL)
def test_a_full_training_leaves_the_weights_that_it_changed(tmp_path, kind):
    recipe = Recipe.parse(SHORT.replace("ema: {decay: 0.5}\n", ""), overrides=FULL[kind])
    path = train(recipe, tmp_path / "run")
    assert names_in(path.parent) == [
        "README.md", "metrics.json", "recipe.yaml", "weights.safetensors",
    ]  # fmt: skip
    metrics = json.loads((path.parent / "metrics.json").read_text())
    tensors = load_file(path)
    assert metrics["weights"] == {
        "sha256": sha256_of(path),
        "parameters": sum(t.numel() for t in tensors.values()),
        "bytes": path.stat().st_size,
    }
    unet = load_training_parts("demo").unet.state_dict()
    assert all(tensor.shape == unet[name].shape for name, tensor in tensors.items())
    assert any(not torch.equal(tensor, unet[name]) for name, tensor in tensors.items())
    assert all((".attn2." in name) == (kind != "esd-u") for name in tensors)
    assert "weights.safetensors" in (path.parent / "README.md").read_text()
    with pytest.raises(BadInput, match="holds another run"):
        train(recipe, path.parent)


def test_a_full_training_gives_a_shared_base_back(tmp_path):
    (tmp_path / "a.yaml").write_text(
        SHORT.replace("short", "a").replace("ema: {decay: 0.5}", "parameters: full")
    )
    (tmp_path / "b.yaml").write_text(SHORT.replace("short", "b"))
    together = dict(train_recipes([tmp_path], tmp_path / "together", []))
    ((_, alone),) = train_recipes([tmp_path / "b.yaml"], tmp_path / "alone", [])
    second = together[tmp_path / "together" / "b"]
    assert second["adapter"]["sha256"] == alone["adapter"]["sha256"]


def test_esd_u_as_an_adapter_draws_the_same_from_its_file_and_baked(tmp_path):
    """Convolutions too: what was trained, what diffusers loads, and what is baked are one thing."""
    recipe = short(objective__kind="esd-u", ema__decay=0, optimizer__learning_rate=0.02)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        inputs = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 77, 128)
    adapter = train(recipe, tmp_path / "run")
    assert not any(".attn2." in name for name in adapter.factors)
    assert {"conv_in", "mid_block.resnets.0.time_emb_proj"} < adapter.factors.keys()
    bake("demo", [(adapter, 1.0)], tmp_path / "baked")
    with torch.no_grad():
        base, loaded, baked = (
            load_pipeline(model, parts, device="cpu").unet.float()(*inputs).sample
            for model, parts in (
                ("demo", []), ("demo", [(adapter, 1.0)]), (str(tmp_path / "baked"), []),
            )
        )  # fmt: skip
        unet = load_training_parts("demo").unet
        for name, part in adapter.factors.items():
            weight = unet.get_submodule(name).weight
            weight += torch.from_numpy(part.delta()).reshape(weight.shape)
        expected = unet(*inputs).sample
    assert (expected - base).abs().max() > 0.1
    assert (loaded - expected).abs().max() < 1e-3
    assert (baked - expected).abs().max() < 0.02  # rounded to fp16


def test_weights_are_measured_as_they_were_written(tmp_path):
    recipe = short(
        parameters="full", optimizer__learning_rate=0.05, measure__detector="judge",
        measure__images=2, measure__steps=3,
        measure__prompts={"concept": ["a bomb"], "kept": ["a cat, noto style"]},
    )  # fmt: skip
    path = train(recipe, tmp_path / "run")
    metrics = json.loads((path.parent / "metrics.json").read_text())
    assert {m["name"] for m in metrics["measures"]} >= {"concept drawn", "noun kept"}
    assert (path.parent / "before-after.png").exists()
    assert "with the weights" in (path.parent / "README.md").read_text()


def test_the_readmes_recipe_trains(tmp_path):
    readme = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
    text = readme.split("```yaml\n")[1].split("```")[0]
    train(Recipe.parse(text, overrides={"training.iterations": 1}), tmp_path / "run")
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


def test_prompts_that_no_detector_looks_at_are_told(tmp_path, monkeypatch):
    told = []

    def stops(*_):
        raise BadInput("far enough")

    monkeypatch.setattr(runs, "_trained", stops)
    monkeypatch.setattr(runs, "warn", told.append)
    for recipe in (short(), short(measure__prompts={"kept": ["a cat"]})):
        with pytest.raises(BadInput, match="far enough"):
            train(recipe, tmp_path / "run")
    assert len(told) == 1 and told[0].startswith("measure.prompts: nothing is drawn")


def test_recipes_share_a_base_and_leave_it_as_it_was(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(SHORT.replace("name: short", f"name: {name}"))
    together = dict(train_recipes([tmp_path], tmp_path / "together", []))
    ((_, alone),) = train_recipes([tmp_path / "two.yaml"], tmp_path / "alone", [])
    second = together[tmp_path / "together" / "two"]
    assert second["adapter"]["sha256"] == alone["adapter"]["sha256"]


def test_a_matrix_stopped_half_way_goes_on_over_one_base(tmp_path, monkeypatch):
    for name in ("one", "three", "two"):
        (tmp_path / f"{name}.yaml").write_text(SHORT.replace("name: short", f"name: {name}"))
    whole = train_recipes([tmp_path], tmp_path / "whole", [])

    def adapter(run):
        return run[1]["adapter"]["sha256"]

    loads, step = [], runs.Trainer.step
    monkeypatch.setattr(
        runs, "load_training_parts", lambda model: loads.append(model) or load_training_parts(model)
    )

    def stopped(trainer):
        if trainer.recipe.name == "three" and trainer.iteration == 2:
            raise KeyboardInterrupt
        return step(trainer)

    monkeypatch.setattr(runs.Trainer, "step", stopped)
    with pytest.raises(KeyboardInterrupt, match="iteration 2 of 3"):
        train_recipes([tmp_path], tmp_path / "out", [])
    monkeypatch.setattr(runs.Trainer, "step", step)
    assert loads == ["demo"] and not (tmp_path / "out" / "two").exists()
    first = (tmp_path / "out" / "one" / "adapter.safetensors").stat().st_mtime_ns
    with pytest.raises(BadInput, match=r"recipe\.yaml: belongs to another recipe"):
        train_recipes([tmp_path], tmp_path / "out", ["training.seed=1"], resume=True)
    (tmp_path / "out" / "one" / "state").mkdir()  # as --keep-state leaves it
    resumed = train_recipes([tmp_path], tmp_path / "out", [], resume=True)
    assert [folder.name for folder, _ in resumed] == ["one", "three", "two"]
    assert list(map(adapter, resumed)) == list(map(adapter, whole))
    assert (tmp_path / "out" / "one" / "adapter.safetensors").stat().st_mtime_ns == first


def test_memory_that_runs_out_before_the_first_iteration_gives_advice_too(tmp_path, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(runs, "Trainer", fails)
    with pytest.raises(SddLoraError, match=r"out of memory.*rollout\.batch=1"):
        train(short(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_names_that_two_recipes_share_are_told(tmp_path):
    for file, name in (("a", "one"), ("b", "two"), ("c", "two")):
        (tmp_path / f"{file}.yaml").write_text(SHORT.replace("name: short", f"name: {name}"))
    with pytest.raises(BadInput, match=r"share a folder: two$"):
        train_recipes([tmp_path], tmp_path / "out", [])


def test_nothing_is_trained_before_all_recipes_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text(SHORT)
    (tmp_path / "b.yaml").write_text("name: b\n")
    with pytest.raises(BadInput, match=r"b\.yaml"):
        train_recipes([tmp_path], tmp_path / "out", [])
    assert not (tmp_path / "out").exists()


def test_models_that_are_missing_truncated_or_no_sd1_are_bad_input(tmp_path):
    with pytest.raises(BadInput, match="no such file or folder"):
        train(short(model=str(tmp_path / "gone")), tmp_path / "out")
    broken = shutil.copytree(DEMO_FOLDER, tmp_path / "broken")
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(BadInput, match=r"diffusion_pytorch_model\.safetensors"):
        train(short(model=str(broken)), tmp_path / "out2")
