"""One thread a process: small tensors gain nothing from more, and on a busy machine threads that
wait for each other make tests many times slower. The log is each test's own."""

import logging
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def log_as_it_was() -> Iterator[None]:
    """A verb sets up the log for its process; run inside a test's, it would stay set up."""
    log = logging.getLogger("sdd_lora")
    handlers, level, propagate = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.propagate = handlers, propagate
    log.setLevel(level)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu` where there is no card."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA card")
