"""What can't be drawn is found before anything is drawn."""

import pytest
from support.benches import SMALL, never_train, parsed, ran, varied

from sdd_lora.bench import methods as weights
from sdd_lora.bench.bench_file import Bench
from sdd_lora.bench.grid import grid_of
from sdd_lora.bench.methods import Weights
from sdd_lora.errors import BadInput
from sdd_lora.sd.pipeline import load_pipeline


def test_weights_must_come_from_somewhere():
    for method in ("sdd", "sdd-gated"):
        bench = parsed(methods=["sd", method])
        with pytest.raises(BadInput, match=f"method {method}: expected an entry under `recipes`"):
            Weights(bench, never_train).check(grid_of(bench).cells)


@pytest.mark.parametrize(
    ("variation", "message"),
    [
        ({"field": "weight", "values": [2], "methods": ["neg"]}, "neg carries no adapter"),
        ({"field": "image", "values": [0.5], "methods": ["neg"]}, "neg draws in its own way"),
        (
            {"field": "model", "values": ["demo-community"], "methods": ["mine"]},
            "mine is another UNet",
        ),
        (
            {"field": "beside", "values": ["a.safetensors"], "methods": ["sdd-gated"]},
            "the gate of sdd-gated would close on the adapter beside",
        ),
    ],
)
def test_variations_must_fit_their_methods(variation, message):
    weights = {"mine": "unet.safetensors"}
    bench = parsed(
        variations={"v": variation}, weights=weights, adapters={"sdd-gated": ["b.safetensors"]}
    )
    with pytest.raises(BadInput, match=f"variations.v: {message}"):
        Weights(bench, never_train).check(grid_of(bench).cells)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "gone.safetensors"}, "method sd: gone.safetensors: no such file"),
        (varied("model", "nope"), r"variations.v: nope: no such file or folder"),
        (varied("beside", "look.safetensors"), r"variations.v: look.safetensors: no such file"),
        (
            {"methods": ["m"], "adapters": {"m": ["a.safetensors"]}},
            "method m: a.safetensors: no su",
        ),
        ({"methods": ["m"], "weights": {"m": "w.safetensors"}}, "method m: weights: .*no such fil"),
        ({"sampling": {"guidance": 1}}, "method neg: .*expected a guidance above 1, found 1"),
    ],
)
def test_what_cannot_be_drawn_is_found_before_anything_is_drawn(change, message, tmp_path):
    with pytest.raises(BadInput, match=message):
        ran(Bench.parse(SMALL, folder=tmp_path, overrides=change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_goes_by_all_its_weights(monkeypatch):
    pipeline = load_pipeline("demo", device="cpu")
    monkeypatch.setattr(weights, "load_pipeline", lambda *_, **__: pipeline)
    found = {Weights(parsed(), never_train).fingerprint("demo")}
    parts = (pipeline.unet.conv_in, pipeline.vae.decoder.conv_in, pipeline.text_encoder)
    for number, part in enumerate(parts, 2):
        next(part.parameters()).data.add_(1)
        found.add(Weights(parsed(), never_train).fingerprint("demo"))
        assert len(found) == number
