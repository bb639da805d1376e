"""The format's rules are enforced, in one line each; what is written other readers read."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdd_lora.errors import BadInput
from sdd_lora.io import safetensors as sf


def entry(start: int, end: int, dtype: str = "F32", shape: list | None = None) -> dict:
    return {"dtype": dtype, "shape": shape or [(end - start) // 4], "data_offsets": [start, end]}


def file_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


BAD = {
    "an empty file": (b"", "truncated: 0 bytes"),
    "seven bytes": (b"1234567", "found text"),
    "a web page": (b"<!DOCTYPE html><html>", "a web page"),
    "a pickle": (b"\x80\2}q\0.", "pickle"),
    "a header of a terabyte": (file_of({}, length=1 << 40), "not a safetensors file, or a hostile"),
    "a header longer than the file": (file_of({}, length=999), "truncated: the header needs 1,007"),
    "no JSON": (file_of(b"{{{"), "its header is no JSON"),
    "no UTF-8": (file_of(b'{"\xff": 1}'), "its header is no JSON"),
    "half a surrogate pair": (file_of(b'{"__metadata__":{"a":"\\ud800"}}'), "header is no JSON"),
    "a list": (file_of([]), "no JSON object"),
    "nested a million times": (file_of(b"[" * 1_000_000), "its header is no JSON"),
    "missing data": (file_of({"a": entry(0, 8)}, b"1234"), "truncated: the header describes 8"),
    "data too many": (file_of({"a": entry(0, 8)}, b"1" * 12), "bytes after the last tensor"),
    "an overlap": (file_of({"a": entry(0, 8), "b": entry(4, 12)}, b"1" * 12), "b: overlaps"),
    "twice the same bytes": (file_of({"a": entry(0, 8), "b": entry(0, 8)}, b"1" * 8), "overlaps"),
    "a hole": (file_of({"a": entry(0, 4), "b": entry(8, 12)}, b"1" * 12), "b: leaves a hole"),
    "an unknown dtype": (file_of({"a": entry(0, 4, "F12")}, b"1234"), "unknown dtype 'F12'"),
    "a dtype that is no name": (file_of({"a": entry(0, 4, ["F32"])}, b"1234"), "unknown dtype"),
    "a size that doesn't fit": (file_of({"a": entry(0, 8, shape=[3])}, b"1" * 8), "takes 12 bytes"),
    "a negative size": (file_of({"a": entry(0, 4, shape=[-1])}, b"1234"), "whole numbers"),
    "a size that is true": (file_of({"a": entry(0, 4, shape=[True])}, b"1234"), "whole numbers"),
    "offsets backwards": (file_of({"a": entry(8, 4, shape=[1])}, b"1" * 8), "span -4"),
    "a huge size": (file_of({"a": entry(0, 4, shape=[1 << 62, 1 << 62])}, b"1234"), "no array"),
    "huge sizes of nothing": (file_of({"a": entry(0, 0, shape=[0, 10**30])}), "no array"),
    "a hundred dimensions": (file_of({"a": entry(0, 4, shape=[1] * 100)}, b"1234"), "no array"),
    "a name of two lines": (file_of({"a\nb": entry(0, 4)}, b"1234"), "found 'a.{2}b'"),
    "an entry that is no object": (file_of({"a": 3}), "a: expected dtype, shape"),
    "an entry too many": (file_of({"a": entry(0, 4) | {"x": 1}}, b"1234"), "a: expected dtype"),
    "metadata that is no text": (file_of({"__metadata__": {"a": 1}}), "must map names to text"),
    "a key twice": (
        file_of(b'{"a":%b,"a":%b}' % ((json.dumps(entry(0, 4)).encode(),) * 2), b"1234"),
        "the header names 'a' twice",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_refused_in_one_line(case, tmp_path):
    content, message = BAD[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        sf.read_header(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_header_longer_than_the_librarys_limit_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "long.safetensors"
    path.write_bytes(file_of({}, length=100_000_001))
    with pytest.raises(BadInput, match="at most 100,000,000 are read"):
        sf.read_header(path)


def test_many_megabytes_of_tags_are_read(tmp_path):
    path, tags = tmp_path / "tagged.safetensors", "tag, " * 5_200_000
    path.write_bytes(b"".join(sf.serialize({"a": np.ones(2, np.float32)}, {"tags": tags})))
    assert sf.read_header(path).metadata["tags"] == tags


def test_escapes_of_real_characters_are_read(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_of(b'{"__metadata__":{"a":"\\u00e9\\ud83d\\ude00\\\\ud800"}}'))
    assert sf.read_header(path).metadata == {"a": "é😀\\ud800"}


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(BadInput, match="is a folder"):
        sf.read_header(tmp_path)
    with pytest.raises(BadInput, match="can't be read: No such file"):
        sf.read_header(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("code", sorted(sf.NUMPY_DTYPES))
def test_every_dtype_goes_to_a_file_and_back(code, tmp_path):
    array = np.arange(6).reshape(2, 3).astype(sf.NUMPY_DTYPES[code])
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"".join(sf.serialize({"a": array}, {"note": "é"})))
    tensors, metadata = sf.read_tensors(path)
    assert metadata == {"note": "é"}
    assert tensors["a"].dtype == array.dtype
    np.testing.assert_array_equal(tensors["a"], array)


def test_the_library_reads_what_we_write_and_we_what_it_writes(tmp_path):
    arrays = {
        "scalar": np.array(2.5, np.float32),
        "half": np.ones((3, 1), ml_dtypes.bfloat16),
        "none": np.zeros((0, 4), np.float32),
        "transposed": np.arange(6, dtype=np.float16).reshape(2, 3).T,
    }
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"".join(sf.serialize(arrays, {})))
    theirs = load_file(path)
    for key, array in arrays.items():
        assert np.array_equal(theirs[key].float().numpy(), array.astype(np.float32))
    save_file(
        {key: tensor.contiguous() for key, tensor in theirs.items()}, tmp_path / "b.safetensors"
    )
    ours, _ = sf.read_tensors(tmp_path / "b.safetensors")
    assert all(np.array_equal(ours[key], arrays[key]) for key in arrays)


def test_tensors_are_aligned_and_hashed_as_stored(tmp_path):
    import hashlib

    arrays = {"a": np.ones(3, np.float16), "b": np.ones(3, np.float64), "c": np.ones(1, np.int8)}
    data = b"".join(sf.serialize(arrays, {"x": "y"}))
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    header = sf.read_header(path)
    for info in header.tensors.values():
        assert (header.data_start + info.start) % sf.NUMPY_DTYPES[info.dtype].itemsize == 0
    assert hashlib.sha256(data[header.data_start :]).hexdigest() == sf.data_sha256(arrays)
    assert max(info.end for info in header.tensors.values()) == len(data) - header.data_start
    assert torch.equal(load_file(path)["b"], torch.ones(3, dtype=torch.float64))
