"""The tables under adapters/demo/bench: whole, and told as they are.

`python -m tests.test_published_benches` prints the tables of the READMEs.
"""

import re
import shlex
from pathlib import Path

import pytest

from sdd_lora.bench import text
from sdd_lora.bench.bench_file import Bench, chosen
from sdd_lora.bench.held_out import NAMED, NOT_NAMED
from sdd_lora.bench.report import best_that_keeps
from sdd_lora.bench.results import ALL, Results, find_row
from sdd_lora.bench.text import percent
from sdd_lora.cli.common import parse_overrides

ROOT = Path(__file__).parent.parent
FOLDERS = sorted(path.parent for path in ROOT.glob("adapters/demo/bench/*/results.json"))
pytestmark = pytest.mark.skipif(not FOLDERS, reason="no table of a bench is published yet")
INDEX = ROOT / "adapters" / "demo" / "bench" / "README.md"
SHOWN = ("concept drawn", "noun kept", "noun kept without the style", "style kept")


def table(folder: Path) -> list[str]:
    """A line a method: what is erased and what is kept, with the kept nouns' difference to sd; of
    nouns that recipes name and of others apart, where a bench has both."""
    results = Results.load(folder)
    shown = [name for name in SHOWN if name in results.headline()]
    heads = [text.heading(results, name) for name in shown]
    groups = {ALL: "nouns lost, points"}
    if any(row.group == NOT_NAMED for row in results.rows):
        groups = {NAMED: "named nouns lost, points", NOT_NAMED: "others lost, points"}
    lines = [
        f"| method | {' | '.join([*heads, *groups.values()])} |",
        "|---" * (1 + len(shown) + len(groups)) + "|",
    ]
    for method in results.method_names():
        cells = [text.cell(results, method, name) for name in shown]
        cells += [_lost(results, method, group) for group in groups]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def rows_of(bench: str) -> set[str]:
    """The methods that some folder has of a bench."""
    found = [Results.load(folder) for folder in FOLDERS]
    return {m for results in found if results.bench == bench for m in results.method_names()}


def _lost(results: Results, method: str, group: str = ALL) -> str:
    row = find_row(results.rows, method, "noun kept", group)
    if row is None or row.difference is None:
        return "–"
    low, high = row.ci95_difference
    told = f"{percent(-row.difference)} ({percent(-high)} … {percent(-low)})"
    return re.sub(r"-(?!0\.0\b)", "−", told).replace("-", "")


def best(folder: Path) -> str:
    """The sentence that says which method removes most of those that keep."""
    row, base = best_that_keeps(Results.load(folder))
    return (
        f"Of the methods that lose at most 3 points of kept nouns, **{row.method}** removes the "
        f"most: {row.measure} in {percent(row.value)} % of images, against {percent(base.value)} %."
    )


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_each_is_a_table_of_its_bench_and_rows_that_it_lacks_are_named(folder):
    results, index = Results.load(folder), INDEX.read_text("utf-8")
    bench_file = f"recipes/bench/{results.bench}.yaml"
    command, *changes = results.command.split(" --set ")
    overrides = parse_overrides([change for told in changes for change in shlex.split(told)])
    bench = Bench.load(ROOT / bench_file, overrides=overrides)
    methods, rows_elsewhere = results.method_names(), rows_of(results.bench)
    if left_out := set(bench.methods) - set(methods):
        assert command == f"sdd-lora evaluate {bench_file} --methods {','.join(methods)}"
        assert all(f"`{method}`" in index for method in left_out - rows_elsewhere)
    else:
        assert command == f"sdd-lora evaluate {bench_file}"
    assert not results.missing
    bench = chosen(bench, methods)
    assert {v.name for v in results.variations} == set(bench.variations)
    attacked = bench.attacks.chosen if bench.attacks else ()
    assert {row.attack for row in results.attacks} == set(attacked)
    for method in methods:
        row = find_row(results.rows, method, "concept drawn", ALL)
        assert row.n == bench.seeds.erased
        if method in bench.recipes:  # the command trains what the row was drawn with
            assert results.methods[method]["recipe_sha256"] == bench.recipe(method).sha256
    assert results.sampling == bench.sampling.model_dump(exclude={"batch"})
    assert Bench.load(folder / "bench.yaml").sha256_of_images == bench.sha256_of_images


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_its_files_say_the_same(folder):
    results = Results.load(folder)
    assert (folder / "results.md").read_text("utf-8") == text.to_markdown(results)
    assert (folder / "results.csv").read_text("utf-8") == text.to_csv(results)
    page = (folder / "report.html").read_text("utf-8")
    assert results.date in page and all(method in page for method in results.method_names())
    index = INDEX.read_text("utf-8")
    assert best(folder) in index.replace("\n", " ")
    for line in table(folder):
        assert line in index.splitlines()


def test_the_readmes_table_has_the_numbers_of_the_held_out_ones():
    """A row ends in what is drawn and the nouns lost, as a row of that method in the tables."""
    readme, shown = (ROOT / "README.md").read_text("utf-8").splitlines(), {}
    for results in map(Results.load, FOLDERS):
        for method in results.method_names() if results.bench == "demo-held-out" else ():
            rate, _, interval = text.cell(results, method, "concept drawn").partition(" ")
            lost = [_lost(results, method, group) for group in (NAMED, NOT_NAMED)]
            row = f"| {rate} % {interval} | {lost[0]} | {lost[1]} |"
            shown[method] = shown.get(method, False) or any(li.endswith(row) for li in readme)
    left_out = {"closed-form-sdd", "sdd-gated", "baked", "esd-x-3", "esd-u-3", "esd-x-1-lora"}
    left_out |= {"sld-weak", "sld-medium"}  # within chance of the model's own
    assert {method for method, found in shown.items() if not found} <= left_out


if __name__ == "__main__":
    for folder in FOLDERS:
        print("\n".join([folder.name, best(folder), "", *table(folder), ""]))
