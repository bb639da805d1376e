"""Text files that can't be read are told in one line that names what was expected."""

import os

import pytest

from sdd_lora.errors import BadInput
from sdd_lora.io.text import read_text


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a.yaml").write_text("name: é", "utf-8-sig")
    assert read_text(tmp_path / "a.yaml", "a recipe") == "name: é"


@pytest.mark.parametrize(
    ("make", "name", "told"),
    [
        (lambda d: (d / "weapons.yaml").touch(), "weapon.yaml", "no such file; did you mean DIR/w"),
        (lambda d: None, "weapon.yaml", "found no such file"),
        (lambda d: None, "no/weapon.yaml", "found no such file"),
        (lambda d: (d / "a.yaml").mkdir(), "a.yaml", "found a folder"),
        (lambda d: (d / "a.txt").touch(), "a.txt/b.json", "can't read it: Not a directory"),
        (
            lambda d: (d / "a.yaml").write_text("name: x", "utf-16"),
            "a.yaml",
            "found no UTF-8 at byte 0; save it as UTF-8",
        ),
    ],
)
def test_what_is_no_text_is_told_in_one_line(tmp_path, make, name, told):
    make(tmp_path)
    with pytest.raises(BadInput) as caught:
        read_text(tmp_path / name, "a recipe (YAML text)")
    message = str(caught.value).replace(str(tmp_path), "DIR").replace(os.sep, "/")
    assert message.startswith(f"DIR/{name}: expected a recipe (YAML text), ")
    assert told in message and "\n" not in message
