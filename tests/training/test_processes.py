"""Two processes with one trajectory each learn what one process with two learns."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training.losses_of_a_run import WAYS, learnt, trainer_of

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs libuv there")


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    return tmp_path_factory.mktemp("state") / "state.pt"


def two_processes(state):
    output = state.with_name("learnt.json")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    command += [Path(__file__).with_name("losses_of_a_run.py"), 1, state, output]
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def two(state):
    """What two processes learnt in each way, a run that was left unfinished beside them."""
    return two_processes(state)


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_equal_one_of_twice_the_batch(two, way):
    one = learnt(trainer_of(way, 2))
    assert (one["processes"], two[way]["processes"]) == (1, 2)
    assert two[way]["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert len(set(one["losses"])) == 4
    assert two[way]["passes"] == one["passes"]


def test_two_processes_resume_with_the_trajectories_of_both(two, state):
    assert state.exists()
    assert two_processes(state)["fast"] == two["fast"]
