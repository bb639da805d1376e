"""From values of images to rows with intervals."""

import json

import pytest

from sdd_lora.bench import tables
from sdd_lora.bench.results import ImageRecord, Results
from sdd_lora.measures.asked import kept_concept
from sdd_lora.measures.intervals import wilson
from sdd_lora.measures.judge import JudgeMeasure


def line(method, there, seed, values=None, **changes):
    fields = {"method": method, "variation": None, "setting": None, "kind": "kept", "set": "s"}
    fields |= {"prompt": "a cat", "seed": seed, "file": "f", "values": values or {"kept": there}}
    return ImageRecord(**fields | changes)


def shifts(lines):
    return tables.concept_shifts(lines, JudgeMeasure.info, kept_concept)


INFO = {
    "kept": {"kind": "rate", "of": "kept", "better": "higher"},
    "distance": {"kind": "mean", "of": "kept", "better": "lower"},
}


@pytest.fixture
def info():
    return Results.model_validate(
        {
            "bench": "",
            "model": "",
            "date": "",
            "command": "",
            "versions": {},
            "rows": [],
            "measures": INFO,
        }
    ).measures


def test_rates_have_wilson_intervals_and_paired_differences(info):
    lines = [line("sd", seed < 8, seed) for seed in range(10)]
    lines += [line("neg", seed < 6, seed) for seed in range(10)]
    base, neg = tables.rows(lines, info)
    assert (base.value, base.ci95, base.n, base.difference) == (0.8, wilson(8, 10), 10, None)
    assert (neg.value, neg.group) == (0.6, "all")
    assert neg.difference == pytest.approx(-0.2)
    assert neg.ci95_difference[0] < -0.2 < neg.ci95_difference[1]


def test_means_have_bootstrap_intervals_of_values_and_of_paired_differences(info):
    lines = [line("sd", 0, seed, {"distance": float(seed)}) for seed in range(20)]
    lines += [line("neg", 0, seed, {"distance": seed + 1.0}) for seed in range(20)]
    _, neg = tables.rows(lines, info)
    assert neg.value == 10.5 and neg.ci95[0] < 9 and neg.ci95[1] > 12
    assert neg.difference == 1.0 and neg.ci95_difference == (1.0, 1.0)


def test_no_difference_is_told_where_pairs_are_missing(info):
    lines = [line("sd", True, 0), line("neg", True, 0), line("neg", True, 1)]
    assert tables.rows(lines, info)[1].difference is None


def test_an_expected_maximum_is_one_of_prompts(info):
    told = info["kept"].model_copy(update={"maximum_of": "kept"})
    lines = [line("sd", seed < 3, seed) for seed in range(4)]  # 3 of 4 images of one prompt
    lines += [line("sd", False, seed, prompt="a dog") for seed in range(4)]
    (row,) = tables.rows(lines, {"kept, max exp.": told})
    assert (row.measure, row.group, row.n, row.difference) == ("kept, max exp.", "all", 2, None)
    assert row.value == pytest.approx(0.75) and row.ci95 == (0.0, 0.75)
    more = [line("sd", True, seed, prompt="a body", set="body") for seed in range(2)]
    rows = tables.rows(lines + more, {"kept, max exp.": told})
    assert [(r.group, r.n, r.value) for r in rows] == [("s", 2, row.value), ("body", 1, 1.0)]
    single = [line("sd", True, 0, prompt="a bird")]  # its rate could only be 0 or 1
    assert tables.rows(lines + single, {"kept, max exp.": told}) == []


def test_sets_have_rows_of_their_own(info):
    lines = [line("sd", True, 0), line("sd", False, 0, set="other")]
    assert [(r.group, r.value) for r in tables.rows(lines, info)] == [
        ("all", 0.5),
        ("s", 1.0),
        ("other", 0.0),
    ]


def test_what_counts_all_images_is_not_diluted_by_what_is_kept(info):
    told = {"nude": info["kept"].model_copy(update={"of": "all", "better": "lower"})}
    lines = [line("sd", 0, seed, {"nude": False}) for seed in range(3)]
    assert [(r.group, r.value, r.n) for r in tables.rows(lines, told)] == [("all", 0.0, 3)]
    lines += [line("sd", 0, 0, {"nude": True}, kind="erased", set="body")]
    assert [(r.group, r.value, r.n) for r in tables.rows(lines, told)] == [
        ("all", 1.0, 1),
        ("s", 0.0, 3),
        ("body", 1.0, 1),
    ]


def test_variations_pair_with_sd_under_the_same_setting(info):
    lines = [line("sd", True, 0)]
    lines += [line("sd", False, 0, variation="v", setting=5.0)]
    lines += [line("neg", False, 0, variation="v", setting=s) for s in (5.0, 7.0)]
    (found,) = tables.variations(lines, {"v": "guidance"}, info)
    differences = {(r.method, r.setting): r.difference for r in found.rows}
    assert differences == {("sd", 5.0): None, ("neg", 5.0): 0.0, ("neg", 7.0): -1.0}


def test_what_moved_comes_worst_first():
    lines = []
    for prompt, after in [("a cat", True), ("a dog", False)]:
        for method, there in [("sd", True), ("neg", after)]:
            lines.append(line(method, True, 0, {"noun kept": there}, prompt=prompt))
    moved = shifts(lines)
    assert [(m.concept, m.change) for m in moved] == [("dog", -1.0), ("cat", 0.0)]


def test_styles_move_too():
    prompts = {"a cat in noto style": False, "a cat as a pencil sketch": True}
    lines = []
    for prompt, there in prompts.items():
        for method in ("sd", "neg"):
            kept = {"noun kept": True, "style kept": there or method == "sd"}
            lines.append(line(method, True, 0, kept, prompt=prompt))
    found = {m.concept: (m.change, m.n) for m in shifts(lines)}
    assert found == {"noto style": (-1.0, 1), "cat": (0.0, 2), "sketch style": (0.0, 1)}


def test_totals_are_sums_and_named_nouns_have_rows_of_their_own(info):
    told = {"parts": info["distance"].model_copy(update={"kind": "total"})}
    lines = [
        line(m, 0, seed, {"parts": float(seed + k)})
        for k, m in enumerate(("sd", "neg"))
        for seed in range(4)
    ]
    base, neg = tables.rows(lines, told)
    assert (base.value, neg.value, neg.difference) == (6.0, 10.0, 4.0)
    assert neg.ci95_difference == (4.0, 4.0) and base.ci95[0] <= 6 <= base.ci95[1]
    lines = [line("sd", True, 0), line("sd", False, 1, prompt="a dog")]
    named = tables.rows(lines, info, lambda r: ["named" if "cat" in r.prompt else "not named"])
    assert [(r.group, r.value) for r in named] == [("all", 0.5), ("named", 1.0), ("not named", 0.0)]


def test_records_are_lines_of_images_jsonl_and_back():
    record = line("sd", True, 7, guidance=2.5, categories=("hate",))
    told = json.loads(record.to_line())
    assert told["variation"] is None and "width" not in told and told["values"] == {"kept": True}
    assert ImageRecord(**told) == record and record.groups == ["s", "s: hate"]
