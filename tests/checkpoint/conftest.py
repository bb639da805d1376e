"""A model in one file, and one in a folder of shards."""

import pytest
from support import checkpoint_models as models


@pytest.fixture
def source(tmp_path):
    tensors = models.cast(models.ldm_tensors(ema=True), "fp16")
    return models.write(tmp_path / "m.safetensors", tensors, {"format": "pt"})


@pytest.fixture
def folder(tmp_path):
    return models.write_folder(tmp_path / "folder", shard="2MB")
