"""Two processes with one trajectory each learn what one process with two learns."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def losses(tmp_path, processes, batch):
    out = tmp_path / f"{processes}.json"
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(processes), "tests/training/losses_of_a_run.py", str(batch), str(out)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True,
    )  # fmt: skip
    return json.loads(out.read_text())


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs libuv there")
def test_two_processes_equal_one_of_twice_the_batch(tmp_path):
    one, two = losses(tmp_path, 1, 2), losses(tmp_path, 2, 1)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert len(set(one["losses"])) == 4
    assert two["passes"] == one["passes"]
