"""How fast baking is, against copying the file and against the obvious script.

    python tests/benchmarks/bench_bake.py [FOLDER] [--rounds N] [--dtype fp16|fp32] [--no-script]

Builds a file of true size (every tensor of SD 1.5 with EMA copies: 3.85 GB at fp16) in FOLDER, or a
temporary folder, and prints the best of N rounds; the rounds are interleaved. Needs four times the
file's size of free disk. Peak memory is of the whole process, mapped pages included. The tool
starts from bytecode, as when it is installed, also where this environment writes none.
"""

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import checkpoint_models as models

from sdd_lora import sd1 as names
from sdd_lora.checkpoint.copying import encode_header
from sdd_lora.io.safetensors import NUMPY_DTYPES, TensorInfo

#: Between two commands: a disk is still busy with what was deleted when `sync` returns.
PAUSE_SECONDS = 5

OBVIOUS = """
import sys
from safetensors.torch import load_file, save_file
from sdd_lora import Adapter
from sdd_lora import sd1 as names
tensors, adapter = load_file(sys.argv[1]), Adapter.load(sys.argv[2])
for module in adapter.factors:
    key = f"{names.LDM_UNET_PREFIX}{names.to_ldm(module)}.weight"
    for k in (key, names.ema_keys(key)[0]):
        tensors[k] = (tensors[k].float() + adapter.delta(module)).to(tensors[k].dtype)
save_file(tensors, sys.argv[3])
with open(sys.argv[3], "rb") as file:
    import os
    os.fsync(file.fileno())
"""


class Measured(NamedTuple):
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def build(path: Path, dtype: str) -> None:
    """A full SD 1.5 file with EMA copies; its values are noise of the size of weights."""
    code = {"fp16": "F16", "fp32": "F32"}[dtype]
    keys = models.full_size_keys()
    unet = {k: v for k, v in keys.items() if k.startswith(names.LDM_UNET_PREFIX)}
    keys |= {names.ema_keys(key)[0]: shape for key, shape in unet.items()}
    keys |= {"model_ema.decay": ((), None), "model_ema.num_updates": ((), "I32")}
    tensors, offset = {}, 0
    for key, (shape, fixed) in sorted(keys.items()):
        kind = fixed or code
        end = offset + int(np.prod(shape)) * NUMPY_DTYPES[kind].itemsize
        tensors[key] = TensorInfo(kind, shape, offset, end)
        offset = end
    noise = 0.03 * np.random.default_rng(0).standard_normal(1 << 24)
    block = noise.astype(NUMPY_DTYPES[code]).tobytes()
    with open(path, "wb") as file:
        file.write(encode_header(tensors, {"format": "pt"}))
        for start in range(0, offset, len(block)):
            file.write(block[: min(len(block), offset - start)])
        os.fsync(file.fileno())


def measured(command: list[str]) -> Measured:
    """A process, measured; this one stays small, because a child starts with its peak memory."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[:4]} failed")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Measured(seconds, usage.ru_utime + usage.ru_stime, peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["fp16", "fp32"], default="fp16")
    parser.add_argument("--no-script", action="store_true", help="leave the obvious script out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        run(Path(work), options)


def run(work: Path, options: argparse.Namespace) -> None:
    model = work / "model.safetensors"
    building = multiprocessing.Process(target=build, args=(model, options.dtype))
    building.start()
    building.join()
    size = model.stat().st_size
    if shutil.disk_usage(work).free < 3 * size:
        raise SystemExit(f"{work}: too little disk")
    adapter = models.adapter(widths=names.SD15, size=1e-3).save(work / "a.safetensors")
    other = models.adapter(widths=names.SD15, size=1e-3, seed=1).save(work / "b.safetensors")
    leaves = names.ATTENTION_LEAVES
    full = models.adapter(widths=names.SD15, size=1e-3, leaves=leaves).save(work / "c.safetensors")
    in_place = work / "in-place.safetensors"
    out, undo = work / "out.safetensors", work / "undo"
    tool = [sys.executable, "-m", "sdd_lora"]
    bake = [*tool, "bake", str(model), str(adapter), "-o", str(out)]
    kept = Path(f"{in_place}.undo1")

    def back() -> None:
        command = [*tool, "unbake", str(in_place), str(kept), "--in-place"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        kept.unlink()

    commands: dict[str, tuple[list[str], Callable[[], object]]] = {
        "cp + fsync": (["sh", "-c", f"cp '{model}' '{out}' && sync '{out}'"], out.unlink),
        "bake": (bake, out.unlink),
        "bake, two adapters": (
            [*tool, "bake", str(model), str(adapter), str(other), "-o", str(out)],
            out.unlink,
        ),
        "bake --undo": ([*bake, "--undo", str(undo)], lambda: (out.unlink(), undo.unlink())),
        "bake --in-place": ([*tool, "bake", str(in_place), str(adapter), "--in-place"], back),
        "bake --in-place, all 64 matrices": (
            [*tool, "bake", str(in_place), str(full), "--in-place"],
            back,
        ),
    }
    if not options.no_script:
        script = [sys.executable, "-c", OBVIOUS, str(model), str(adapter), str(out)]
        commands["load_file, add, save_file"] = (script, out.unlink)
    shutil.copyfile(model, in_place)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(work.absolute() / "bytecode")
    measured(commands["bake --in-place"][0])
    back()
    found: dict[str, list[Measured]] = {name: [] for name in commands}
    for _ in range(options.rounds):
        for name, (command, clear) in commands.items():
            os.sync()
            time.sleep(PAUSE_SECONDS)
            found[name].append(measured(command))
            clear()
    report(size, found)


def report(size: int, found: dict[str, list[Measured]]) -> None:
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"{size / 1e9:.2f} GB, {os.cpu_count()} cores{load}")
    base = min(run.seconds for run in found["cp + fsync"])
    for name, runs in found.items():
        best = min(run.seconds for run in runs)
        cpu = min(run.cpu_seconds for run in runs)
        peak = max(run.peak_bytes for run in runs)
        every = " ".join(f"{run.seconds:.2f}" for run in runs)
        print(
            f"{name:32} {best:7.2f} s {best / base:5.2f} × cp  cpu {cpu:5.2f} s "
            f"{peak / 1e6:6.0f} MB  ({every})"
        )


if __name__ == "__main__":
    main()
