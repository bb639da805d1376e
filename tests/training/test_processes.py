"""Two processes with one trajectory each learn what one process with two learns."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


WAYS = {
    "paper": {"rollout": {"steps": 4}},
    "fast": {"rollout": {"steps": 6, "points": 3}, "lora": {"init": "closed-form"}},
}


def start(tmp_path, processes, batch, way, *state):
    out = tmp_path / f"{processes}.json"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    program = ["tests/training/losses_of_a_run.py", batch, json.dumps(WAYS[way]), out, *state]
    subprocess.run(
        [sys.executable, *map(str, [*torchrun, *program])],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        check=True,
        capture_output=True,
    )
    return json.loads(out.read_text()) if out.exists() else None


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs libuv there")
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_equal_one_of_twice_the_batch(tmp_path, way):
    one, two = start(tmp_path, 1, 2, way), start(tmp_path, 2, 1, way)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert len(set(one["losses"])) == 4
    assert two["passes"] == one["passes"]


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs libuv there")
def test_two_processes_resume_with_the_trajectories_of_both(tmp_path):
    whole = start(tmp_path, 2, 1, "fast")
    (tmp_path / "2.json").unlink()
    state = tmp_path / "state" / "state.pt"
    assert start(tmp_path, 2, 1, "fast", state) is None and state.exists()
    assert start(tmp_path, 2, 1, "fast", state) == whole
