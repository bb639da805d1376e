"""Portable adapters: a change of the prompts' embeddings, in a file of its own."""

import numpy as np
import pytest
from support import checkpoint_models as models
from support.portable import change, portable

from sdd_lora import sd1
from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.algebra import resize, stack
from sdd_lora.errors import BadInput
from sdd_lora.io.safetensors import read_header


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_a_file_holds_the_same_change(tmp_path, dtype):
    adapter = portable()
    again = Adapter.load(adapter.save(tmp_path / "p.safetensors", dtype=dtype))
    assert again.is_portable and again.identity == adapter.identity
    error = {"fp32": 1e-6, "fp16": 2e-3, "bf16": 2e-2}[dtype]
    assert np.abs(change(again) - change(adapter)).max() < error * np.abs(change(adapter)).max()
    assert (
        again.save(tmp_path / "q.safetensors", dtype=dtype).read_bytes()
        == (tmp_path / "p.safetensors").read_bytes()
    )


def test_the_file_is_two_tensors_and_our_entry(tmp_path):
    path = portable(rank=2).save(tmp_path / "p.safetensors")
    header = read_header(path)
    assert len(header.tensors) == 2 and list(header.metadata) == ["sdd_lora"]
    assert path.stat().st_size < 2 * 2 * 128 * 2 + 600


def test_every_module_that_reads_embeddings_gets_its_own_delta():
    adapter, rng = portable(), np.random.default_rng(1)
    weights = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in models.cross_attention_shapes(sd1.DEMO).items()
    }
    ordinary = adapter.on(weights.__getitem__)
    assert len(ordinary.factors) == 32 and ordinary.identity == adapter.identity
    for name, part in ordinary.factors.items():
        np.testing.assert_allclose(part.delta(), weights[name] @ change(adapter), atol=1e-5)
    assert models.adapter().on(weights.__getitem__).factors.keys() == ordinary.factors.keys()


def test_sums_and_resizing_stay_portable():
    a, b = portable(seed=1), portable(seed=2, name="b")
    both = stack([(a, 1.0), (b, -0.5)])
    assert both.is_portable
    np.testing.assert_allclose(change(both), change(a) - 0.5 * change(b), atol=1e-5)
    small = resize(both, rank=6).adapter
    assert small.is_portable
    np.testing.assert_allclose(change(small), change(both), atol=1e-5)


def test_portable_adapters_are_not_added_to_those_for_one_model():
    with pytest.raises(BadInput, match="--base"):
        stack([(portable(), 1.0), (models.adapter(), 1.0)])


def test_formats_of_one_model_and_the_portable_one_don_t_mix(tmp_path):
    with pytest.raises(BadInput, match="--base"):
        portable().save(tmp_path / "p.safetensors", format="kohya")
    with pytest.raises(BadInput, match="erase"):
        models.adapter().save(tmp_path / "p.safetensors", format="portable")
    assert not (tmp_path / "p.safetensors").exists()


def test_a_change_of_the_width_and_two_adapters_in_one_file_are_refused():
    tensors = portable().to_state_dict("portable")
    up = next(key for key in tensors if tensors[key].shape == (128, 3))
    with pytest.raises(BadInput, match="width"):
        Adapter.from_state_dict(tensors | {up: tensors[up][:64]})
    with pytest.raises(BadInput, match="one file"):
        Adapter.from_state_dict(tensors | models.adapter().to_state_dict("kohya"))


def test_a_damaged_weight_is_told_as_the_model_s():
    weight = np.full((8, 128), np.nan, np.float32)
    with pytest.raises(BadInput, match="model is damaged"):
        portable().factors[sd1.EMBEDDINGS].on(weight)


def test_it_fits_models_of_its_width():
    assert portable().fits(sd1.DEMO) and not portable().fits(sd1.SD15)
    assert portable(width=768).fits(sd1.SD15)
