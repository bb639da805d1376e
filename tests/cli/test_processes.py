"""Verbs under torchrun: two processes share the work, and one tells the result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
PROMPTS = 'prompt,seed,guidance\na cat,5,4.0\n"a bomb,\nnoto style",6,9.5\na bus,7,4.0\n'
RECIPE = """
name: short
model: demo
concepts: [bomb, axe]
rollout: {steps: 3}
training: {iterations: 2}
"""
BENCH = """
name: small
model: demo
concepts: [bomb, axe]
prompts: {erased: {weapons: [a bomb, an axe]}, kept: {animals: [a cat, a dog]}}
seeds: {first: 5, erased: 2, kept: 2}
sampling: {steps: 2, guidance: 3.0, batch: 2}
methods: [sd, neg]
measures: [judge]
"""
GENERATE = ["generate", "demo", "--prompts", "p.csv", "--steps", "3", "-q", "-o"]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs libuv there")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two processes drew, trained and evaluated, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    for name, text in (("p.csv", PROMPTS), ("r.yaml", RECIPE), ("b.yaml", BENCH)):
        (folder / name).write_text(text)
    calls = [
        [*GENERATE, "drawn"],
        ["train", "r.yaml", "-q", "-o", "run"],
        ["evaluate", "b.yaml", "-q", "-o", "bench"],
    ]
    program = ROOT / "tests" / "support" / "verbs_in_turn.py"
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    done = subprocess.run(
        [sys.executable, "-m", *launch, json.dumps(calls)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def lines_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_one_of_them_prints_each_result(two):
    _, printed = two
    assert printed.count("3 in drawn") == 1
    assert printed.count("nothing was counted") == 1
    assert printed.count("concept drawn") == 1


def test_they_draw_what_one_does(two, call, monkeypatch):
    folder, _ = two
    monkeypatch.chdir(folder)
    call(*GENERATE, "alone")
    assert lines_of(folder / "drawn" / "manifest.jsonl") == lines_of(
        folder / "alone" / "manifest.jsonl"
    )
    left = sorted(p.name for p in (folder / "drawn").iterdir() if p.suffix != ".png")
    assert left == ["manifest.jsonl", "settings.json"]
    for index in range(3):
        one, other = (
            np.asarray(Image.open(folder / name / f"{index:05d}.png")).astype(int)
            for name in ("alone", "drawn")
        )
        difference = np.abs(one - other)
        assert difference.max() <= 1 and (difference > 0).mean() <= 1e-3


def test_they_write_one_run(two):
    metrics = json.loads((two[0] / "run" / "metrics.json").read_text())
    assert metrics["training"]["iterations"] == 2


def test_they_share_the_images_of_a_bench(two):
    folder = two[0] / "bench"
    results = json.loads((folder / "results.json").read_text())
    assert {row["method"] for row in results["rows"]} == {"sd", "neg"}
    assert not list(folder.rglob("manifest.*.jsonl"))
