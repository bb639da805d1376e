"""The command that measures a GPU works, in small and without one."""

import json
import sys

from benchmarks import bench_gpu


def test_tiny_numbers_are_written_and_not_measured_again(tmp_path, monkeypatch, capsys):
    file = tmp_path / "numbers.jsonl"
    parts = [x for part in ("card", "bake") for x in ("--only", part)]
    arguments = ["bench_gpu.py", "--tiny", "--seconds", "0", "-o", str(file), *parts]
    monkeypatch.setattr(sys, "argv", arguments)
    bench_gpu.main()
    found = {line["name"]: line for line in map(json.loads, file.read_text().splitlines())}
    assert found["card"]["torch"] and found["matrix products, bf16"]["TFLOP/s"] > 0
    assert found["bake"]["seconds"] > 0
    assert "failed" not in capsys.readouterr().out
    before = file.read_text()
    bench_gpu.main()
    assert file.read_text() == before and "bake: measured already" in capsys.readouterr().out
