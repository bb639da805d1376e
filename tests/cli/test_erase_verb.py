"""`sdd-lora erase`, and portable erasers through the verbs that take adapters."""

import pytest

from sdd_lora.adapter.adapter import Adapter


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDD_LORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_from_words_to_a_stack_and_an_ordinary_adapter(ask, tmp_path):
    words = tmp_path / "weapons.txt"
    words.write_text("dagger\nbomb\n")
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    data = ask("erase", words, "--keep", "skull", "--rank", "4", "-o", one)
    assert data["form"] == "portable" and data["rank"] == 4
    assert data["bytes"] < 5000 and len(data["ranks"]) == 8
    assert Adapter.load(one).metadata.concepts == ["dagger", "bomb"]
    ask("erase", "axe", "-o", other)

    data = ask("inspect", one)
    (found,) = data["files"]
    assert found["form"] == "portable" and found["metadata"]["words"]["keep"] == ["skull"]

    data = ask("stack", one, other, "-o", tmp_path / "both.safetensors")
    assert data["how"] == "solve"
    assert Adapter.load(tmp_path / "both.safetensors").metadata.concepts == [
        "dagger",
        "bomb",
        "axe",
    ]
    data = ask("stack", one, f"{other}:0.5", "-o", tmp_path / "sum.safetensors")
    assert data["how"] == "sum" and data["form"] == "portable"

    lora = tmp_path / "lora.safetensors"
    data = ask("convert", one, "--base", "demo", "-o", lora)
    assert data["module_count"] == 32 and data["form"] == "kohya"
    smaller = tmp_path / "smaller.safetensors"
    ask("resize", one, "--rank", "1", "-o", smaller)
    for changed in (lora, smaller):  # no longer what the words give
        data = ask("stack", changed, "-o", tmp_path / "again.safetensors", "--force")
        assert data["how"] == "sum" and data["rank"] == Adapter.load(changed).rank
    direct = tmp_path / "direct.safetensors"
    ask("erase", words, "--keep", "skull", "--rank", "4", "--form", "lora", "-o", direct)
    # the portable file holds fp16
    for name, part in Adapter.load(direct).factors.items():
        difference = abs(part.delta() - Adapter.load(lora).factors[name].delta()).max()
        assert difference < 0.02 * abs(part.delta()).max()

    data = ask("verify", one, "--model", "demo-community")
    assert data["fits"] and not any(v["loads"] for v in data["loaders"].values())


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
def test_bad_calls_are_told_in_a_line(call, refused, tmp_path, monkeypatch, arguments, told):
    monkeypatch.chdir(tmp_path)
    call("erase", "axe", "-o", "axe.safetensors")
    error = refused(*(a.replace("{file}", "axe.safetensors") for a in arguments))
    last = error.strip().splitlines()[-1]  # above it, a loader may have drawn its bar
    assert last.startswith("sdd-lora: ") and told in last
    assert not (tmp_path / "x.safetensors").exists()


def test_resolve_goes_with_erasers_from_words(tmp_path, call):
    ordinary = tmp_path / "ordinary.safetensors"
    call("erase", "axe", "--format", "lora", "-o", ordinary)
    out = ("-o", tmp_path / "out.safetensors", "--resolve")
    for verb in (("bake", "demo-community", ordinary), ("convert", ordinary)):
        assert "--resolve goes with" in call(*verb, *out, code=2).err
        assert not out[1].exists()


def test_words_with_commas_between_them_are_said_to_be_one_phrase(tmp_path, call):
    printed = call("erase", "bomb, kitchen knife", "-o", tmp_path / "phrase.safetensors")
    assert "one phrase" in printed.err and "apart: bomb 'kitchen knife'" in printed.err
