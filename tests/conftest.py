"""One thread a process: small tensors gain nothing from more, and on a busy machine threads that
wait for each other make tests many times slower."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
