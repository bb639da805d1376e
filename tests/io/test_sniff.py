"""What a file is shows in its content, whatever it is called, and the error names the remedy."""

import gzip
import lzma
import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.checkpoint.layout import read_any_header
from sdd_lora.errors import BadInput
from sdd_lora.io import safetensors, torch_zip
from sdd_lora.io.safetensors import serialize

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 132\n"


def picture(path):
    Image.new("RGB", (2, 2)).save(path, format="PNG")


def archive(path):
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("model.safetensors", bytes(100))


def half_a_torch_file(path):
    torch.save({"a.w": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


FOREIGN = {
    "a git-LFS pointer": (LFS, "git lfs pull"),
    "a web page": (b"<!DOCTYPE html><html><title>Log in</title>", "web page.*token"),
    "a web page after spaces": (b"\n \n<HTML lang=en>", "web page"),
    "an answer": (b'{"error":"Unauthorized","message":"log in"}', "server's error"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(64), "GGUF.*safetensors"),
    "gzip": (gzip.compress(b"weights"), "unpack"),
    "a picture": (picture, "picture"),
    "nothing": (b"", "empty"),
    "a comment of a web page": (b"<!-- served by -->\n<!DOCTYPE html>", "web page"),
    "words": (b"name: weapons\nmodel: demo\n", "found text: 'name: weapons model: demo'"),
    "a word": (b"404\n", "found text: '404'"),
    "xz": (lzma.compress(b"weights"), "unpack"),
}

#: of these, only a reader of torch's files sees what is wrong
TORCH_LIKE = {
    "an archive": (archive, "archive, of model.safetensors: unpack"),
    "half a torch file": (half_a_torch_file, "truncated or damaged: .*download"),
}


@pytest.mark.parametrize("name", ["m.safetensors", "m.ckpt", "m.bin", "M.SAFETENSORS"])
@pytest.mark.parametrize("case", FOREIGN)
def test_what_is_no_weights_is_named_with_the_remedy(tmp_path, case, name):
    content, remedy = FOREIGN[case]
    path = tmp_path / name
    content(path) if callable(content) else path.write_bytes(content)
    for read in (
        read_any_header,
        Adapter.load,
        safetensors.read_header,
        torch_zip.read_pickle_header,
    ):
        with pytest.raises(BadInput, match=f"(?s)^{path}: .*{remedy}") as caught:
            read(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", TORCH_LIKE)
@pytest.mark.parametrize("read", [read_any_header, Adapter.load])
def test_a_zip_that_is_no_torch_file_is_named_with_the_remedy(tmp_path, case, read):
    make, remedy = TORCH_LIKE[case]
    make(tmp_path / "m.ckpt")
    with pytest.raises(BadInput, match=remedy):
        read(tmp_path / "m.ckpt")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a Windows file system has no pipes")
@pytest.mark.parametrize("read", [read_any_header, Adapter.load])
def test_a_pipe_is_refused_without_waiting_for_its_writer(tmp_path, read):
    os.mkfifo(tmp_path / "m.safetensors")
    with pytest.raises(BadInput, match="a pipe or a device; expected a file"):
        read(tmp_path / "m.safetensors")


@pytest.mark.parametrize("name", ["m.ckpt", "m.SAFETENSORS", "m.pt", "m"])
def test_safetensors_are_read_under_any_name(tmp_path, name):
    save_file({"a.w": np.ones(2, np.float32)}, tmp_path / name)
    assert list(read_any_header(tmp_path / name).tensors) == ["a.w"]


@pytest.mark.parametrize("name", ["m.safetensors", "m.SAFETENSORS", "m"])
def test_torch_files_are_read_under_any_name(tmp_path, name):
    torch.save({"a.w": torch.ones(2)}, tmp_path / name)
    assert list(read_any_header(tmp_path / name).tensors) == ["a.w"]


@pytest.mark.parametrize("length", [640, 0x4B50, 0x8B1F + 1, 0x227B])
def test_a_header_whose_length_looks_like_another_file_is_read(tmp_path, length):
    _, header, *rest = serialize({"a": np.ones(2, np.float32)}, {})
    header = header.ljust(length)
    path = tmp_path / "m.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header + b"".join(rest))
    assert not torch_zip.is_torch_file(path)
    assert list(read_any_header(path).tensors) == ["a"]
