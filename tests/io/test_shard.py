"""Shards of a job array: a list of work, split without a word between the jobs."""

import pytest

from sdd_lora.errors import BadInput
from sdd_lora.io.distributed import Shard


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_shards_together_do_everything_once(count):
    items = list("abcde")
    parts = [Shard.parse(f"{index}/{count}").take(items) for index in range(1, count + 1)]
    assert sorted(item for part in parts for item in part) == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_an_items_shard_does_not_depend_on_what_follows():
    assert Shard(2, 3).take("abcdef") == ["b", "e"]
    assert Shard(2, 3).take("abcdefgh") == ["b", "e", "h"]


@pytest.mark.parametrize(
    "text", ["0/4", "5/4", "1", "1/0", "a/b", "-1/4", "1/4/2", "", "1/99999999999"]
)
def test_other_shards_are_bad_input(text):
    with pytest.raises(BadInput, match="shard"):
        Shard.parse(text)
