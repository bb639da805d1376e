"""`sdd-lora evaluate` as a user types it."""

import json
import sys

import pytest

BENCH = """
name: small
model: demo
concepts: [bomb, axe]
prompts: {erased: {weapons: [a bomb, an axe]}, kept: {animals: [a cat]}}
seeds: {first: 5, erased: 4, kept: 4}
sampling: {steps: 2, guidance: 3.0}
methods: [sd, neg]
measures: [judge]
quick: {bench: {seeds.erased: 1, seeds.kept: 1}}
"""


@pytest.fixture(autouse=True)
def bench(tmp_path, monkeypatch):
    (tmp_path / "b.yaml").write_text(BENCH)
    monkeypatch.chdir(tmp_path)


def test_a_table_comes_out(call, tmp_path, monkeypatch):
    typed = ["evaluate", "b.yaml", "--quick"]
    monkeypatch.setattr(sys, "argv", ["sdd-lora", *typed])
    printed = call(*typed).out
    assert "concept drawn % ↓" in printed and "noun kept % ↑" in printed
    assert [row.split()[0] for row in printed.splitlines()[1:3]] == ["sd", "neg"]
    told = json.loads((tmp_path / "bench" / "small-quick" / "results.json").read_text())
    assert told["bench"] == "small-quick" and told["command"] == "sdd-lora evaluate b.yaml --quick"
    assert set(told["rows"][0]) >= {"method", "measure", "group", "value", "ci95", "n"}
    assert {row["n"] for row in told["rows"]} == {1}


def test_methods_and_limit(ask):
    told = ask("evaluate", "b.yaml", "--methods", "neg", "--limit", 2, "-o", "out", "-q")
    assert told["folder"] == "out"
    assert {row["method"] for row in told["rows"]} == {"neg"}
    assert {row["n"] for row in told["rows"]} == {2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "sega"], "--methods sega: not in this bench; expected some of sd, neg"),
        (["--set", "model=gone/at/all"], "no such file or folder"),
        (["--set", "methods=[sdd]"], "method sdd: expected an entry under `recipes`"),
        (["--set", "measures=[magic]"], "measure magic: expected one of judge"),
        (["--set", "concept=" + "bomb " * 99], "too long: the model would not read"),
    ],
)
def test_bad_input_is_one_clear_line(refused, tmp_path, arguments, message):
    assert message in refused("evaluate", "b.yaml", "-o", "out", *arguments)
    assert not (tmp_path / "out").exists()
