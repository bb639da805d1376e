"""Stack 100 adapters of SD 1.5 size, rank 4, in at most 10 s and 1 GB, the report included.

Run `python tests/benchmarks/bench_stack.py`. The adapters are read from files.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from sdd_lora import sd1 as names
from sdd_lora.adapter.adapter import Adapter, Factors

COUNT, RANK = 100, 4
MAX_SECONDS, MAX_BYTES = 10, 1e9

CHILD = """
import json, resource, sys
from sdd_lora.cli import app
try:
    app([*sys.argv[1:], "--json"])
except SystemExit as end:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(peak * (1 if sys.platform == "darwin" else 1024), file=sys.stderr)
    raise
"""


def make(folder: Path) -> list[str]:
    rng = np.random.default_rng(0)
    whole = names.unet_shapes()
    shapes = {name: whole[name] for name in names.CROSS_ATTENTION}
    paths = []
    for n in range(COUNT):
        factors = {
            name: Factors(
                rng.standard_normal((RANK, wide_in), np.float32),
                1e-3 * rng.standard_normal((out, RANK), np.float32),
                float(RANK),
            )
            for name, (out, wide_in) in shapes.items()
            if name.endswith(("to_k", "to_v"))
        }
        path = folder / f"{n}.safetensors"
        paths.append(str(Adapter(factors, {"name": f"a{n}"}).save(path)))
    return paths


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = make(folder)
        start = time.perf_counter()
        child = subprocess.run(
            [sys.executable, "-c", CHILD, "stack", *paths, "-o", str(folder / "s.safetensors")],
            check=True,
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - start
        peak_bytes = int(child.stderr.split()[-1])
        assert json.loads(child.stdout)["rank"] == COUNT * RANK
    print(f"{COUNT} adapters: {seconds:.2f} s, {peak_bytes / 1e6:.0f} MB")
    assert seconds <= MAX_SECONDS
    assert peak_bytes <= MAX_BYTES


if __name__ == "__main__":
    main()
