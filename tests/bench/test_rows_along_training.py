"""Snapshots of a row: drawn as a curve, one chosen for the table; what rows took; words alone."""

import json

import pytest
from support.adapters import random_adapter
from support.benches import RECIPE, SMALL, images_of, lines_of, never_train, parsed, ran, same

from sdd_lora.attacks.settings import Attacks, ClipSkip
from sdd_lora.bench import text
from sdd_lora.bench.bench_file import Bench
from sdd_lora.bench.choice import choice_rows
from sdd_lora.bench.grid import grid_of
from sdd_lora.bench.report import render_report
from sdd_lora.bench.results import ImageRecord, find_row
from sdd_lora.bench.run import draw_shard
from sdd_lora.bench.sections import VariationOf
from sdd_lora.errors import BadInput
from sdd_lora.io.distributed import Shard
from sdd_lora.measures.base import MeasureInfo
from sdd_lora.measures.intervals import bootstrap_groups
from sdd_lora.runs.folder import snapshot_file

CHOICE = {
    "methods": ["sdd"],
    "prompts": {"erased": {"w": ["the bomb"]}, "kept": {"a": ["the cat"]}},
    "seeds": {"first": 900, "erased": 1, "kept": 1},
}


def train_with_a_snapshot(recipe, folder, resume):
    """The result is stronger than its snapshot."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    random_adapter(0.5, seed=1).save(folder / "adapter.safetensors")
    path = snapshot_file(folder, 1)
    path.parent.mkdir()
    random_adapter(0.01, seed=1).save(path)
    told = {"training": {"iterations": 2, "unet_passes": 40, "seconds": 4.0}}
    told |= {"snapshots": [{"iteration": 1, "unet_passes": 20, "seconds": 2.0}]}
    told |= {"adapter": {"parameters": 7, "bytes": 900}, "tool": "sdd_lora 0", "versions": {}}
    (folder / "metrics.json").write_text(json.dumps(told))


def bench_in(folder, monkeypatch):
    monkeypatch.setenv("SDD_LORA_CACHE", str(folder / "cache"))
    (folder / "r.yaml").write_text(RECIPE)
    (folder / "b.yaml").write_text(SMALL)
    changes = {
        "methods": ["sd", "neg", "sdd"],
        "recipes": {"sdd": {"file": "r.yaml", "set": {"training.snapshot_every": 1}}},
        "seeds": {"first": 5, "erased": 1, "kept": 1},
        "variations": {
            "training": {"field": "snapshot", "values": [1, 2], "methods": ["sdd"], "erased": 1}
        },
    }
    return Bench.load(folder / "b.yaml", overrides=changes)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    return bench_in(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def run_along_training(tmp_path_factory):
    """The bench's results, and its folder."""
    folder = tmp_path_factory.mktemp("along")
    with pytest.MonkeyPatch.context() as patch:
        return ran(bench_in(folder, patch), folder / "out", train_with_a_snapshot), folder / "out"


def test_snapshots_are_drawn_along_the_training(run_along_training):
    results, folder = run_along_training
    (variation,) = results.variations
    assert {row.setting for row in variation.rows} == {1.0, 2.0}
    drawn = images_of(folder)
    root = folder / "images" / "training"
    images = [(root / s / "sdd" / "00000.png").read_bytes() for s in ("1.0", "2.0")]
    assert images[0] != images[1]
    assert images[1] == (folder / "images" / "sdd" / "00000.png").read_bytes()
    assert not same(drawn["sdd", "weapons", 5], drawn["sd", "weapons", 5])
    page = render_report(folder)
    assert "along its training, a dot a snapshot" in page


def test_costs_say_what_was_spent_and_told(run_along_training):
    results, _ = run_along_training
    rows = {row[0]: row[1:] for row in text.cost_table(results)[1]}
    assert rows["sdd"] == ["40", "4", "7", "900", "2 phrases"]
    assert rows["neg"] == ["0", "0", "0", "0", "2 words"]
    assert rows["sd"][-1] == "nothing"


def test_the_chosen_snapshot_stands_in_the_table(bench, tmp_path, monkeypatch):
    bench = bench.model_copy(
        update={
            "choice": parsed(
                **bench.model_dump(mode="json", exclude={"choice"}), choice=CHOICE
            ).choice
        }
    )
    results = ran(bench, tmp_path / "out", train_with_a_snapshot)
    chosen = {row.iteration for row in results.choices if row.chosen}
    assert len(results.choices) == 2 and len(chosen) == 1
    (cost,) = [cost for cost in results.costs if cost.method == "sdd"]
    assert cost.unet_passes == {1: 20, 2: 40}[chosen.pop()]
    root = tmp_path / "out" / "images"
    at = results.methods["sdd"]["snapshot"]
    of_table = (root / "sdd" / "00000.png").read_bytes()
    assert of_table == (root / "training" / f"{at}.0" / "sdd" / "00000.png").read_bytes()


def test_a_shard_leaves_rows_that_are_still_to_be_chosen(bench, tmp_path):
    bench = bench.model_copy(
        update={
            "variations": {},
            "choice": parsed(
                **bench.model_dump(mode="json", exclude={"choice"}), choice=CHOICE
            ).choice,
        }
    )
    draw_shard(bench, tmp_path / "out", train_with_a_snapshot, Shard(1, 1))
    assert not (tmp_path / "out" / "images" / "sdd").exists()
    assert (tmp_path / "out" / "images" / "choice" / "1" / "sdd").is_dir()


def record(iteration, kind, name, there):
    fields = {"method": "sdd", "variation": "choice", "setting": iteration, "file": "f"}
    return ImageRecord(**fields, kind=kind, set="s", prompt="p", seed=0, values={name: there})


def test_the_rule_is_the_greatest_difference_and_the_earliest_of_equals():
    info = {
        "drawn": MeasureInfo(kind="rate", of="erased", better="lower"),
        "kept": MeasureInfo(kind="rate", of="kept", better="higher"),
    }
    rates = {1: (4, 4), 2: (1, 3), 3: (0, 2), 4: (2, 4)}  # of 4 each

    class Cell:
        method = "sdd"

        def __init__(self, iteration):
            self.conditions = type("C", (), {"snapshot": iteration})

    def records(cell):
        counts = zip(("erased", "kept"), info, rates[cell.conditions.snapshot], strict=True)
        return [record(1, k, name, i < n) for k, name, n in counts for i in range(4)]

    rows = choice_rows([Cell(i) for i in rates], records, info)
    assert [(row.iteration, row.drawn, row.kept) for row in rows if row.chosen] == [(2, 0.25, 0.75)]


def test_the_tables_prompts_and_seeds_are_not_to_choose_by(bench, tmp_path):
    for change in ({"seeds": {"first": 5, "erased": 1, "kept": 1}}, {"prompts": bench.prompts}):
        choice = parsed(
            **bench.model_dump(mode="json", exclude={"choice"}), choice=CHOICE
        ).choice.model_copy(update={})
        fields = choice.model_dump() | {
            k: v if isinstance(v, dict) else v.model_dump() for k, v in change.items()
        }
        wrong = bench.model_copy(update={"choice": type(choice).model_validate(fields)})
        with pytest.raises(BadInput, match="expected prompts and seeds of its own"):
            ran(wrong, tmp_path / "out", train_with_a_snapshot)


def test_a_snapshot_that_no_training_keeps_is_refused(bench, tmp_path):
    variation = bench.variations["training"].model_copy(update={"values": [3.0]})
    wrong = bench.model_copy(update={"variations": {"training": variation}})
    with pytest.raises(BadInput, match="no snapshot after 3 iterations; expected some of 1, 2"):
        ran(wrong, tmp_path / "out", never_train)


def test_words_alone_are_a_row_and_solved_ones_too(tmp_path, monkeypatch):
    monkeypatch.setenv("SDD_LORA_CACHE", str(tmp_path / "cache"))
    rows = {"words": {"rank": 2}, "axe": {"concepts": ["axe"], "rank": 1}}
    rows["words-solved"] = {"solved": ["words", "axe"], "rank": 2}
    few = {"first": 5, "erased": 1, "kept": 1}
    changes = {"methods": ["sd", "words", "words-solved"], "words": rows, "seeds": few}
    results = ran(Bench.parse(SMALL, folder=tmp_path, overrides=changes), tmp_path / "out")
    drawn = images_of(tmp_path / "out")
    assert not same(drawn["sd", "weapons", 5], drawn["words", "weapons", 5])
    costs = {cost.method: cost for cost in results.costs}
    assert (costs["words"].unet_passes, costs["words"].told) == (0, "2 words")
    assert costs["words"].seconds > 0 and costs["words"].parameters == 2 * 2 * 128
    with pytest.raises(BadInput, match="solved: nothing: no row under words"):
        parsed(words={"x": {"solved": ["nothing"]}})


def test_several_trainings_share_a_rows_images_and_widen_its_interval(bench, tmp_path):
    trained = bench.recipes["sdd"].model_copy(update={"seeds": [4, 9]})
    few = bench.seeds.model_copy(update={"erased": 3, "kept": 3})
    update = {"recipes": {"sdd": trained}, "variations": {}, "seeds": few}
    asked = []

    def noting(recipe, folder, resume):
        asked.append(recipe.training.seed)
        train_with_a_snapshot(recipe, folder, resume)

    results = ran(bench.model_copy(update=update), tmp_path / "out", noting)
    assert asked == [4, 9]
    lines = [
        line for line in lines_of(tmp_path / "out" / "images.jsonl") if line["method"] == "sdd"
    ]
    assert sorted(line["training"] for line in lines) == ["sdd"] * 3 + ["sdd.seed-9"] * 3
    row = find_row(results.rows, "sdd", "concept drawn", "all")
    assert row.n == 3 and row.difference is not None
    assert "2 trainings" in next(c.told for c in results.costs if c.method == "sdd")


def test_images_of_several_trainings_are_not_taken_for_those_of_one(bench):
    trained = bench.recipes["sdd"].model_copy(update={"seeds": [4, 9]})
    weight = {"field": "weight", "values": [1], "methods": ["sdd"], "erased": 1}
    changes = {
        "variations": {"v": VariationOf(**weight)},
        "attacks": Attacks(methods=["sdd"], clip_skip=ClipSkip()),
    }
    for recipe, drawn_once in ((bench.recipes["sdd"], True), (trained, False)):
        cells = grid_of(bench.model_copy(update=changes | {"recipes": {"sdd": recipe}})).cells
        own = {c.setting: c.is_main for c in cells if c.method == "sdd" and c.variation}
        assert own == {1.0: drawn_once, "none": drawn_once, "clip_skip": False}


def test_an_interval_over_trainings_is_wider_where_these_differ():
    alike, apart = [[0, 1] * 20] * 2, [[0] * 40, [1] * 40]
    narrow, wide = bootstrap_groups(alike), bootstrap_groups(apart)
    assert wide == (0.0, 1.0) and narrow[1] - narrow[0] < 0.25
