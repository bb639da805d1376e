"""Recipes spread over processes: each run is made once, whoever is killed, whatever fails."""

import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from sdd_lora.cli import app
from sdd_lora.errors import BadInput
from sdd_lora.runs import train as runs
from sdd_lora.runs.folder import METRICS, held
from sdd_lora.runs.train import share_recipes, train_recipes

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
RECIPE = """
name: {name}
model: demo
concepts: [bomb, axe]
rollout: {{steps: 3}}
training: {{iterations: {iterations}, seed: {seed}}}
"""
#: `train --share` in a process of its own; `before_step(trainer)` is called before each iteration
PROGRAM = """
import sys, time, torch
from pathlib import Path
torch.set_num_threads(1)
from sdd_lora.runs import train as runs
from sdd_lora.cli import app
from sdd_lora.runs.folder import under_way
from sdd_lora.training import trainer
trainer._CHECKPOINT_EVERY_S = 0
runs._LOOK_AGAIN_S = 0.05
recipes, out = map(Path, sys.argv[1:])
step = runs.Trainer.step

def stepped(trainer):
    before_step(trainer)
    return step(trainer)

runs.Trainer.step = stepped
def before_step(trainer):
{before_step}

app(["train", str(recipes), "-o", str(out), "--share", "--json", "-q"])
"""
#: of two processes that meet, each is in the middle of a run of its own
MEET = """
    met = out / "met"
    while not met.exists() and sum(under_way(run) is not None for run in out.iterdir()) < 2:
        time.sleep(0.01)
    met.touch()
"""
#: stays in the middle of its first run, for ever
HANG = """
    while trainer.iteration == 2:
        time.sleep(0.01)
"""
PASS = "    pass"


def write(folder, *names, iterations=2):
    folder.mkdir()
    for seed, name in enumerate(names):
        text = RECIPE.format(name=name, iterations=iterations, seed=seed)
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture
def start():
    started = []

    def start(recipes, out, before_step=PASS):
        program = PROGRAM.format(before_step=before_step)
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(recipes), str(out)], stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def told(process):
    """What the process printed at its end."""
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return json.loads(text)


def made_here(told):
    return {run["folder"].rsplit("/", 1)[1] for run in told["runs"] if run["made"] == "here"}


def adapters(runs):
    return [run["adapter"]["sha256"] for run in runs]


def until(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.05)
    raise TimeoutError


def test_two_processes_share_the_recipes(tmp_path, start):
    names = ["a", "b", "c"]
    recipes, out = write(tmp_path / "recipes", *names), tmp_path / "out"
    one, two = (start(recipes, out, MEET) for _ in range(2))
    one, two = told(one), told(two)
    assert made_here(one) and made_here(two)
    assert sorted([*made_here(one), *made_here(two)]) == names
    assert [run["folder"] for run in one["runs"]] == [str(out / name) for name in names]
    assert adapters(one["runs"]) == adapters(two["runs"])
    alone = train_recipes([recipes], tmp_path / "alone", [])
    assert adapters(one["runs"]) == adapters(metrics for _, metrics in alone)
    assert len(set(adapters(one["runs"]))) == 3


def test_a_killed_processs_run_is_continued_by_another(tmp_path, start):
    recipes = write(tmp_path / "recipes", "a", "b", iterations=4)
    out = tmp_path / "out"
    killed = start(recipes, out, HANG)
    until((out / "a" / "state" / "state.pt").exists)
    other = start(recipes, out)
    until((out / "b" / METRICS).exists)
    time.sleep(0.5)
    assert other.poll() is None, "it waits for the run that the first one holds"
    assert not (out / "a" / METRICS).exists()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    finished = told(other)
    assert made_here(finished) == {"a", "b"}
    alone = train_recipes([recipes], tmp_path / "alone", [])
    assert adapters(finished["runs"]) == adapters(metrics for _, metrics in alone)


def train(*arguments, code):
    done = CliRunner().invoke(app, ["train", *map(str, arguments), "-q"])
    assert done.exit_code == code, done.output
    return done


def test_a_recipe_that_fails_stops_no_other(tmp_path):
    recipes, out = write(tmp_path / "recipes", "a", "b", "c"), tmp_path / "out"
    text = (recipes / "b.yaml").read_text()
    (recipes / "b.yaml").write_text(text + "optimizer: {learning_rate: 1.0e+30}\n")
    head, a, c, failed = train(recipes, "-o", out, "--share", code=1).stdout.splitlines()
    assert head.split()[-1] == "made"
    assert [a.split()[0], a.split()[-1]] == [str(out / "a"), "here"]
    assert [c.split()[0], c.split()[-1]] == [str(out / "c"), "here"]
    assert failed.startswith(f"{out / 'b'}: failed: iteration")
    again = json.loads(train(recipes, "-o", out, "--share", "--json", code=1).stdout)
    assert [run["made"] for run in again["runs"]] == ["elsewhere"] * 2
    assert list(again["failed"]) == [str(out / "b")]


def test_another_recipes_folder_is_refused_before_anything_starts(tmp_path, monkeypatch):
    recipes, out = write(tmp_path / "recipes", "a", "b"), tmp_path / "out"
    train_recipes([recipes / "b.yaml"], out / "b", [])
    monkeypatch.setattr(runs, "_trained", None)
    with pytest.raises(BadInput, match="belongs to another recipe"):
        share_recipes([recipes], out, ["training.seed=7"])
    (out / "b" / METRICS).unlink()
    with pytest.raises(BadInput, match="holds other files"):
        share_recipes([recipes], out, [])
    with held(out / "b"), pytest.raises(TypeError):  # who holds it looks at it; "a" is begun
        share_recipes([recipes], out, [])


def test_what_share_cannot_do_is_refused(tmp_path, monkeypatch):
    recipes = write(tmp_path / "recipes", "a")
    assert "expected one" in train(recipes, "--share", "--force", code=2).stderr
    monkeypatch.setattr(runs, "processes", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(BadInput, match="torchrun"):
        share_recipes([recipes], tmp_path / "out", [])
    assert not (tmp_path / "out").exists()
