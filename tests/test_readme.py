"""README's blocks: every command is one that the command line takes, and the Python runs."""

import re
import shlex
from contextlib import suppress
from pathlib import Path

import pytest
import typer

import sdd_lora
from sdd_lora.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("bash")).splitlines()
    parts = [part for line in lines for part in line.split("&&")]
    words = [shlex.split(part, comments=True) for part in parts]
    return [w[1:] for w in words if w and Path(w[0]).name == "sdd-lora"]


def test_readme_has_commands():
    assert {words[0] for words in commands()} >= {"demo", "train", "bake", "evaluate"}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_the_command_line_takes_what_readme_prints(words):
    group = typer.main.get_command(app)
    verb = group.commands[words[0]]
    with suppress(typer.Exit):  # of an option that prints and ends
        verb.make_context(words[0], words[1:])  # raises for an unknown option, a missing argument


def test_files_that_readme_links_to_are_there():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_recipes_and_benches_that_commands_name_are_there():
    named = [word for words in commands() for word in words if word.startswith("recipes/")]
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_python_of_readme_runs(tmp_path, monkeypatch):
    """Beside the training, which a published adapter stands for, and with fewer steps."""
    (code,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters").symlink_to(ROOT / "adapters")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    published = sdd_lora.Adapter.load(ROOT / "adapters" / "demo" / "weapons")
    monkeypatch.setattr(sdd_lora, "train", lambda recipe, out_dir: published, raising=False)
    found: dict[str, object] = {}
    exec(code.replace("num_inference_steps=20", "num_inference_steps=2"), found)
    assert (tmp_path / "both-baked.safetensors").stat().st_size > 10_000_000
    assert found["image"].size == (64, 64)
