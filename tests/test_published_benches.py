"""The tables under adapters/demo/bench: whole, and told as they are.

`python -m tests.test_published_benches` prints the tables of the READMEs.
"""

from pathlib import Path

import pytest

from sdd_lora.bench import text
from sdd_lora.bench.bench_file import Bench
from sdd_lora.bench.report import best_that_keeps
from sdd_lora.bench.results import ALL, Results, find_row
from sdd_lora.bench.text import percent

ROOT = Path(__file__).parent.parent
FOLDERS = sorted(path.parent for path in ROOT.glob("adapters/demo/bench/*/results.json"))
pytestmark = pytest.mark.skipif(not FOLDERS, reason="no table of a bench is published yet")
SHOWN = ("concept drawn", "noun kept", "noun kept without the style", "style kept")


def table(folder: Path) -> list[str]:
    """A line a method: what is erased and what is kept, with the kept nouns' difference to sd."""
    results = Results.load(folder)
    shown = [name for name in SHOWN if name in results.headline()]
    heads = " | ".join(text.heading(results, name) for name in shown)
    lines = [
        f"| method | {heads} | nouns lost, points |",
        "|---" * (2 + len(shown)) + "|",
    ]
    for method in results.method_names():
        cells = [text.cell(results, method, name) for name in shown]
        lines.append(f"| {method} | {' | '.join(cells)} | {_lost(results, method)} |")
    return lines


def _lost(results: Results, method: str) -> str:
    row = find_row(results.rows, method, "noun kept", ALL)
    if row is None or row.difference is None:
        return "–"
    low, high = row.ci95_difference
    return f"{percent(-row.difference)} ({percent(-high)} … {percent(-low)})".replace("-", "−")


def best(folder: Path) -> str:
    """The sentence that says which method removes most of those that keep."""
    row, base = best_that_keeps(Results.load(folder))
    return (
        f"Of the methods that lose at most 3 points of kept nouns, **{row.method}** removes the "
        f"most: {row.measure} in {percent(row.value)} % of images, against {percent(base.value)} %."
    )


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_each_is_the_whole_table_of_its_bench(folder):
    results = Results.load(folder)
    bench = Bench.load(ROOT / "recipes" / "bench" / f"{folder.name}.yaml")
    assert results.command == f"sdd-lora evaluate recipes/bench/{folder.name}.yaml"
    assert sorted(results.method_names()) == sorted(bench.methods) and not results.missing
    assert {v.name for v in results.variations} == set(bench.variations)
    assert {row.attack for row in results.attacks} == set(bench.attacks.chosen)
    for method in bench.methods:
        row = find_row(results.rows, method, "concept drawn", ALL)
        assert row.n == bench.seeds.erased
    assert results.sampling == bench.sampling.model_dump(exclude={"batch"})
    assert Bench.load(folder / "bench.yaml").sha256_of_images == bench.sha256_of_images


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_its_files_say_the_same(folder):
    results = Results.load(folder)
    assert (folder / "results.md").read_text("utf-8") == text.to_markdown(results)
    assert (folder / "results.csv").read_text("utf-8") == text.to_csv(results)
    page = (folder / "report.html").read_text("utf-8")
    assert results.date in page and all(method in page for method in results.method_names())
    index = (ROOT / "adapters" / "demo" / "bench" / "README.md").read_text("utf-8")
    assert best(folder) in index.replace("\n", " ")
    for line in table(folder):
        assert line in index.splitlines()


def test_the_readmes_short_table_has_the_first_tables_numbers():
    """A row ends in what is drawn and the nouns lost, as that method's row of the whole table."""
    folder = next(folder for folder in FOLDERS if folder.name == "demo-single")
    results = Results.load(folder)
    drawn = {name: text.cell(results, name, "concept drawn") for name in results.method_names()}
    readme = (ROOT / "README.md").read_text("utf-8").splitlines()
    for method in ("sd", "esd-x-1", "sdd-full", "sdd", "sdd-preserve"):
        rate, _, interval = drawn[method].partition(" ")
        row = f"| {rate} % {interval} | {_lost(results, method)} |"
        assert [line for line in readme if line.endswith(row)]


if __name__ == "__main__":
    for folder in FOLDERS:
        print("\n".join([folder.name, best(folder), "", *table(folder), ""]))
