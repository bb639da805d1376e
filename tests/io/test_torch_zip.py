"""Legacy files are read as data: tensors as torch reads them, and nothing runs."""

import pickle
import pickletools
import struct
import tracemalloc
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdd_lora.checkpoint.copying import as_array, read_bytes
from sdd_lora.checkpoint.layout import read_any_header
from sdd_lora.errors import BadInput
from sdd_lora.io import torch_pickle
from sdd_lora.io import torch_zip as pickles

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def loaded(path: Path) -> dict[str, np.ndarray]:
    header = read_any_header(path)
    with open(path, "rb") as file:
        return {
            key: as_array(read_bytes(file, header, key), info)
            for key, info in header.tensors.items()
        }


def archive(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None, **how) -> Path:
    """A torch file around any pickle."""
    with zipfile.ZipFile(path, "w", **how) as file:
        file.writestr("archive/data.pkl", pickled)
        for name, data in (storages or {}).items():
            file.writestr(f"archive/data/{name}", data)
    return path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_as_torch_reads_it(tmp_path, dtype):
    tensor = (torch.randn(5, 3) * 3).to(dtype)
    torch.save({"state_dict": {"w": tensor}}, tmp_path / "m.ckpt")
    found = loaded(tmp_path / "m.ckpt")["w"]
    assert found.tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes()
    assert found.shape == (5, 3)


def test_views_transposes_channels_last_parameters_and_empty_tensors(tmp_path):
    base = torch.randn(6, 4)
    tensors = {
        "slice": base[2:5],
        "column": base[:, 1],
        "transposed": base.t(),
        "scalar": base[0, 0],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(base.clone()),
        "empty": torch.zeros(0, 3),
    }
    torch.save(tensors, tmp_path / "m.ckpt")
    found = loaded(tmp_path / "m.ckpt")
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert np.array_equal(found[key], tensor.detach().numpy()), key


class Callback:
    def __init__(self):
        self.best = 3


def test_nested_state_dicts_open_and_what_stands_beside_them_is_named(tmp_path):
    content = {
        "epoch": 3,
        "optimizer_states": [{"x": torch.ones(2)}],
        "path": Path("a"),
        "numpy": np.float64(3),
        "counts": defaultdict(int, a=1),
        "callback": Callback(),
        "state_dict": {"state_dict": OrderedDict(w=torch.ones(2, 2)), "step": 4},
    }
    torch.save(content, tmp_path / "m.ckpt")
    header = pickles.read_pickle_header(tmp_path / "m.ckpt")
    assert list(header.tensors) == ["w"]
    assert set(header.left_out) == content.keys() - {"state_dict"} | {"step"}
    assert {f"{__name__}.Callback", "collections.defaultdict"} <= set(header.refused)
    assert f"{__name__}.Callback" in header.code and "collections.defaultdict" not in header.code
    assert not any(name.startswith(("numpy", "_codecs")) for name in header.code)


def with_attribute(tensor):
    tensor.note = "trained"
    return tensor


def test_tensors_and_parameters_with_attributes_are_read(tmp_path):
    tensors = {
        "a.parameter": with_attribute(torch.nn.Parameter(torch.randn(2, 3))),
        "a.tensor": with_attribute(torch.randn(3)),
        "a.buffer": torch.nn.Buffer(torch.randn(2)),
    }
    torch.save(tensors, tmp_path / "m.ckpt")
    found = loaded(tmp_path / "m.ckpt")
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert np.array_equal(found[key], tensor.detach().numpy()), key


@pytest.mark.parametrize(
    "value",
    [
        np.ones((2, 2), np.float32),
        np.float32(3),
        torch.ones(2, 2).to_sparse(),
        torch.ones(2, device="meta"),
    ],
    ids=["array", "number", "sparse", "meta"],
)
def test_a_part_of_the_model_that_cannot_be_read_is_refused_by_name(tmp_path, value):
    torch.save({"state_dict": {"a.w": torch.ones(2), "a.other": value}}, tmp_path / "m.ckpt")
    with pytest.raises(BadInput, match=r"a\.other|storage"):
        pickles.read_pickle_header(tmp_path / "m.ckpt")


def test_numbers_beside_the_tensors_are_left_out_by_name(tmp_path):
    torch.save({"a.w": torch.ones(2), "step": np.int64(4), "epoch": 3}, tmp_path / "m.ckpt")
    header = pickles.read_pickle_header(tmp_path / "m.ckpt")
    assert list(header.tensors) == ["a.w"] and set(header.left_out) == {"step", "epoch"}


def test_a_tensor_under_a_number_is_refused_by_name(tmp_path):
    torch.save({"a.w": torch.ones(2), 7: torch.ones(2)}, tmp_path / "m.ckpt")
    with pytest.raises(BadInput, match="'7' can't be read"):
        pickles.read_pickle_header(tmp_path / "m.ckpt")


class Runs:
    """Pickles to a call that leaves a trace."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("where", ["beside", "inside", "as the root", "as a tensor"])
def test_code_never_runs(tmp_path, where):
    import os

    trace = tmp_path / "trace"
    bomb = Runs(os.system, f"touch {trace}")
    content = {
        "beside": {"state_dict": {"w": torch.ones(2)}, "x": bomb},
        "inside": {"state_dict": {"w": torch.ones(2), "x": bomb}},
        "as the root": bomb,
        "as a tensor": {"w": bomb},
    }[where]
    torch.save(content, tmp_path / "m.ckpt")
    if where in ("beside", "inside"):
        header = pickles.read_pickle_header(tmp_path / "m.ckpt")
        assert list(header.tensors) == ["w"]
        assert header.refused == header.code == ("posix.system",)
    else:
        with pytest.raises(BadInput):
            pickles.read_pickle_header(tmp_path / "m.ckpt")
    assert not trace.exists()


HOSTILE = {
    "no end": b"\x80\x02}",
    "empty": b"",
    "garbage": b"\xff" * 100,
    "empty stack": b"\x80\x02R.",
    "no mark": b"\x80\x02t.",
    "unknown memo": b"\x80\x02h\x05.",
    "odd dictionary": b"\x80\x02(K\x01d.",
    "extension": b"\x80\x02\x82\x01.",
    "huge memo slot": b"\x80\x02}r\xff\xff\xff\x7f.",
    "huge bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
    "huge bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".",
    "huge string": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b".",
    "deep tuples": b"\x80\x02)" + b"\x85" * 100_000 + b".",
    "deep tuples as a key": b"\x80\x02}(" + b")" + b"\x85" * 100_000 + b"K\x01u.",
    "deep tuple as a global": b"\x80\x04)" + b"\x85" * 100_000 + b"\x8c\x01x\x93.",
    "deep lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "doubling": b"\x80\x02]" + b"q\x002(h\x00h\x00e" * 1000 + b".",
    "decimal": b"I" + b"9" * 100_000 + b"\n.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_end_in_one_line_and_little_memory(tmp_path, name):
    path = archive(tmp_path / "m.ckpt", HOSTILE[name])
    tracemalloc.start()
    with pytest.raises(BadInput, match=r"m\.ckpt"):
        pickles.read_pickle_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6


def test_a_pickle_of_too_many_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_pickle, "MAX_OPCODES", 1000)
    path = archive(tmp_path / "m.ckpt", b"\x80\x02" + b"N0" * 1000 + b".")
    with pytest.raises(BadInput, match="steps"):
        pickles.read_pickle_header(path)


def tensor_pickle(shape=(2, 3), strides=(3, 1), offset=0):
    """The pickle of {"w": tensor} as torch writes it, with any numbers in it."""

    class Persistent(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", 6) if value is MARK else None

    import io

    buffer = io.BytesIO()
    rebuild = torch._utils._rebuild_tensor_v2
    call = Runs(rebuild, MARK, offset, shape, strides, False, OrderedDict())
    Persistent(buffer, protocol=2).dump({"w": call})
    return buffer.getvalue()


MARK = object()


@pytest.mark.parametrize(
    "numbers",
    [
        {"shape": (3, 3)},
        {"offset": 1},
        {"offset": -1},
        {"strides": (4, 1)},
        {"strides": (-3, 1)},
        {"strides": (1,)},
        {"shape": (1 << 40, 1 << 40), "strides": (0, 0)},
        {"shape": (1 << 60,), "strides": (1,)},
        {"shape": ("2", 3)},
        {"shape": [2, 3]},
        {"shape": (2.0, 3)},
    ],
)
def test_tensors_that_reach_beyond_their_storage(tmp_path, numbers):
    good = archive(tmp_path / "good.ckpt", tensor_pickle(), {"0": bytes(24)})
    assert loaded(good)["w"].shape == (2, 3)
    bad = archive(tmp_path / "bad.ckpt", tensor_pickle(**numbers), {"0": bytes(24)})
    with pytest.raises(BadInput, match=r"bad\.ckpt"):
        pickles.read_pickle_header(bad)


def test_zip_tricks(tmp_path):
    good = tensor_pickle()
    absent = archive(tmp_path / "absent.ckpt", good)
    packed = archive(
        tmp_path / "packed.ckpt", good, {"0": bytes(24)}, compression=zipfile.ZIP_DEFLATED
    )
    with pytest.warns(UserWarning), zipfile.ZipFile(tmp_path / "twice.ckpt", "w") as file:
        file.writestr("archive/data.pkl", good)
        file.writestr("archive/data.pkl", good)
    with zipfile.ZipFile(tmp_path / "big-endian.ckpt", "w") as file:
        file.writestr("archive/data.pkl", good)
        file.writestr("archive/byteorder", "big")
    directory = archive(tmp_path / "directory.ckpt", good, {str(n): b"" for n in range(60_000)})
    truncated = tmp_path / "truncated.ckpt"
    whole = archive(tmp_path / "whole.ckpt", good, {"0": bytes(24)}).read_bytes()
    truncated.write_bytes(whole[:-60])
    for path in (
        absent,
        packed,
        tmp_path / "twice.ckpt",
        tmp_path / "big-endian.ckpt",
        directory,
        truncated,
    ):
        with pytest.raises(BadInput, match=path.name):
            pickles.read_pickle_header(path)


def test_encrypted_entries_are_no_weights(tmp_path):
    path = archive(tmp_path / "m.ckpt", tensor_pickle(), {"0": bytes(24)})
    assert "w" in pickles.read_pickle_header(path).tensors
    whole = bytearray(path.read_bytes())
    tensor = whole.index(b"PK\1\2", whole.index(b"PK\1\2") + 1)
    whole[tensor + 8] |= 1  # the directory's flags: the entry is encrypted
    path.write_bytes(whole)
    with pytest.raises(BadInput, match="data/0 is encrypted"):
        pickles.read_pickle_header(path)


def test_an_entry_further_off_than_files_reach(tmp_path):
    whole = archive(tmp_path / "m.ckpt", tensor_pickle()).read_bytes()
    entry = whole.index(b"PK\1\2")
    end = whole.index(b"PK\5\6")
    name_length, extra_length = struct.unpack_from("<HH", whole, entry + 28)
    assert extra_length == 0
    zip64 = struct.pack("<HHQ", 1, 8, (1 << 64) - 10)
    directory = bytearray(whole[entry : entry + 46 + name_length] + zip64)
    struct.pack_into("<H", directory, 30, len(zip64))
    struct.pack_into("<L", directory, 42, 0xFFFFFFFF)  # the offset is the zip64's
    tail = bytearray(whole[end:])
    struct.pack_into("<HHL", tail, 8, 1, 1, len(directory))
    (tmp_path / "m.ckpt").write_bytes(whole[:entry] + directory + tail)
    with pytest.raises(BadInput, match="lies outside the file"):
        pickles.read_pickle_header(tmp_path / "m.ckpt")


def test_files_from_before_torch_1_6_are_refused_with_advice(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "m.ckpt", _use_new_zipfile_serialization=False)
    with pytest.raises(BadInput, match="save it again"):
        read_any_header(tmp_path / "m.ckpt")


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fuzz_mutated_pickles_raise_one_clear_error_or_read(tmp_path, data):
    pickled = bytearray(tensor_pickle())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(pickled) - 1))
        pickled[position] = data.draw(st.integers(0, 255))
    path = archive(tmp_path / "m.ckpt", bytes(pickled), {"0": bytes(24)})
    try:
        pickles.read_pickle_header(path)
    except BadInput as error:
        assert "\n" not in str(error)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(position=st.integers(0, 2000), value=st.integers(0, 255), cut=st.integers(0, 400))
def test_fuzz_mutated_archives(tmp_path, position, value, cut):
    content = bytearray(archive(tmp_path / "g", tensor_pickle(), {"0": bytes(24)}).read_bytes())
    content[position % len(content)] = value
    path = tmp_path / "m.ckpt"
    path.write_bytes(content[: len(content) - cut])
    try:
        loaded(path)
    except BadInput as error:
        assert "\n" not in str(error)


def test_the_opcodes_of_a_real_file_are_all_known(tmp_path):
    torch.save({"state_dict": OrderedDict(w=torch.ones(2))}, tmp_path / "m.ckpt")
    with zipfile.ZipFile(tmp_path / "m.ckpt") as file:
        pickled = file.read("m/data.pkl")
    assert {op.name for op, _, _ in pickletools.genops(pickled)} >= {"BINPERSID", "REDUCE"}
    assert list(loaded(tmp_path / "m.ckpt")) == ["w"]
