"""What a model says was baked into it, and what its weights say."""

import numpy as np
import pytest
from support import checkpoint_models as models

from sdd_lora import sd1 as names
from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.algebra import resize, stack
from sdd_lora.checkpoint.bake import bake
from sdd_lora.checkpoint.detect import find_adapter, history_of_model
from sdd_lora.checkpoint.history import (
    HISTORY_KEY,
    BakedAdapter,
    BakeRecord,
    decode_history,
    encode_history,
)
from sdd_lora.errors import BadInput
from sdd_lora.io.safetensors import read_tensors

A, B, C = (models.adapter(seed=seed, size=0.05, name="abc"[seed]) for seed in range(3))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return models.write(folder / "m.safetensors", models.ldm_tensors())


def test_bakes_of_other_files_of_a_folder_are_not_forgotten(tmp_path):
    """Of a UNet alone, of a text encoder alone, of both: each file has a history of its own."""
    source = models.write_folder(tmp_path / "m")
    made = models.adapter(text=True, seed=2).factors
    text = Adapter({m: f for m, f in made.items() if names.is_text(m)}, {"name": "text"})
    both = models.adapter(text=True, seed=3, name="both")
    for n, adapter in enumerate((A, text, both, B)):
        bake(source if n == 0 else tmp_path / str(n - 1), [(adapter, 1.0)], out=tmp_path / str(n))
    history = history_of_model(tmp_path / "3")
    order = [adapter.name for record in history for adapter in record.adapters]
    assert sorted(order) == ["a", "b", "both", "text"]
    assert order.index("a") < order.index("both") < order.index("b")
    assert order.index("text") < order.index("both")
    for adapter in (A, text, both, B):
        assert find_adapter(tmp_path / "3", adapter).present
    assert history_of_model(source) == ()


def test_presence_by_weights(tmp_path, source):
    bake(source, [(A, 0.7)], out=tmp_path / "a.safetensors")
    inside = find_adapter(tmp_path / "a.safetensors", A, source)
    assert inside.strength == pytest.approx(0.7, abs=1e-3)
    assert inside.share == pytest.approx(1, abs=1e-3)
    assert abs(find_adapter(tmp_path / "a.safetensors", B, source).strength) < 0.1


@pytest.mark.parametrize("text", ["[", "{}", '[{"adapters": 3}]', "[" * 100_000, "[1]"])
def test_a_damaged_history_is_one_clear_line(tmp_path, text):
    source = models.write(tmp_path / "m.safetensors", models.ldm_tensors(), {HISTORY_KEY: text})
    with pytest.raises(BadInput, match="can't be read") as error:
        bake(source, [(A, 1.0)], out=tmp_path / "o.safetensors")
    assert "\n" not in str(error.value)


def test_a_part_of_a_stack_is_expected_at_its_own_weight(tmp_path, source):
    pair = stack([(A, 0.25), (B, 2.0)], name="pair")
    bake(source, [(pair, 0.8)], out=tmp_path / "o.safetensors")
    for adapter, weight in ((A, 0.2), (B, 1.6), (pair, 0.8)):
        found = find_adapter(tmp_path / "o.safetensors", adapter, source)
        assert found.present and found.recorded.name == "pair"
        assert found.expected == pytest.approx(weight)
        assert found.strength == pytest.approx(weight, abs=0.1)
    assert not find_adapter(tmp_path / "o.safetensors", C, source).present


def test_what_was_made_from_a_baked_adapter_is_known_by_its_lineage(tmp_path, source):
    bake(source, [(A, 0.5)], out=tmp_path / "o.safetensors")
    smaller, double = resize(A, rank=3).adapter, A.scaled(2.0)
    for adapter, weight in ((smaller, 0.5), (double, 0.25)):
        found = find_adapter(tmp_path / "o.safetensors", adapter, source)
        assert found.present and found.recorded.name == "a"
        assert found.expected == pytest.approx(weight)
    deep = stack([(stack([(A, 1.0), (B, 1.0)]), 0.1), (C, 1.0)])
    bake(source, [(deep, 1.0)], out=tmp_path / "deep.safetensors")
    found = find_adapter(tmp_path / "deep.safetensors", A, source)
    assert found.expected is None and found.present


def test_a_weight_of_0_is_nothing(tmp_path, source):
    tensors, _ = read_tensors(source)
    history = [BakeRecord((BakedAdapter("a", A.identity, 0.0),), "nearest", "patch")]
    metadata = {HISTORY_KEY: encode_history(history)}
    path = models.write(tmp_path / "o.safetensors", tensors, metadata)
    for base in (None, source):
        found = find_adapter(path, A, base)
        assert found.recorded is not None and not found.present


def test_records_without_parts_are_still_read(tmp_path, source):
    text = encode_history([BakeRecord((BakedAdapter("a", A.identity, 0.5),), "nearest", "patch")])
    older = text.replace(', "parts": {}', "")
    assert older != text
    assert decode_history(older, "x")[0].adapters[0].parts == {}
    assert np.isclose(decode_history(older, "x")[0].adapters[0].weight, 0.5)
