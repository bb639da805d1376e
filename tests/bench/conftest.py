"""A small bench, run once."""

import pytest
from support.benches import parsed, ran


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return folder, ran(parsed(), folder)
