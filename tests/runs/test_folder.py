"""A run's folder: what is ours to replace, what is left alone, moves that a kill cut short."""

import json
import os

import pytest

from sdd_lora.errors import BadInput
from sdd_lora.recipe import Recipe
from sdd_lora.runs import folder as run_folder
from sdd_lora.runs.folder import (
    check_folder,
    finish_move,
    is_finished,
    lock,
    move_in,
    place_of_new,
    replacement,
    take,
    under_way,
)

RECIPE = Recipe.parse("name: a\nmodel: demo\nconcepts: [bomb]\n")
OTHER = Recipe.parse("name: b\nmodel: demo\nconcepts: [axe]\n")


def finish(place, content):
    """What a run leaves."""
    for name in ("adapter.safetensors", "README.md"):
        (place / name).write_text(content)
    (place / "metrics.json").write_text(json.dumps({"tool": "sdd_lora 1.0", "of": content}))


@pytest.fixture
def finished(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    take(folder, folder, RECIPE)
    finish(folder, "old")
    for name in ("weights.safetensors", "before-after-there.png", "notes.txt"):
        (folder / name).write_text("old")
    return folder


def files(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.*") if p.is_file()
    }


@pytest.mark.parametrize(
    "there",
    [
        {"README.md": "mine", "state/mine.txt": ""},
        {"metrics.json": '{"tool": "another"}'},
        {"metrics.json": "[1]"},
        {"recipe.yaml": "flour: 500\n", "state/mine.txt": ""},
        {"recipe.yaml": RECIPE.to_yaml(), "README.md": "mine"},
    ],
)
def test_other_files_are_nobodys_to_replace(tmp_path, there):
    for name, text in there.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for force in (False, True):
        with pytest.raises(BadInput, match="holds other files; choose another folder"):
            check_folder(tmp_path, RECIPE, force=force)
    with pytest.raises(BadInput):
        check_folder(tmp_path, RECIPE, resume=True)
    assert files(tmp_path) == there


def test_an_unfinished_run_is_offered_to_be_resumed(tmp_path):
    take(tmp_path, tmp_path, RECIPE)
    with pytest.raises(BadInput, match="add `resume=True` to continue it"):
        check_folder(tmp_path, RECIPE)
    check_folder(tmp_path, RECIPE, resume=True)
    check_folder(tmp_path, OTHER, force=True)
    with pytest.raises(BadInput, match="expected one of them"):
        check_folder(tmp_path, RECIPE, resume=True, force=True)


def test_a_finished_run_is_not_resumed_even_where_it_kept_its_state(finished):
    assert (finished / "state").is_dir() and is_finished(finished)
    assert under_way(finished) is None
    with pytest.raises(BadInput, match="finished run; nothing to resume"):
        check_folder(finished, RECIPE, resume=True)
    message = "holds another run; choose another folder or add `force=True`"
    with pytest.raises(BadInput, match=message):
        check_folder(finished, RECIPE)


def test_what_a_kill_at_the_very_beginning_left_is_nothing(tmp_path):
    (tmp_path / "state").mkdir()
    check_folder(tmp_path, RECIPE)


def test_a_finished_run_stays_until_the_new_one_is_whole(finished):
    before = files(finished)
    check_folder(finished, OTHER, force=True)
    place = place_of_new(finished)
    take(finished, place, OTHER)
    assert {name: text for name, text in files(finished).items() if name in before} == before
    assert under_way(finished) == place
    check_folder(finished, OTHER, resume=True)
    (place / "state" / "state.pt").write_text("new")
    finish(place, "new")
    move_in(finished, place)
    assert is_finished(finished) and under_way(finished) is None
    assert files(finished).keys() == {
        "adapter.safetensors",
        "README.md",
        "metrics.json",
        "recipe.yaml",
        "state/state.pt",
        "notes.txt",
    }
    assert (finished / "adapter.safetensors").read_text() == "new"
    assert Recipe.load(finished / "recipe.yaml") == OTHER
    assert (finished / "notes.txt").read_text() == "old"


@pytest.mark.parametrize("moves", range(1, 7))
def test_a_move_that_was_cut_short_is_finished_by_the_next_call(finished, monkeypatch, moves):
    replace, made = os.replace, []

    def killed(source, target):
        if len(made) == moves:
            raise KeyboardInterrupt
        made.append(replace(source, target))

    place = place_of_new(finished)
    take(finished, place, OTHER)
    finish(place, "new")
    monkeypatch.setattr(run_folder.os, "replace", killed)
    try:
        move_in(finished, place)
    except KeyboardInterrupt:
        assert not is_finished(finished)
    monkeypatch.undo()
    finish_move(finished)
    assert is_finished(finished)
    assert not [p.name for p in finished.iterdir() if p.name.startswith(".")]
    assert {
        text
        for name, text in files(finished).items()
        if name not in ("recipe.yaml", "metrics.json", "notes.txt")
    } == {"new"}


def test_what_fails_changes_nothing(finished, tmp_path):
    before = files(finished)
    for folder in (finished, tmp_path / "new" / "run"):
        with pytest.raises(BadInput), lock(folder), replacement(folder) as place:
            (place / "adapter.safetensors").write_text("half")
            raise BadInput("no")
    assert files(finished) == before
    assert not (tmp_path / "new").exists()


def test_a_folder_is_one_process_alone(tmp_path):
    with (
        lock(tmp_path / "run"),
        pytest.raises(BadInput, match="another process"),
        lock(tmp_path / "run"),
    ):
        pass


def test_a_folder_that_cannot_be_made_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("x" * 300, "file", "file/inside"):
        with pytest.raises(BadInput), lock(tmp_path / name):
            pass
