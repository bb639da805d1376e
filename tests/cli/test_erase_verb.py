"""`sdd-lora erase`, and portable erasers through the verbs that take adapters."""

import json

import pytest

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.cli import app


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDD_LORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def call(capsys, *arguments) -> tuple[int, dict, str]:
    with pytest.raises(SystemExit) as done:
        app([*map(str, arguments), "--json"], standalone_mode=True)
    printed = capsys.readouterr()
    return done.value.code, json.loads(printed.out or "{}"), printed.err


def test_from_words_to_a_stack_and_an_ordinary_adapter(tmp_path, capsys):
    words = tmp_path / "weapons.txt"
    words.write_text("dagger\nbomb\n")
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    code, data, _ = call(capsys, "erase", words, "--keep", "skull", "--rank", "4", "-o", one)
    assert code == 0 and data["form"] == "portable" and data["rank"] == 4
    assert data["bytes"] < 5000 and len(data["ranks"]) == 8
    assert Adapter.load(one).metadata.concepts == ["dagger", "bomb"]
    call(capsys, "erase", "axe", "-o", other)

    code, data, _ = call(capsys, "inspect", one)
    (found,) = data["files"]
    assert found["form"] == "portable" and found["metadata"]["words"]["keep"] == ["skull"]

    code, data, _ = call(capsys, "stack", one, other, "-o", tmp_path / "both.safetensors")
    assert code == 0 and data["how"] == "solve"
    assert Adapter.load(tmp_path / "both.safetensors").metadata.concepts == [
        "dagger",
        "bomb",
        "axe",
    ]
    code, data, _ = call(capsys, "stack", one, f"{other}:0.5", "-o", tmp_path / "sum.safetensors")
    assert code == 0 and data["how"] == "sum" and data["form"] == "portable"

    lora = tmp_path / "lora.safetensors"
    code, data, _ = call(capsys, "convert", one, "--base", "demo", "-o", lora)
    assert code == 0 and data["module_count"] == 32 and data["form"] == "kohya"
    smaller = tmp_path / "smaller.safetensors"
    call(capsys, "resize", one, "--rank", "1", "-o", smaller)
    for changed in (lora, smaller):  # no longer what the words give
        code, data, _ = call(
            capsys, "stack", changed, "-o", tmp_path / "again.safetensors", "--force"
        )
        assert code == 0 and data["how"] == "sum" and data["rank"] == Adapter.load(changed).rank
    direct = tmp_path / "direct.safetensors"
    call(capsys, "erase", words, "--keep", "skull", "--rank", "4", "--form", "lora", "-o", direct)
    # the portable file holds fp16
    for name, part in Adapter.load(direct).factors.items():
        difference = abs(part.delta() - Adapter.load(lora).factors[name].delta()).max()
        assert difference < 0.02 * abs(part.delta()).max()

    code, data, _ = call(capsys, "verify", one, "--model", "demo-community")
    assert code == 0 and data["fits"] and not any(v["loads"] for v in data["loaders"].values())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["convert", "{file}", "-o", "x.safetensors"], "--base"),
        (["stack", "{file}", "--model", "demo", "--how", "sum", "-o", "x.safetensors"], "--model"),
        (["stack", "{file}:2", "--how", "solve", "-o", "x.safetensors"], "weight 1"),
        (["erase", "", "-o", "x.safetensors"], "reads nothing"),
        (["erase", "axe", "-o", "{file}"], "--force"),
    ],
)
def test_bad_calls_are_told_in_a_line(tmp_path, capsys, monkeypatch, arguments, told):
    monkeypatch.chdir(tmp_path)
    call(capsys, "erase", "axe", "-o", "axe.safetensors")
    code, _, error = call(capsys, *(a.replace("{file}", "axe.safetensors") for a in arguments))
    last = error.strip().splitlines()[-1]  # above it, a loader may have drawn its bar
    assert code == 2 and last.startswith("sdd-lora: ") and told in last
    assert not (tmp_path / "x.safetensors").exists()
