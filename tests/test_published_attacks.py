"""The tables of attacks under adapters/demo: told as they are, where they are told.

`python -m tests.test_published_attacks` prints them, and writes the rows of `CARDS` into their
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
#: the same attacks of one strength beside a model that never saw the concept; one at 20 prompts
BESIDE = [FOLDER.with_name(f"attacks-{name}") for name in ("oracle", "inversion")]
FROM_WORDS = ROOT / "adapters/demo/from-words/README.md"
#: attacks that find the concept less often in what nothing protects: they prove little of others
WEAK_ON_SD = {"another_adapter", "inversion 75"}
#: rows of the table → the folders whose cards tell them
CARDS = {"weapons": ROOT / "adapters/demo/weapons", "robust": ROOT / "adapters/demo/weapons-robust"}
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="no table of attacks is published yet")


def table(folder: Path = FOLDER) -> list[str]:
    """The lines of a table of attacks."""
    results = Results.load(folder)
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


def lines_of(method: str) -> list[str]:
    """A row of the table as lines of its own: attack, strength, the model itself, the eraser."""
    heads = "| attack | open to | strength | without | with the eraser | images |"
    cells = [
        f"| {row.attack} | {row.access} | {row.strength or '–'} | {text.percent(row.before)} % | "
        f"{text.percent(row.after)} % ({text.percent(row.ci95_after[0])}–"
        f"{text.percent(row.ci95_after[1])}) | {row.n} |"
        for row in rows_of(method)
    ]
    return [heads, "|---" * 6 + "|", *cells]


@pytest.mark.parametrize("folder", [FOLDER, *BESIDE], ids=lambda folder: folder.name)
def test_its_files_and_the_page_say_the_same(folder):
    results = Results.load(folder)
    assert (folder / "results.md").read_text("utf-8") == text.to_markdown(results)
    page = (ROOT / "adapters" / "README.md").read_text("utf-8").splitlines()
    assert not [line for line in table(folder) if line not in page]


def test_the_table_is_that_of_its_bench_whole():
    bench = Bench.load(ROOT / "recipes" / "bench" / "demo-attacks.yaml")
    assert Bench.load(FOLDER / "bench.yaml").sha256_of_images == bench.sha256_of_images
    results = Results.load(FOLDER)
    assert results.method_names() == bench.methods
    without_encoder = {*bench.attacks.chosen} - {"text_encoder"}  # none of these has its own
    assert {row.attack for row in results.attacks} == without_encoder
    assert results.command == "sdd-lora evaluate recipes/bench/demo-attacks.yaml"


def test_each_attack_finds_the_concept_in_the_model_that_nothing_protects():
    found = {row.attack: row.after for row in Results.load(FOLDER).attacks if row.method == "sd"}
    assert len(found) > 15 and {name for name, rate in found.items() if rate < 0.9} == WEAK_ON_SD


def test_each_attack_breaks_the_eraser_that_is_there_to_be_broken():
    found = {row.attack: row.after for row in Results.load(FOLDER).attacks if row.method == "weak"}
    assert len(found) > 15 and min(found.values()) >= 0.5


def test_the_page_of_erasers_from_words_has_their_row():
    page = FROM_WORDS.read_text("utf-8").splitlines()
    assert not [line for line in lines_of("from-words") if line not in page]


@pytest.mark.parametrize("method", CARDS)
def test_cards_say_what_their_adapters_withstand(method):
    assert Metrics.read(CARDS[method]).attacks == rows_of(method)
    card = (CARDS[method] / "README.md").read_text("utf-8")
    assert "## What it withstands, and what not" in card and "| completion 5 |" in card


if __name__ == "__main__":
    for place in (FOLDER, *BESIDE):
        print("\n".join([place.name, *table(place), ""]))
    print("\n".join(lines_of("from-words")))
    for method, folder in CARDS.items():
        metrics = Metrics.read(folder) | {"attacks": rows_of(method)}
        (folder / "metrics.json").write_text(metrics.to_json(), "utf-8")
        (folder / "README.md").write_text(render_card(Adapter.load(folder), metrics), "utf-8")
