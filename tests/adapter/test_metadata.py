"""What an adapter's header says of it: read, written again, and no more true after an edit."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.adapter_making import TO_K, random_adapter

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.inspect import describe_adapter
from sdd_lora.adapter.metadata import ENTRY_KEY, Metadata
from sdd_lora.errors import BadInput
from sdd_lora.io.safetensors import read_header

PUBLISHED = Path(__file__).parents[2] / "adapters" / "demo"
RATE = {"name": "judge", "group": "bomb", "before": 0.9, "after": 0.1, "n": 100}


@pytest.mark.parametrize(("name", "format"), [("adapter", "kohya"), ("adapter.peft", "peft")])
def test_a_published_adapter_saved_again_keeps_its_bytes(name, format, tmp_path):
    """But for the hash of the tensors, which earlier versions didn't write."""
    path = PUBLISHED / "weapons" / f"{name}.safetensors"
    again = Adapter.load(path).save(tmp_path / "a.safetensors", format, "fp16")
    old, new = read_header(path), read_header(again)
    assert new.tensors == old.tensors
    assert again.read_bytes()[new.data_start :] == path.read_bytes()[old.data_start :]
    entry = json.loads(new.metadata[ENTRY_KEY])
    entry.pop("tensors_sha256")
    assert json.dumps(entry, sort_keys=True, ensure_ascii=False) == old.metadata[ENTRY_KEY]
    assert new.metadata | {ENTRY_KEY: ""} == old.metadata | {ENTRY_KEY: ""}


def test_metadata_reads_like_the_json_that_it_is():
    metadata = Metadata.of({"name": "a", "measures": [RATE], "zeta": [1]}) | {"name": "b"}
    assert metadata["name"] == "b"
    assert metadata["measures"] == [RATE]
    assert metadata.get("zeta") == [1]
    assert "base" not in metadata
    assert metadata.get("base") is None
    with pytest.raises(KeyError):
        metadata["base"]
    with pytest.raises(BadInput, match="concepts"):
        Metadata.of({"concepts": "bomb"})


def labelled(path: Path) -> Path:
    known = {"measures": [RATE], "recipe": {"x": 1}, "concepts": ["bomb"], "license": "mit"}
    return random_adapter(modules=(TO_K,), **known).save(path)


@pytest.mark.parametrize("knows_its_hash", [True, False])
def test_what_another_tool_changed_loses_our_numbers(knows_its_hash, tmp_path, caplog):
    """As kohya's resize does: it keeps foreign entries of the header. Files of earlier versions
    have the hash for user interfaces alone."""
    path = labelled(tmp_path / "a.safetensors")
    before = Adapter.load(path)
    header = read_header(path).metadata
    if not knows_its_hash:
        entry = json.loads(header[ENTRY_KEY])
        del entry["tensors_sha256"]
        header[ENTRY_KEY] = json.dumps(entry)
    tensors = load_file(path)
    save_file(tensors, path, header)
    assert Adapter.load(path).metadata == before.metadata, "saved again by the library, unchanged"
    assert not describe_adapter(path).edited

    save_file({k: np.asarray(t * t.dtype.type(0.5)) for k, t in tensors.items()}, path, header)
    with caplog.at_level(logging.WARNING):
        after = Adapter.load(path)
    assert "another tool" in caplog.text
    assert describe_adapter(path).edited
    assert after.identity != before.identity
    for field in ("measures", "identity", "recipe"):
        assert field not in after.metadata
    assert after.metadata.concepts == ["bomb"]
    assert after.metadata.license == "mit"
