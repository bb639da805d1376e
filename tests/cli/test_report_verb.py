"""`sdd-lora report` as a user types it."""

import json
import subprocess
import sys

from support.made_up_bench import write


def report(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "sdd_lora", "report", *map(str, arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_report_is_written_once_unless_forced(tmp_path):
    write(tmp_path, methods=("sd", "neg", "sdd", "stack"))
    done = report(tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert told == {"report": str(tmp_path / "report.html"), "bytes": len(page.encode())}
    assert page.startswith("<!doctype html>")
    again = report(tmp_path)
    assert again.returncode == 2 and "--force" in again.stderr
    assert report(tmp_path, "--force").returncode == 0
    assert report(tmp_path, "-o", tmp_path / "other.html").returncode == 0


def test_a_folder_without_results_is_bad_input(tmp_path):
    done = report(tmp_path)
    assert done.returncode == 2
    assert "results.json" in done.stderr and "Traceback" not in done.stderr


def test_reporting_imports_no_torch():
    code = "import sys; import sdd_lora.bench.report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
