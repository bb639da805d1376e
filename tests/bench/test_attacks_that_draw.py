"""Attacks that change what a picture is drawn from or with, as a bench runs them."""

import json

import pytest
import torch
from support.adapters import random_adapter
from support.benches import never_train

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.bench.attacked import FOUND
from sdd_lora.bench.bench_file import Bench
from sdd_lora.bench.costs import costs_of
from sdd_lora.bench.grid import grid_of
from sdd_lora.bench.methods import Weights
from sdd_lora.bench.run import run
from sdd_lora.errors import BadInput
from sdd_lora.generation.given import Given
from sdd_lora.sd.model import load_base_pipeline

BENCH = """
name: attacked
model: demo
concepts: [bomb, axe]
prompts: {erased: {weapons: [a bomb, an axe]}}
seeds: {first: 5, erased: 2, kept: 0}
sampling: {steps: 2, guidance: 3.0}
methods: [mine]
measures: [judge]
models: {other: demo-community}
adapters: {mine: [mine.safetensors]}
attacks:
  methods: [neg, mine, other]
  clip_skip: {}
  text_encoder: {}
  adapter_weight: {weight: -1}
  completion: [{steps: 1}]
  inversion: [{steps: 2}, {steps: 5, targets: 1}]
  relearning: {pictures: 1, iterations: 1}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attacks")
    random_adapter(0.3).save(folder / "mine.safetensors")
    (folder / "b.yaml").write_text(BENCH)
    return folder


def test_who_is_attacked_how_and_on_how_many_prompts(folder):
    cells = [c for c in grid_of(Bench.load(folder / "b.yaml")).cells if c.variation]
    found = {(c.setting, c.method): len(c.specs) for c in cells}
    everybody = [("none", 2), ("clip_skip", 2), ("text_encoder", 2)]
    weights = [("completion 1", 2), ("inversion 2", 2), ("inversion 5", 1), ("relearning", 2)]
    expected = {(key, m): n for key, n in everybody for m in ("neg", "mine", "other")}
    expected |= {(key, m): n for key, n in weights for m in ("mine", "other")}
    assert found == expected | {("adapter_weight", "mine"): 2}
    assert {str(c.folder) for c in cells if c.setting == "inversion 5"} == {
        "images/attacks/inversion-5/mine",
        "images/attacks/inversion-5/other",
    }
    # fewer targets are some of the others', so that both can be compared with no attack
    (few,) = [c.specs for c in cells if (c.setting, c.method) == ("inversion 5", "mine")]
    assert set(few) <= set(cells[0].specs)


def test_an_adapter_from_words_has_a_weight_to_attack(folder):
    attacks = {"methods": ["words", "other"], "adapter_weight": {"weight": -1}}
    bench = Bench.load(folder / "b.yaml", overrides={"words": {"words": {}}, "attacks": attacks})
    cells = grid_of(bench).cells
    assert [c.method for c in cells if c.setting == "adapter_weight"] == ["words"]


@pytest.fixture(scope="module")
def weights(folder):
    return Weights(Bench.load(folder / "b.yaml"), never_train)


def cell_of(weights, key, method):
    cells = grid_of(weights.bench).cells
    return next(c for c in cells if (c.setting, c.method) == (key, method))


def test_what_another_model_took_is_not_known_here(folder):
    bench = Bench.load(folder / "b.yaml", overrides={"methods": ["sd", "other"]})
    sd, other = costs_of(Weights(bench, never_train))
    assert (sd.told, sd.parameters) == ("nothing", 0)
    assert (other.told, other.parameters, other.seconds) == ("not known here", None, None)


def test_a_models_text_encoder_gives_way_to_the_bases(weights):
    swapped = weights.pipeline(cell_of(weights, "text_encoder", "other"))
    base, other = load_base_pipeline("demo"), load_base_pipeline("demo-community")
    assert torch.equal(swapped.unet.conv_in.weight, other.unet.conv_in.weight)
    tables = [p.text_encoder.get_input_embeddings().weight for p in (swapped, base, other)]
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])
    assert [weights.changes_text_encoder(m) for m in ("mine", "other")] == [False, True]


def test_a_layer_is_skipped_and_an_adapter_turned_round(weights):
    skipped = weights.pipeline(cell_of(weights, "clip_skip", "mine")).text_encoder
    layers = [name for name, _ in skipped.named_modules() if name.endswith("self_attn")]
    assert len(layers) == skipped.config.num_hidden_layers - 1
    negative = weights.pipeline(cell_of(weights, "adapter_weight", "mine")).unet
    scales = {m.scaling[a] for m in negative.modules() for a in getattr(m, "scaling", {})}
    assert scales == {-1.0}


def test_what_is_found_lies_beside_its_line_and_serves_the_drawing(folder):
    few = {
        "attacks": {
            "methods": ["mine"],
            "completion": [{"steps": 1}],
            "relearning": {"pictures": 1, "iterations": 1},
        }
    }
    bench = Bench.load(folder / "b.yaml", overrides=few)
    results = run(bench, folder / "out", never_train, "sdd-lora evaluate", {})
    rows = {row.attack: row for row in results.attacks}
    assert rows["completion 1"].access == "black-box" and rows["completion 1"].unet_passes == 2
    assert rows["relearning"].access == "white-box"
    assert rows["relearning"].unet_passes == (2 * 2 + 1) / 2  # once, for two prompts
    place = folder / "out" / "images" / "attacks"
    lines = [json.loads(line) for line in (place / "completion-1" / FOUND).read_text().splitlines()]
    assert [Given.load(place / "completion-1" / x["given"]).step for x in lines] == [1, 1]
    own = place / "relearning" / "mine"
    (adapter,) = {json.loads(line)["adapter"] for line in (own / FOUND).read_text().splitlines()}
    assert Adapter.load(own / adapter).rank == 4
    for name in ("completion-1", "relearning"):
        image = place / name / "mine" / "00000.png"
        assert image.read_bytes() != (folder / "out/images/mine/00000.png").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attacks.completion": [{"steps": 2}]}, "completion 2: expected fewer steps of the base"),
        ({"attacks.completion": [{"steps": 1}] * 2}, "completion 1 stands there twice"),
        ({"attacks.img2img": {"share": 0.4}}, "img2img: 0.4 redoes none of 2 steps"),
        (
            {"attacks.null_text": {}, "sampling.scheduler": "euler"},
            "null_text: it inverts ddim's steps alone",
        ),
        ({"attacks.another_adapter": {}}, "another_adapter"),
    ],
)
def test_strengths_that_fit_no_drawing_are_refused(change, message):
    with pytest.raises(BadInput, match=message):
        Bench.parse(BENCH, overrides=change)


def test_a_model_of_ones_own_is_not_moved_to_another(folder):
    moved = {"variations": {"on": {"field": "model", "values": ["demo"], "methods": ["other"]}}}
    bench = Bench.load(folder / "b.yaml", overrides=moved | {"attacks": None})
    Weights(bench, never_train).check(grid_of(bench).cells)  # its model is the bench's
    moved["variations"]["on"]["values"] = ["demo-community"]
    bench = Bench.load(folder / "b.yaml", overrides=moved | {"attacks": None})
    with pytest.raises(BadInput, match=r"variations\.on: other is another UNet"):
        Weights(bench, never_train).check(grid_of(bench).cells)
