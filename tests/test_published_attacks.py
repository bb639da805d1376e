"""The table of attacks under adapters/demo/attacks: told as it is, where it is told.

`python -m tests.test_published_attacks` prints it, and writes the rows of `CARDS` into their
metrics.json and cards.
"""

from pathlib import Path

import pytest

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.card import render_card
from sdd_lora.adapter.metrics import Metrics, WithstoodRow
from sdd_lora.attacks.settings import titled
from sdd_lora.bench import text
from sdd_lora.bench.bench_file import Bench
from sdd_lora.bench.comparisons import attack_comparisons
from sdd_lora.bench.results import AttackRow, Results

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "adapters" / "demo" / "attacks"
#: rows of the table → the folders whose cards tell them
CARDS = {"weapons": ROOT / "adapters/demo/weapons", "robust": ROOT / "adapters/demo/weapons-robust"}
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="no table of attacks is published yet")


def table() -> list[str]:
    """The lines of the table of attacks."""
    results = Results.load(FOLDER)
    (comparison,) = attack_comparisons(results)
    heads, rows = text.comparison_table(results, comparison)
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def rows_of(method: str) -> list[WithstoodRow]:
    """What a card says of a row of the table: beside the model itself under the same attack, or,
    where the attack is on adapters alone, under none."""
    rows = Results.load(FOLDER).attacks
    base = {row.attack: row for row in rows if row.method == "sd"}
    widest = max(base.values(), key=lambda row: row.n)
    return [_beside(row, base.get(row.attack), widest) for row in rows if row.method == method]


def _beside(row: AttackRow, base: AttackRow | None, unattacked: AttackRow) -> WithstoodRow:
    before = (base.after, base.ci95_after) if base else (unattacked.before, unattacked.ci95_before)
    return WithstoodRow(
        attack=titled(row.attack),
        access=row.access,
        strength=row.effort,
        before=before[0],
        after=row.after,
        n=row.n,
        ci95_before=before[1],
        ci95_after=row.ci95_after,
        unet_passes=row.unet_passes,
    )


def test_its_files_and_the_page_say_the_same():
    results = Results.load(FOLDER)
    assert (FOLDER / "results.md").read_text("utf-8") == text.to_markdown(results)
    page = (ROOT / "adapters" / "README.md").read_text("utf-8").splitlines()
    assert not [line for line in table() if line not in page]
    bench = Bench.load(ROOT / "recipes" / "bench" / "demo-attacks.yaml")
    assert Bench.load(FOLDER / "bench.yaml").sha256_of_images == bench.sha256_of_images


def test_each_attack_finds_the_concept_in_the_model_that_nothing_protects():
    found = {row.attack: row.after for row in Results.load(FOLDER).attacks if row.method == "sd"}
    assert found and min(found.values()) >= 0.9


@pytest.mark.parametrize("method", CARDS)
def test_cards_say_what_their_adapters_withstand(method):
    assert Metrics.read(CARDS[method]).attacks == rows_of(method)
    card = (CARDS[method] / "README.md").read_text("utf-8")
    assert "## What it withstands, and what not" in card and "| completion 5 |" in card


if __name__ == "__main__":
    print("\n".join(table()))
    for method, folder in CARDS.items():
        metrics = Metrics.read(folder) | {"attacks": rows_of(method)}
        (folder / "metrics.json").write_text(metrics.to_json(), "utf-8")
        (folder / "README.md").write_text(render_card(Adapter.load(folder), metrics), "utf-8")
