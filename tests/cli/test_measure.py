"""measure from the command line: the numbers of an adapter that somebody else made."""

import json

import pytest
from support.adapters import random_adapter

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.runs import measure as runs

RECIPE = """
name: measured
model: demo
concepts: [bomb]
measure:
  prompts: {concept: [a drawing of a bomb], kept: [a drawing of a cat]}
  images: 2
  steps: 4
  detector: judge
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "r.yaml").write_text(RECIPE)
    random_adapter(strength=0.5, seed=1).save(tmp_path / "a.safetensors")
    random_adapter(strength=0.5, seed=2).save(tmp_path / "b.safetensors")
    (tmp_path / "run").mkdir()
    random_adapter(strength=0.5, seed=3).save(tmp_path / "run" / "adapter.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_several_are_measured_as_their_sum(ask, folder):
    adapters = ("a.safetensors", "b.safetensors:-0.5")
    told = ask("measure", *adapters, "--recipe", "r.yaml", "-o", "both")
    metrics = json.loads((folder / "both" / "metrics.json").read_text())
    assert told == {"folder": "both"} | metrics
    assert {(m["name"], m["n"]) for m in metrics["measures"]} >= {("concept drawn", 2)}
    both = Adapter.load(folder / "both")
    assert both.metadata["measures"] == metrics["measures"]
    assert [part["weight"] for part in both.metadata["merged_from"]] == [1.0, -0.5]
    a, b = Adapter.load(folder / "a.safetensors"), Adapter.load(folder / "b.safetensors")
    module = next(iter(a.factors))
    expected = a.delta(module) - 0.5 * b.delta(module)
    assert (both.delta(module) - expected).norm() < 2e-3 * expected.norm()
    card = (folder / "both" / "README.md").read_text()
    assert "## Measured on demo\n" in card and "a × 1" not in card
    assert (folder / "both" / "before-after.png").stat().st_size > 1000


def test_one_adapter_gets_the_name_too_and_stays_itself(call, folder, monkeypatch):
    measured = []

    def note(adapter, *_, **__):
        measured.append(adapter)
        return {"measures": []}

    monkeypatch.setattr(runs, "measure", note)
    for named in ([], ["--name", "mine"]):
        call("measure", "a.safetensors", "--recipe", "r.yaml", "-o", "out", *named)
    assert [adapter.name for adapter in measured] == ["random", "mine"]
    assert measured[0].identity == measured[1].identity


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.safetensors", "-o", "."], "holds other files"),
        (["a.safetensors", "-o", ".", "--force"], "holds other files"),
        (["run", "-o", "run", "--force"], "is measured and written at once"),
        (["gone.safetensors", "-o", "out"], "gone.safetensors"),
        (["a.safetensors", "-o", "out", "--set", "measure.detector=none"], "prompts to measure"),
    ],
)
def test_bad_input_is_one_clear_line(refused, folder, arguments, message):
    assert message in refused("measure", *arguments, "--recipe", "r.yaml")
    assert not (folder / "out").exists()


def test_metrics_say_how_an_adapter_was_measured(call, folder):
    arguments = ["measure", "a.safetensors", "--recipe", "r.yaml", "-o", "out"]
    arguments += ["--precision", "bf16", "--set", "measure.steps=2"]
    call(*arguments)
    told = json.loads((folder / "out" / "metrics.json").read_text())["measured_with"]
    expected = {"precision": "bf16", "steps": 2, "detector": "judge", "images": 2}
    assert expected.items() <= told.items() and "prompts" not in told
