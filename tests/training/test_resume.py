"""Checkpoints: resuming bit for bit, Ctrl-C, damaged and foreign states."""

import os
import signal
from itertools import pairwise

import pytest
import torch
from support.trainers import WAYS, recipe, result, same, trainer

from sdd_lora.errors import BadInput
from sdd_lora.training import trainer as trainer_module


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, way):
    changes = WAYS[way]
    training = {"seed": 3} | changes.get("training", {}) | {"iterations": 4}
    settings = recipe(**changes | {"training": training})
    whole = trainer(settings)
    start = result(whole)
    whole.run()
    first = trainer(settings, tmp_path / "state" / "state.pt")
    for _ in range(2):
        first.step()
    first.save_state()
    first.step()  # lost by the kill
    second = trainer(settings, tmp_path / "state" / "state.pt")
    second.resume()
    assert second.iteration == 2
    second.run()
    assert same(result(whole), result(second)) and not same(result(whole), start)
    assert whole._total_passes() == second._total_passes() > 0


def test_ctrl_c_leaves_a_state_and_says_so(tmp_path, monkeypatch):
    settings = recipe()
    interrupted = trainer(settings, tmp_path / "state" / "state.pt")
    step = interrupted.step

    def stop_at_two():
        if interrupted.iteration == 2:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(interrupted, "step", stop_at_two)
    with pytest.raises(KeyboardInterrupt, match="iteration 2 of 6; `resume=True`"):
        interrupted.run()
    resumed = trainer(settings, tmp_path / "state" / "state.pt")
    resumed.resume()
    assert resumed.iteration == 2


def test_ctrl_c_within_a_step_waits_for_its_end(tmp_path, monkeypatch):
    settings = recipe()
    interrupted = trainer(settings, tmp_path / "state" / "state.pt")
    update = trainer_module.update_average

    def interrupt(*arguments):
        if interrupted.iteration == 2:
            os.kill(os.getpid(), signal.SIGINT)
        update(*arguments)

    monkeypatch.setattr(trainer_module, "update_average", interrupt)
    with pytest.raises(KeyboardInterrupt, match="iteration 3 of 6"):
        interrupted.run()
    monkeypatch.undo()
    resumed, whole = trainer(settings, tmp_path / "state" / "state.pt"), trainer(settings)
    resumed.resume()
    resumed.run()
    whole.run()
    assert same(result(whole), result(resumed))


def test_a_second_ctrl_c_leaves_the_last_checkpoint_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "state" / "state.pt"
    interrupted = trainer(recipe(), path)
    interrupted.step()
    interrupted.save_state()
    before = path.read_bytes()

    def twice(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trainer_module, "update_average", twice)
    with pytest.raises(KeyboardInterrupt, match="twice; `resume=True` continues from the last"):
        interrupted.run()
    assert path.read_bytes() == before


def test_a_run_stopped_before_its_first_checkpoint_starts_over(tmp_path):
    trained = trainer(recipe(), tmp_path / "state.pt")
    trained.resume()
    assert trained.iteration == 0


def test_a_damaged_or_foreign_state_is_bad_input(tmp_path):
    path = tmp_path / "state.pt"
    path.write_bytes(b"PK\x03\x04 not much of a zip")
    with pytest.raises(BadInput, match="damaged"):
        trainer(recipe(), path).resume()
    trainer(recipe(), path).save_state()
    with pytest.raises(BadInput, match="another recipe"):
        trainer(recipe(lora={"rank": 3}), path).resume()


def test_another_number_of_processes_is_bad_input(tmp_path):
    trained = trainer(recipe(), tmp_path / "state.pt")
    trained.step()
    state = trained.state_dict()
    state["rollouts"] *= 2
    with pytest.raises(BadInput, match="2 processes trained this, and 1 would go on"):
        trainer(recipe(), tmp_path / "state.pt").load_state_dict(state)


def test_saving_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    trained = trainer(recipe(training={"iterations": 100}), tmp_path / "state" / "state.pt")
    now, saved = [0.0], []

    def step():
        now[0] += 10
        trained.iteration += 1
        return 1.0

    def save():
        saved.append(now[0])
        now[0] += 5

    monkeypatch.setattr(trained, "step", step)
    monkeypatch.setattr(trained, "save_state", save)
    monkeypatch.setattr(trainer_module.time, "monotonic", lambda: now[0])
    trained.run()
    assert saved[0] == 40
    assert {after - before for before, after in pairwise(saved[:-1])} == {115}  # not the last


def test_a_state_of_an_earlier_version_is_called_that_not_another_recipe(tmp_path):
    path = tmp_path / "state.pt"
    earlier = {"recipe_sha256": recipe().sha256, "iteration": 2, "student": {}, "teacher": {}}
    torch.save(earlier, path)
    with pytest.raises(BadInput, match="earlier version"):
        trainer(recipe(), path).resume()


def test_another_length_is_taken_and_a_falling_learning_rate_is_told(tmp_path, caplog):
    def of(iterations, schedule="constant"):
        optimizer = {"kind": "adamw", "schedule": schedule}
        return recipe(training={"iterations": iterations, "seed": 3}, optimizer=optimizer)

    for schedule in ("constant", "cosine"):
        path = tmp_path / schedule / "state.pt"
        trainer(of(2, schedule), path).run()
        longer = trainer(of(4, schedule), path)
        longer.resume()
        assert longer.iteration == 2
        told = "from iteration 2 on it is that of 4, 0.0005 instead of 0" in caplog.text
        assert told == (schedule == "cosine")
        with pytest.raises(BadInput, match="2 are done already"):
            trainer(of(1, schedule), path).resume()
