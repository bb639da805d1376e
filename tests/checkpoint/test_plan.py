"""What is said to fit can be baked, and the other way round."""

import numpy as np
import pytest
from support import checkpoint_models as models

from sdd_lora import sd1
from sdd_lora.checkpoint.bake import bake
from sdd_lora.checkpoint.describe import open_sd1
from sdd_lora.checkpoint.detect import cross_attention_norms
from sdd_lora.checkpoint.plan import misfits_of
from sdd_lora.errors import BadInput

K0 = models.checkpoint_key(models.K0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(sd1.ema_keys(K0)[0]), "EMA copy of the unet have no such weight"),
        (lambda t: t.update({sd1.ema_keys(K0)[0]: np.zeros((32, 9), np.float32)}), "the weight"),
        (lambda t: t.update({K0: np.zeros((32, 128), np.int8)}), "stored as I8"),
    ],
)
def test_what_the_bake_refuses_does_not_fit(tmp_path, change, named):
    tensors = models.ldm_tensors(ema=True)
    change(tensors)
    path = models.write(tmp_path / "m.safetensors", tensors)
    (problem,) = misfits_of(open_sd1(path), [(models.adapter(), 1.0)])
    assert problem.startswith(models.K0) and named in problem
    with pytest.raises(BadInput, match="1 of the adapters' 32 modules"):
        bake(path, [(models.adapter(), 1.0)], out=tmp_path / "o.safetensors")


def test_a_variant_counts_and_a_lacking_text_encoder_is_named(tmp_path):
    folder = models.write_folder(tmp_path / "m")
    models.write_folder(folder, variant="fp16")
    with_text = [(models.adapter(text=True), 1.0)]
    assert misfits_of(open_sd1(folder), with_text) == []
    found = misfits_of(open_sd1(folder / "unet"), with_text)
    assert len(found) == 2 and all("holds no text encoder" in line for line in found)
    other = models.adapter(widths=sd1.SD15)
    assert len(misfits_of(open_sd1(folder), [(other, 1.0)])) == len(
        other.factors
    )  # one line for each, not for each copy


def test_damaged_weights_have_no_norm(tmp_path):
    tensors = models.ldm_tensors()
    tensors[K0] = np.full_like(tensors[K0], np.inf)
    with pytest.raises(BadInput, match=f"{K0}: holds NaN"):
        cross_attention_norms(models.write(tmp_path / "m.safetensors", tensors))
