"""The report: one file that needs nothing else, with every part that the results hold."""

import json
import re
from html.parser import HTMLParser
from importlib.resources import files

import pytest
from support.made_up_bench import DRAWN, KEPT, RATES, results, write

from sdd_lora.bench import text
from sdd_lora.bench.charts import axis, curves, scatter
from sdd_lora.bench.comparisons import attack_comparisons, robustness
from sdd_lora.bench.report import best_that_keeps, render_report
from sdd_lora.bench.results import Results
from sdd_lora.errors import BadInput

VOID = {"meta", "img", "link", "br", "hr", "input", "line", "circle", "polyline", "polygon"}


class Page(HTMLParser):
    """Tags with their attributes; every tag closed, in order."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return Page(render_report(write(tmp_path_factory.mktemp("bench"))))


def test_nothing_is_loaded_from_elsewhere(page):
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "base"}
        for name in ("src", "href", "srcset", "xlink:href"):
            assert re.match(r"data:|#|$", attributes.get(name, "")), (tag, attributes)
    assert "url(" not in "".join(page.text) and "@import" not in "".join(page.text)


def test_every_method_stands_in_the_table_and_over_the_pictures(page):
    words = "".join(page.text)
    for method in RATES:
        assert f"{method}" in words
    sources = [image["src"] for image in page.all("img")]
    strips = 3 + 1 + 1  # erased prompts, a kept one of either set
    of_strength = 2 * 5 * (2 + 1 + 1)  # methods, weights, prompts
    assert len(sources) == strips * len(RATES) + of_strength
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "9.0" in words and "5.9 – 13.7" in words  # sdd-preserve and its interval
    assert "nudenet: expected the package" in words
    assert "concept inversion" in words and "no gradient leads through it" in words


def test_it_can_be_read_without_a_mouse_and_without_seeing(page):
    assert page.all("html")[0]["lang"] == "en"
    assert all(image["alt"] for image in page.all("img"))
    scrolled = [a for _, a in page.tags if a.get("class") == "scroll"]
    assert scrolled and all(a["tabindex"] == "0" and a["role"] == "region" for a in scrolled)
    assert all(a.get("aria-label") or a.get("aria-hidden") for a in page.all("svg"))
    assert all(header.get("scope") for header in page.all("th"))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    named = [a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a]
    assert set(named) <= set(ids)
    assert {a["href"][1:] for a in page.all("a")} <= set(ids)


def test_the_winner_stands_beside_sd_and_what_went_wrong_is_marked(page):
    first, second = [image["alt"].partition(":")[0] for image in page.all("img")][:2]
    assert (first, second) == ("sd", "sdd-preserve")
    drawn = {image["alt"].partition(":")[0] for image in page.all("img") if image.get("class")}
    assert "sd" in drawn and "sdd-preserve" not in drawn


def test_a_kept_picture_that_misses_what_was_asked_for_is_lost(tmp_path):
    write(tmp_path, methods=("sd", "neg", "sdd", "stack"))
    path = tmp_path / "images.jsonl"
    path.write_text(path.read_text().replace(f'"{KEPT}": true', f'"{KEPT}": false'))
    assert "lost" in [image.get("class") for image in Page(render_report(tmp_path)).all("img")]


def test_n_stands_in_the_table_and_a_banner_where_it_is_small(tmp_path, page):
    words = "".join(page.text)
    assert "n 210" in words and "n 400" in words and "Too few images" not in words
    write(tmp_path, methods=("sd", "neg", "sdd", "stack"))
    few = [row.model_dump() | {"n": 12} for row in results(("sd", "neg")).rows]
    told(tmp_path, rows=few)
    assert "A row counts as few as 12" in "".join(Page(render_report(tmp_path)).text)


def test_each_training_is_a_curve_on_the_prompts_of_its_choice(page):
    assert "Along each training" in page.text
    label = "Along each training; the numbers are in the table below"
    assert label in [svg.get("aria-label") for svg in page.all("svg")]
    _, rows = text.choice_table(results())
    assert [row[-1] for row in rows] == ["", "yes", ""]
    last = [row.model_copy(update={"chosen": row.iteration == 750}) for row in results().choices]
    assert text.choice_table(changed(results(), choices=last))[1][-1][-1] == "yes, the last"


def test_names_of_variations_double_no_id(tmp_path):
    write(tmp_path, methods=("sd", "neg", "sdd", "stack"))
    told = json.loads((tmp_path / "results.json").read_text())
    names = ("table", "pictures", "collateral", "interference", "again", "elsewhere", "attacks")
    told["variations"] = [told["variations"][0] | {"name": name} for name in names]
    (tmp_path / "results.json").write_text(json.dumps(told))
    page = Page(render_report(tmp_path))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids)) and {f"v-{name}" for name in names} <= set(ids)


def test_prompts_hold_odd_line_ends(tmp_path):
    write(tmp_path, methods=("sd", "neg", "sdd", "stack"))
    path = tmp_path / "images.jsonl"
    path.write_text(path.read_text("utf-8").replace("a bomb", "a\u2028bomb\x85"), "utf-8")
    assert "a\u2028bomb\x85" in render_report(tmp_path)


def test_one_table_says_whether_it_holds_elsewhere(page):
    found = results()
    (comparison,) = robustness(found)
    heads, rows = text.comparison_table(found, comparison)
    assert heads == [f"does it hold elsewhere: {DRAWN} % ↓", "sdd-preserve", "sdd-gated"]
    assert [row[0] for row in rows] == ["samplers: dpm++", "samplers: euler-a"]
    assert rows[0][1].startswith("8.0 (") and rows[1][1].startswith("10.0 (")
    assert f"| {' | '.join(rows[0])} |" in text.to_markdown(found)
    assert heads[0] in [a.get("aria-label") for _, a in page.tags]
    assert "Does it hold elsewhere?" in page.text


def test_intervals_are_there_on_phones_too():
    style = files("sdd_lora.bench").joinpath("report.css").read_text("utf-8")
    assert not re.search(r"\.(ci|change)\b[^{}]*\{[^}]*display: none", style)


def test_names_are_escaped(page):
    assert "look <1>" in "".join(page.text)
    assert "1" not in {tag for tag, _ in page.tags}


def test_large_pictures_become_thumbnails(tmp_path):
    page = Page(render_report(write(tmp_path, methods=("sd", "neg", "sdd", "stack"), side=512)))
    sources = [image["src"] for image in page.all("img")]
    assert sources and all(s.startswith("data:image/jpeg") and len(s) < 20_000 for s in sources)


def test_the_best_row_is_the_lowest_that_keeps():
    row, base = best_that_keeps(results())
    assert (row.method, base.value) == ("sdd-preserve", RATES["sd"][0])  # sdd loses 16 points
    assert best_that_keeps(results(("sd",))) is None


def test_three_points_lost_are_tolerated_and_nothing_removed_is_no_removal(monkeypatch):
    monkeypatch.setitem(RATES, "sd", (0.90, 0.90))  # .90 - .87 is a little more than .03
    monkeypatch.setitem(RATES, "neg", (0.5, 0.87))
    assert best_that_keeps(results(("sd", "sdd", "neg", "stack")))[0].method == "neg"
    monkeypatch.setitem(RATES, "neg", (0.95, 0.9))
    assert best_that_keeps(results(("sd", "neg", "sdd"))) is None


def changed(model, **fields):
    return model.model_copy(update=fields)


def test_adapters_of_one_name_have_rows_of_their_own():
    found = results()
    samplers = found.variations[1]
    files = {"dpm++": "runs/a/adapter.safetensors", "euler-a": "b/adapter.safetensors"}
    rows = [changed(row, setting=files[row.setting]) for row in samplers.rows]
    beside = changed(samplers, field="beside", rows=rows)
    (comparison,) = robustness(changed(found, variations=[beside]))
    lines = [[condition] for condition in comparison.rows]
    assert [line[0] for line in lines] == [f"samplers: {file}" for file in files.values()]


def test_markdown_cells_hold_bars_and_what_was_not_measured_is_said():
    found = results(("sd", "neg", "sdd", "stack"))
    rows = [changed(row, method=row.method.replace("neg", "a|b")) for row in found.rows]
    markdown = text.to_markdown(changed(found, rows=rows))
    assert r"| a\|b |" in markdown and "Not measured: nudenet: expected the package" in markdown


def told(folder, **changes):
    path = folder / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_attack_of_a_later_version_is_shown(tmp_path):
    write(tmp_path, methods=("sd", "neg", "sdd", "stack"))
    attacks = [row.model_dump() for row in results().attacks]
    told(tmp_path, attacks=[row | {"attack": "newattack"} for row in attacks])
    assert "newattack" in render_report(tmp_path)


def test_a_method_without_rates_of_its_own_leaves_a_gap():
    found = results()
    other = [changed(row, measure="nudenet") for row in found.attacks if row.method == "sd"]
    both = changed(
        found,
        attacks=found.attacks + other,
        measures=found.measures | {"nudenet": found.info(DRAWN)},
    )
    _, comparison = attack_comparisons(both)
    plain = ["none", *comparison.rows["none"]]
    assert plain[1] is not None and plain[2] is None


def test_results_alone_are_enough(tmp_path):
    """What another tool writes: the fields that INTERFACE fixes, and no picture."""
    row = {"method": "sd", "measure": "x", "group": "all", "value": 0.5, "ci95": None, "n": 2}
    fixed = {"bench": "b", "model": "m", "date": "d", "command": "c", "versions": {}, "rows": [row]}
    (tmp_path / "results.json").write_text(json.dumps(fixed))
    assert "Skip to the table" in render_report(tmp_path)
    (tmp_path / "images.jsonl").write_text("")
    assert "Skip to the table" in render_report(tmp_path)


def spoil(folder, **changes):
    path = folder / "images.jsonl"
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | changes), *others]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "results.json").unlink(), "expected the results of `sdd-lora evaluate`"),
        (lambda d: (d / "results.json").write_text("{}"), "damaged, or of another version: bench"),
        (lambda d: (d / "images.jsonl").write_text("{"), "expected a JSON object a line"),
        (lambda d: (d / "images.jsonl").write_text("3\n"), "expected a JSON object a line"),
        (lambda d: (d / "images.jsonl").write_text('{"seed": 1}\n'), "method: Field required"),
        (lambda d: spoil(d, values=None), "values: Input should be an object"),
        (lambda d: spoil(d, file=3), "file: Input should be a valid string"),
        (lambda d: spoil(d, prompt=["a cat"]), "prompt: Input should be a valid string"),
        (lambda d: spoil(d, prompt="\ud800"), "images.jsonl: expected a JSON object a line"),
        (
            lambda d: told(d, interference={"names": ["a", "b"], "cosine": [[1.0]]}),
            "interference: .*as many rows, and columns, as names",
        ),
        (
            lambda d: told(d, rows=[results().rows[0].model_dump() | {"value": float("nan")}]),
            "rows.0.value: .*finite",
        ),
        (lambda d: (d / "images" / "sd" / "00000.png").write_bytes(b"x"), "can't read this image"),
    ],
)
def test_what_is_damaged_is_named(tmp_path, damage, message):
    write(tmp_path, methods=("sd", "neg", "sdd", "stack"))
    damage(tmp_path)
    with pytest.raises(BadInput, match=message):
        render_report(tmp_path)


def test_csv_and_markdown_say_the_same(tmp_path):
    found = results(("sd", "neg", "sdd", "stack"))
    lines = text.to_csv(found).splitlines()
    varied = sum(len(v.rows) for v in found.variations)
    assert len(lines) == 1 + len(found.rows) + varied + len(found.attacks)
    assert lines[1].startswith("sd,concept drawn,all,,,0.93,")
    markdown = text.to_markdown(found).splitlines()
    assert markdown[0] == (
        f"| method | {DRAWN} % ↓, n 210 | {KEPT} % ↑, n 400 | judge features: distance ↓, n 400 |"
    )
    heads, attacks = text.comparison_table(found, next(attack_comparisons(found)))
    first = markdown.index("| " + " | ".join(heads) + " |")
    assert attacks[3][1:3] != ["–", "–"]
    assert markdown[first + 5].startswith("| concept inversion | 93.0 (59.6–98.2) | – | 60.0")
    assert markdown[3].startswith("| neg | 31.0 (25.1–37.5) | 74.0 (")
    (tmp_path / "results.json").write_text(found.to_json())
    assert Results.load(tmp_path) == found


def test_axes_have_round_steps_and_hold_everything():
    found = axis([0.123, 0.87], 0, 100)
    assert (found.low, found.high, found.step) == (0.0, 1.0, 0.2)
    assert [place for _, place in found.ticks] == [0, 20, 40, 60, 80, 100]
    assert axis([3.0, 3.0], 0, 1).high > 3.0


def test_points_stand_where_their_values_are():
    low, high = (0.0, 0.2), (0.8, 1.0)
    chart = scatter([("a", 0.1, low, 0.9, high), ("b", 0.1, low, 0.9, high)])
    a, b = chart.points
    assert (a.x, a.y) == (b.x, b.y) == (chart.x.at(0.1), chart.y.at(0.9))
    assert (a.label_x, a.label_y, a.anchor) != (b.label_x, b.label_y, b.anchor)
    assert chart.y.at(0.9) < chart.y.at(0.1)  # upwards


def test_curves_go_through_their_values():
    chart = curves({"a": [(0.0, 1.0, (0.9, 1.0)), (2.0, 0.5, (0.4, 0.6))]})
    (line,) = chart.lines
    assert line.dots == [(chart.x.at(0), chart.y.at(1)), (chart.x.at(2), chart.y.at(0.5))]
    assert len(line.band.split()) == 4
