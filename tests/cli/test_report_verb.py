"""`sdd-lora report` as a user types it."""

import subprocess
import sys

from support.made_up_bench import write


def test_a_report_is_written_once_unless_forced(call, ask, refused, tmp_path):
    write(tmp_path, methods=("sd", "neg", "sdd", "stack"))
    told = ask("report", tmp_path)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert told == {"report": str(tmp_path / "report.html"), "bytes": len(page.encode())}
    assert page.startswith("<!doctype html>")
    assert "--force" in refused("report", tmp_path)
    call("report", tmp_path, "--force")
    call("report", tmp_path, "-o", tmp_path / "other.html")


def test_a_folder_without_results_is_bad_input(refused, tmp_path):
    assert "results.json" in refused("report", tmp_path)


def test_reporting_imports_no_torch():
    code = "import sys; import sdd_lora.bench.report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
