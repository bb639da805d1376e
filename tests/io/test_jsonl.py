"""Lines that a kill cut short are taken back, and damaged files are named."""

import pytest

from sdd_lora.errors import BadInput
from sdd_lora.io.jsonl import append_lines, read_lines, whole_lines


def test_a_line_that_a_kill_cut_short_goes_before_the_next(tmp_path):
    path = tmp_path / "a.jsonl"
    append_lines(path, [{"n": 1, "text": "one\u2028line"}])
    path.write_bytes(path.read_bytes() + '{"n": 2, "text": "ä'.encode()[:-1])
    assert read_lines(path, {"n": int}) == [{"n": 1, "text": "one\u2028line"}]
    append_lines(path, [{"n": 3, "text": ""}])
    assert [line["n"] for line in read_lines(path, {"n": int, "text": str})] == [1, 3]
    assert read_lines(tmp_path / "absent.jsonl", {}) == []


@pytest.mark.parametrize("damage", ["{\n", "[1]\n", '{"n": "1"}\n', '{"m": 1}\n', "\udcff\n"])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "a.jsonl"
    path.write_bytes(damage.encode("utf-8", "surrogateescape"))
    with pytest.raises(BadInput, match=r"a\.jsonl"):
        read_lines(path, {"n": int})


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(BadInput, match="can't read"):
        whole_lines(tmp_path)
