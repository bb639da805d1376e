"""Every number of a GPU that the README wants, in one command:

    python tests/benchmarks/bench_gpu.py [-o FILE] [--only PART]... [--tiny] [--seconds S]

Parts: card, forward, compile, training (with the dtypes of the optimizer's states), drawing, erase,
bake. Random weights of SD 1.5's true size; nothing is downloaded. Each measurement is a line of
FILE (bench-gpu.jsonl), and what stands there is not measured again: a call that was cut short goes
on. A part should take minutes on a data-centre card (nobody has run one yet); what fails, as for a
lack of memory, is told, and the next one is measured.

`--tiny` takes the embedded model's sizes and the CPU where there is no card: it shows that the
command works, and its numbers say nothing of a GPU.
"""

import argparse
import datetime
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import bench_bake
import bench_erase
from support import checkpoint_models
from support.small import ddim

from sdd_lora import sd1
from sdd_lora.checkpoint.bake import bake
from sdd_lora.checkpoint.locate import DEMO_FOLDER
from sdd_lora.generation.batches import drawing_footprint
from sdd_lora.generation.images import draw
from sdd_lora.generation.sampling import Sampling, jobs_for
from sdd_lora.recipe import Recipe
from sdd_lora.runs.measure import versions
from sdd_lora.sd.clip_tokenizer import clip_tokenizer
from sdd_lora.sd.devices import DTYPES, best_device, default_dtype
from sdd_lora.sd.pipeline import load_pipeline
from sdd_lora.sd.single_file import SD15_FOLDER, read_config
from sdd_lora.training.embeddings import Embeddings
from sdd_lora.training.memory import peak_bytes, reset_peak
from sdd_lora.training.plan import footprint
from sdd_lora.training.trainer import Trainer

RECIPE = """
name: bench
model: owner/sd15
concepts: [x]
preserve: {prompts: [y]}
rollout: {steps: 10, timesteps_per_trajectory: 4}
"""
_HALF = {"training.precision": "bf16", "training.base_precision": "bf16"}
_CHECKPOINTED = {"training.gradient_checkpointing": True}
#: the recipe's changes of each training; the first is the dearest, each later one saves memory
TRAININGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32, checkpointed": _CHECKPOINTED,
    "bf16": _HALF,
    "bf16, checkpointed": _HALF | _CHECKPOINTED,
    "bf16, checkpointed, 4 latents": _HALF | _CHECKPOINTED | {"rollout.batch": 4},
    "nf4, checkpointed": _HALF | _CHECKPOINTED | {"training.base_precision": "nf4"},
    "bf16, adamw in 32 bits": _HALF | {"optimizer.kind": "adamw"},
    "whole weights, bf16": _HALF | {"parameters": "full", "lora": {}},
}


@dataclass
class Bench:
    """What is measured where; `seconds` is how long a rate is taken over."""

    device: torch.device
    tiny: bool
    seconds: float
    file: Path
    done: set[str]

    @property
    def folder(self) -> Path:
        """The configurations of the model whose sizes are taken."""
        return DEMO_FOLDER if self.tiny else SD15_FOLDER

    def measure(self, name: str, work: Callable[[], Mapping[str, Any]]) -> None:
        """Do the work unless its line stands in the file; print and keep its numbers."""
        if name in self.done:
            print(f"{name}: measured already", flush=True)
            return
        try:
            found = dict(work())
        except Exception as error:  # the next measurement may fit
            print(f"{name}: failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
            return
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"name": name} | found) + "\n")
        print(f"{name}: " + ", ".join(f"{k} {_shown(v)}" for k, v in found.items()), flush=True)

    def rate(self, work: Callable[[], Any]) -> float:
        """Calls a second, after two calls to warm up; of one call alone for 0 seconds."""
        for _ in range(2 if self.seconds else 0):
            work()
        self._wait()
        count, started = 0, time.perf_counter()
        while (took := time.perf_counter() - started) < self.seconds or not count:
            work()
            self._wait()
            count += 1
        return count / took if took else float(count)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def card(bench: Bench) -> None:
    """The card, its driver, the versions, and its products of matrices."""

    def named() -> dict[str, Any]:
        driver = "none"
        with suppress(OSError, subprocess.CalledProcessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            asked = subprocess.run(query, check=True, capture_output=True, text=True)
            driver = asked.stdout.strip()
        name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
        return {"card": name, "driver": driver, "cuda": str(torch.version.cuda)} | versions()

    def products(dtype: torch.dtype) -> dict[str, Any]:
        side = 256 if bench.tiny else 8192
        a = torch.randn(side, side, device=bench.device, dtype=dtype)
        return {"TFLOP/s": bench.rate(lambda: a @ a) * 2 * side**3 / 1e12}

    bench.measure("card", named)
    torch.set_float32_matmul_precision("high")
    for name, dtype in DTYPES.items():
        bench.measure(f"matrix products, {name}", lambda dtype=dtype: products(dtype))


def unet_of(bench: Bench, dtype: torch.dtype) -> UNet2DConditionModel:
    """A UNet of random weights on the device."""
    return _random(bench, dtype, lambda: UNet2DConditionModel.from_config(bench_config(bench)))


def bench_config(bench: Bench, part: str = "unet") -> dict[str, Any]:
    return read_config(bench.folder, part)


def _random(bench: Bench, dtype: torch.dtype, make: Callable[[], Any]) -> Any:
    """A module of random weights, made on the device in its dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with bench.device:
            return make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def inputs_of(bench: Bench, batch: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    config = bench_config(bench)
    size, width = config["sample_size"], config["cross_attention_dim"]
    return (
        torch.randn(batch, 4, size, size, device=bench.device, dtype=dtype),
        torch.full((batch,), 500, device=bench.device),
        torch.randn(batch, 77, width, device=bench.device, dtype=dtype),
    )


def _passes(bench: Bench, unet: Any, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """Passes a second, their arithmetic a second, and the peak."""
    inputs = inputs_of(bench, batch, dtype)
    with torch.no_grad():
        reset_peak()
        a_second = batch * bench.rate(lambda: unet(*inputs))
        peak = peak_bytes()
    return {"passes/s": a_second, "peak GB": peak / 1e9}


def forward(bench: Bench) -> None:
    """UNet passes a second: by precision, batch and memory format."""
    for name, dtype in DTYPES.items():
        for batch in (2, 16):
            for layout in ("", ", channels last"):

                def work(dtype: Any = dtype, batch: int = batch, layout: str = layout) -> Any:
                    unet = unet_of(bench, dtype)
                    if layout:
                        unet.to(memory_format=torch.channels_last)
                    found = _passes(bench, unet, batch, dtype)
                    with FlopCounterMode(display=False) as counted, torch.no_grad():
                        unet(*inputs_of(bench, 1, dtype))
                    flops = counted.get_total_flops()
                    return found | {"TFLOP/s": found["passes/s"] * flops / 1e12}

                bench.measure(f"forward, {name}, {batch} at once{layout}", work)


def compiled(bench: Bench) -> None:
    """The same through torch.compile, and how long that takes."""
    if bench.tiny:
        print("compile: needs a compiler, and is left out of --tiny")
        return

    def work() -> dict[str, Any]:
        dtype = torch.bfloat16
        unet = torch.compile(unet_of(bench, dtype))
        started = time.perf_counter()
        with torch.no_grad():
            unet(*inputs_of(bench, 16, dtype))
        took = time.perf_counter() - started
        return {"seconds to compile": took} | _passes(bench, unet, 16, dtype)

    bench.measure("forward, bf16, 16 at once, torch.compile", work)


def training(bench: Bench) -> None:
    """Iterations a second and the peak, beside the plan's, with each way to save memory."""
    for name, changes in TRAININGS.items():

        def work(changes: Mapping[str, Any] = changes) -> dict[str, Any]:
            recipe = Recipe.parse(RECIPE, overrides=dict(changes))
            config = bench_config(bench)
            planned = footprint(recipe, config)
            unet = UNet2DConditionModel.from_config(config)
            prompt = torch.randn(1, 77, config["cross_attention_dim"])
            reset_peak()
            trainer = Trainer(recipe, unet, ddim(), Embeddings(prompt, prompt, prompt, prompt))
            a_second = bench.rate(trainer.step)
            states = trainer.optimizer.optimizer.state.values()
            kinds = {str(x.dtype) for state in states for x in state.values() if _is_large(x)}
            return {
                "it/s": a_second,
                "passes/s": a_second * planned.passes,
                "peak GB": peak_bytes() / 1e9,
                "planned GB": planned.total / 1e9,
                "states": " ".join(sorted(kinds)),
            }

        bench.measure(f"training, {name}", work)


def _is_large(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() > 256  # a map of the 8 bits has 256


def drawing(bench: Bench) -> None:
    """Images a second and the peak, 20 steps with guidance, beside what `plan` says."""
    configs = {part: bench_config(bench, part) for part in ("unet", "vae", "text_encoder")}
    dtype = default_dtype(bench.device)
    planned = drawing_footprint(configs, dtype)
    for batch in (1, 4) if bench.tiny else (1, 4, 8, 16):

        def work(batch: int = batch) -> dict[str, Any]:
            reset_peak()
            pipeline = pipeline_of(bench, configs, dtype)
            sampling = Sampling(steps=2 if bench.tiny else 20, batch=batch)
            jobs = jobs_for(["a photo"], batch, 0)
            rate = bench.rate(lambda: list(draw(pipeline, jobs, sampling, "drawing")))
            return {
                "images/s": batch * rate,
                "peak GB": peak_bytes() / 1e9,
                "planned GB": planned.total(batch) / 1e9,
            }

        bench.measure(f"drawing, {batch} at once", work)


def pipeline_of(
    bench: Bench, configs: Mapping[str, Any], dtype: torch.dtype
) -> StableDiffusionPipeline:
    """The embedded model, or SD 1.5 with random weights."""
    if bench.tiny:
        return load_pipeline("demo", dtype=dtype, device=bench.device)
    text = CLIPTextConfig.from_dict(configs["text_encoder"])
    pipeline = StableDiffusionPipeline(
        vae=_random(bench, dtype, lambda: AutoencoderKL.from_config(configs["vae"])),
        text_encoder=_random(bench, dtype, lambda: CLIPTextModel(text)),
        tokenizer=clip_tokenizer(),
        unet=unet_of(bench, dtype),
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def erase(bench: Bench) -> None:
    """An eraser from words, without and with the kept words' embeddings in the cache."""
    parts = None if bench.tiny else bench_erase.true_size()
    concepts, words = ("axe", 50) if bench.tiny else ("zyx", bench_erase.WORDS)

    def work() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["SDD_LORA_CACHE"] = folder
            if parts is not None:
                bench_erase.module.load_text_parts = lambda model: parts
            took = []
            for _ in range(2):
                started = time.perf_counter()
                bench_erase.module.erase([concepts], "demo", vocabulary=words)
                took.append(time.perf_counter() - started)
        return {"seconds": took[0], "seconds, words cached": took[1]}

    bench.measure("erase, one concept", work)


def baked(bench: Bench) -> None:
    """An adapter baked into a file of 3.85 GB (fp16, with EMA copies), by disk and CPU."""

    def work() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as name:
            model, widths = Path(name) / "model.safetensors", None
            if bench.tiny:
                checkpoint_models.write(model, checkpoint_models.ldm_tensors())
            else:
                bench_bake.build(model, "fp16")
                widths = sd1.SD15
            sizes = {} if widths is None else {"widths": widths}
            adapter = checkpoint_models.adapter(size=1e-3, **sizes)
            started = time.perf_counter()
            bake(model, [(adapter, 1.0)], out=Path(name) / "out.safetensors")
            return {"seconds": time.perf_counter() - started, "GB": model.stat().st_size / 1e9}

    bench.measure("bake", work)


PARTS = {
    "card": card,
    "forward": forward,
    "compile": compiled,
    "training": training,
    "drawing": drawing,
    "erase": erase,
    "bake": baked,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("bench-gpu.jsonl"))
    parser.add_argument("--only", action="append", choices=PARTS, help="repeat for several parts")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=10.0, help="over which a rate is taken")
    options = parser.parse_args()
    device = best_device()
    if device.type != "cuda" and not options.tiny:
        raise SystemExit("no CUDA card here: expected one, or --tiny")
    lines = options.output.read_text("utf-8").splitlines() if options.output.exists() else []
    done = {json.loads(line)["name"] for line in lines}
    bench = Bench(device, options.tiny, options.seconds, options.output, done)
    print(f"{datetime.date.today()}, {device}, to {options.output}", flush=True)
    for name in options.only or PARTS:
        PARTS[name](bench)


if __name__ == "__main__":
    main()
