"""push and pull through huggingface_hub's own client, against a stand-in for the hub."""

import json
import pickle
import socket

import pytest
import torch
import yaml
from support.adapter_making import distance, random_adapter
from support.portable import portable

from sdd_lora.adapter import card
from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.hub import is_published, pull, push
from sdd_lora.adapter.metrics import Metrics
from sdd_lora.adapter.publish import publish
from sdd_lora.errors import BadInput, SddLoraError
from sdd_lora.io.atomic import sha256_of
from sdd_lora.io.download import is_hub_id
from sdd_lora.recipe import Recipe

REPOSITORY = "me/weapons-eraser"


@pytest.fixture
def run(tmp_path):
    """A run's folder, with state that must not be published."""
    folder = tmp_path / "run"
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "optimizer.pt").write_bytes(b"private")
    adapter = random_adapter(concepts=["bomb"], base={"model": "owner/sd"}, license="mit")
    path = adapter.save(folder / "adapter.safetensors")
    card.write_sidecar(adapter, path)
    metrics = {"adapter": {"sha256": sha256_of(path), "bytes": path.stat().st_size}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "README.md").write_text(card.render_card(adapter, Metrics(**metrics)))
    return folder


def test_there_and_back(hub, run, tmp_path):
    url = push(run, REPOSITORY)
    assert url.startswith(hub.address)
    published = hub.repositories[REPOSITORY]
    assert set(published) == {"adapter.safetensors", "adapter.json", "metrics.json", "README.md"}
    front = yaml.safe_load(published["README.md"].decode().split("---\n")[1])
    assert front["base_model"] == "owner/sd"

    folder = pull(REPOSITORY, tmp_path / "pulled")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == published
    assert distance(Adapter.load(folder), Adapter.load(run)) == 0
    assert distance(Adapter.load(REPOSITORY), Adapter.load(run)) == 0


def test_a_file_that_is_not_what_the_hub_lists_is_refused(hub, run, tmp_path):
    push(run, REPOSITORY)
    hub.lying = True
    with pytest.raises(SddLoraError, match=r"is not what the hub says: hash .*, expected"):
        pull(REPOSITORY, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    with pytest.raises(SddLoraError, match="is not what the hub says"):
        Adapter.load(REPOSITORY)


def test_numbers_of_another_adapter_are_refused(hub, run, tmp_path):
    push(run, REPOSITORY)
    other = random_adapter(7).save(tmp_path / "other.safetensors")
    hub.repositories[REPOSITORY]["adapter.safetensors"] = other.read_bytes()
    with pytest.raises(BadInput, match="speaks of another adapter"):
        pull(REPOSITORY, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    (run / "adapter.safetensors").write_bytes(other.read_bytes())
    with pytest.raises(BadInput, match="speaks of another adapter"):
        push(run, REPOSITORY)
    (run / "metrics.json").write_text("{}")
    with pytest.raises(BadInput, match="the file is damaged"):
        push(run, REPOSITORY)


@pytest.mark.parametrize("name", ["model.ckpt", "deep/down/x.PT", "a.bin", "b.pkl", "w.npz"])
def test_files_of_other_kinds_are_left_on_the_hub(hub, run, tmp_path, name):
    push(run, REPOSITORY)
    hub.repositories[REPOSITORY][name] = b"\x80\x04."
    folder = pull(REPOSITORY, tmp_path / "pulled")
    assert not (folder / name).exists()
    assert Adapter.load(REPOSITORY).factors


@pytest.mark.parametrize(
    "name", ["pytorch_lora_weights.safetensors", "adapter_model.safetensors", "my-lora.safetensors"]
)
def test_the_layouts_that_exist_are_found_and_work_offline(hub, run, monkeypatch, name):
    from huggingface_hub import constants

    content = (run / "adapter.safetensors").read_bytes()
    hub.repositories["me/lora"] = {name: content, "README.md": b"", "image.png": b"x"}
    expected = Adapter.load(run).identity
    assert Adapter.load("me/lora").identity == expected
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert Adapter.load("me/lora").identity == expected


def test_several_files_of_any_name_are_named(hub, run):
    content = (run / "adapter.safetensors").read_bytes()
    hub.repositories["me/many"] = {"a.safetensors": content, "b.safetensors": content}
    with pytest.raises(BadInput, match=r"a\.safetensors, b\.safetensors"):
        Adapter.load("me/many")


def test_a_mistyped_path_is_called_that_first(hub):
    with pytest.raises(BadInput, match=r"^runs/weapns: no such file"):
        Adapter.load("runs/weapns")


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter.peft.safetensors"])
def test_a_pickle_under_another_name_is_refused(hub, run, tmp_path, name):
    push(run, REPOSITORY)
    del hub.repositories[REPOSITORY]["metrics.json"]
    hub.repositories[REPOSITORY][name] = pickle.dumps({"weight": 1})
    with pytest.raises(BadInput, match=rf"{REPOSITORY}: {name}: .*(not a? ?safetensors|truncated)"):
        pull(REPOSITORY, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_what_is_not_there(hub, run, tmp_path):
    with pytest.raises(BadInput, match="me/absent: no such repository"):
        pull("me/absent", tmp_path / "pulled")
    hub.repositories["me/empty"] = {"README.md": b""}
    with pytest.raises(BadInput, match=r"no adapter\.safetensors in it"):
        pull("me/empty", tmp_path / "pulled")
    with pytest.raises(BadInput, match="exists already"):
        pull("me/empty", run)
    with pytest.raises(BadInput, match="expected a run's folder"):
        push(tmp_path, REPOSITORY)
    with pytest.raises(BadInput, match="expected a hub id"):
        push(run, "no-owner")
    assert not (tmp_path / "pulled").exists()


def test_no_hub(hub, run, tmp_path, monkeypatch):
    from huggingface_hub import constants

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(
            SddLoraError, match="me/weapons-eraser: the hub can't be used"
        ) as caught:
            pull(REPOSITORY, tmp_path / "pulled")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pulled").exists()


def test_hub_ids():
    assert is_hub_id("owner/name-1.5")
    for name in ("name", "a/b/c", "../x", "./x", "/x", "a/.b", "owner/na me"):
        assert not is_hub_id(name)


def test_force_replaces_a_pulled_run_and_no_folder_of_other_files(hub, run, tmp_path):
    push(run, REPOSITORY)
    folder = pull(REPOSITORY, tmp_path / "pulled")
    pull(REPOSITORY, folder, force=True)
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(BadInput, match="thesis"):
        pull(REPOSITORY, folder, force=True)
    assert (folder / "thesis.txt").read_text() == "mine"


def test_a_file_of_ones_own_is_published_with_a_card(hub, tmp_path):
    eraser = portable(name="no-weapons")
    path = Adapter(eraser.factors, eraser.metadata | {"concepts": ["bomb"]}).save(
        tmp_path / "mine.safetensors"
    )
    publish(path, REPOSITORY, license="openrail")
    published = hub.repositories[REPOSITORY]
    assert set(published) == {"adapter.safetensors", "adapter.json", "README.md"}
    assert published["adapter.safetensors"] == path.read_bytes()
    text = published["README.md"].decode()
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["license"], front["library_name"]) == ("openrail", "sdd_lora")
    assert "No LoRA loader reads this file" in text
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["mine.safetensors"]


def test_a_runs_card_goes_as_it_is_but_for_the_license_and_its_pictures_come_along(hub, run):
    card_file = run / "README.md"
    card_file.write_text(card_file.read_text() + "\nMy own words.\n")
    before = card_file.read_bytes()
    for name in ("before-after.png", "before-after-demo-community.png", "holiday.png"):
        (run / name).write_bytes(b"\x89PNG")
    publish(run, REPOSITORY)
    published = hub.repositories[REPOSITORY]
    assert published["README.md"] == before
    assert {"before-after.png", "before-after-demo-community.png"} < set(published)
    assert not {"holiday.png", "state/optimizer.pt"} & set(published)
    publish(run, REPOSITORY, license="cc0-1.0")
    text = hub.repositories[REPOSITORY]["README.md"].decode()
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["license"], front["base_model"]) == ("cc0-1.0", "owner/sd")
    assert "## Licence\n\ncc0-1.0\n" in text and text.endswith("My own words.\n")
    assert card_file.read_bytes() == before
    folder = pull(REPOSITORY, run.parent / "pulled")
    assert (folder / "before-after-demo-community.png").is_file()


@pytest.mark.parametrize("name", ["before-after-/../../x.png", "before-after-\\..\\x.png", "x.png"])
def test_pictures_of_other_names_are_not_a_runs(name):
    assert not is_published(name)


def test_where_an_adapter_lay_that_a_run_went_on_from_stays_private(hub, run, tmp_path):
    start = tmp_path / ("a home with spaces " * 6 + "s") / "start.safetensors"
    recipe = Recipe.parse(
        f"name: x\nmodel: demo\nconcepts: [a]\nlora: {{init: {start}}}\n", folder=tmp_path
    )
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    publish(run, REPOSITORY)
    text = hub.repositories[REPOSITORY]["recipe.yaml"].decode()
    assert str(tmp_path) not in text and "home" not in text
    assert Recipe.parse(text).sha256 == recipe.sha256


def test_a_pickle_and_a_file_whose_alpha_is_elsewhere_are_published_as_safetensors(hub, tmp_path):
    adapter = random_adapter(rank=2, alpha=2.0)
    folder = adapter.save(tmp_path / "peft", format="peft")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 6}))
    old = tmp_path / "old.pt"
    torch.save({k: torch.tensor(v) for k, v in adapter.to_state_dict().items()}, old)
    for source in (folder, old):
        publish(source, REPOSITORY)
        (tmp_path / "got.safetensors").write_bytes(
            hub.repositories[REPOSITORY]["adapter.safetensors"]
        )
        found = Adapter.load(tmp_path / "got.safetensors")
        assert found.norm() == pytest.approx(Adapter.load(source).norm(), rel=1e-3)
