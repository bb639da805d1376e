"""Sheets are made blind and scored; what is written of the detectors' errors is what they print."""

import json
import re
from pathlib import Path

import pytest
from benchmarks.blind_sheet import make, score

ROOT = Path(__file__).parents[2]
BENCHES = [ROOT / "adapters" / "demo" / "bench" / name for name in ("demo-single", "demo-multi")]
ERRORS = re.compile(r"(\w+): agrees (\d+)/(\d+) .* misses (\d+)/(\d+) .* wrongly (\d+)/(\d+) ")


@pytest.mark.parametrize(("number", "skip"), [(1, 0), (2, 300)])
def test_the_published_errors_are_those_of_the_labelled_sheets(tmp_path, capsys, number, skip):
    sheet = tmp_path / "sheet"
    make(BENCHES, sheet, 300, skip, 0)
    assert "concept" not in (sheet / "sheet-01.png").name and len(list(sheet.iterdir())) >= 6
    labels = (Path(__file__).parent / "blind" / f"sheet-{number}.txt").read_text()
    if labels.split()[0] not in capsys.readouterr().out:
        pytest.skip("the pages show other pictures now than those that were labelled")
    (sheet / "labels.txt").write_text(labels)
    score(sheet, thresholds=False)
    printed = {m[1]: [*map(int, m.groups()[1:])] for m in ERRORS.finditer(capsys.readouterr().out)}
    text = (ROOT / "sdd_lora" / "demo" / "README.md").read_text("utf-8")
    for name in ("judge", "traces"):
        agrees, n, missed, there, wrong, none = printed[name]
        assert there + none == n
        rates = [f"{100 * a / b:.1f}" for a, b in ((agrees, n), (missed, there), (wrong, none))]
        assert f"| {name}, sheet {number} | {' | '.join(rates)} |" in text


def test_labels_of_other_pictures_are_refused(tmp_path):
    make(BENCHES[:1], tmp_path / "sheet", 3, 0, 0)
    key = json.loads((tmp_path / "sheet" / "key.json").read_text())
    assert len(key) == 3 and {"made_by", "prompt", "concepts"} == key[0].keys()
    (tmp_path / "sheet" / "labels.txt").write_text("0000000000000000 wtb")
    with pytest.raises(SystemExit, match="other pictures"):
        score(tmp_path / "sheet", thresholds=False)
