"""Memory of a training at SD 1.5's true size, measured, beside what `plan` says.

    python -m tests.benchmarks.bench_memory [WAY]...

Random weights from the real configuration, 64×64 latents, batch 1, one iteration; each way in a
process of its own. Measured is the process's peak without interpreter and libraries, every tensor
mapped on its own: glibc's heap, which the trainer has keep what was freed, falls to pieces, and
holds up to twice the activations. `authors` is a plain run in the manner of SDD's released code:
two fp32 UNets, student and average, the student not frozen, AdamW on the cross-attention, no
checkpointing. About 12 GB and some minutes on an idle machine. `nf4` is planned only: the process
that packs a base has held the unpacked one.
"""

import json
import os
import subprocess
import sys

SD15 = {"sample_size": 64, "cross_attention_dim": 768}
RECIPE = """
name: bench
model: stable-diffusion-v1-5/stable-diffusion-v1-5
concepts: [x]
rollout: {steps: 2}
training: {gradient_checkpointing: true}
"""
HALF = {"training.precision": "bf16", "training.base_precision": "bf16"}
NF4 = {"training.precision": "bf16", "training.base_precision": "nf4"}
WAYS = {"fp32": {}, "bf16": HALF, "nf4": NF4}
MOST = {"fp32": 4.6e9, "bf16": 2.6e9, "nf4": 1.9e9}
PLANNED_ONLY = {"nf4"}
#: glibc maps blocks of more bytes on their own (mallopt(3))
_MAPPED = "MALLOC_MMAP_THRESHOLD_"
FAR_OFF, TIMES_AS_MUCH = 0.15, 2.5


def recipe_of(way):
    from sdd_lora.recipe import Recipe

    return Recipe.parse(RECIPE, overrides=WAYS[way])


def planned(way):
    from sdd_lora.training.plan import footprint

    return footprint(recipe_of(way), SD15).total


def measured(way):
    """Peak bytes of one iteration, without what the libraries take."""
    import torch
    from support.small import ddim

    from sdd_lora.training import trainer
    from sdd_lora.training.embeddings import Embeddings
    from sdd_lora.training.memory import peak_bytes
    from sdd_lora.training.trainer import Trainer

    trainer.keep_freed_memory = lambda: False
    recipe = recipe_of(way)
    libraries = peak_bytes()
    half = recipe.training.base_precision == "bf16"
    unet = random_unet(torch.bfloat16 if half else torch.float32)
    prompt = torch.randn(1, 77, 768)
    Trainer(recipe, unet, ddim(), Embeddings(prompt, prompt, prompt, None)).step()
    return peak_bytes() - libraries


def in_the_authors_manner():
    """Two UNets, gradients for all of the student, AdamW on attn2, EMA over every parameter."""
    import torch
    from support.small import ddim

    from sdd_lora.training.memory import peak_bytes

    ddim()
    libraries = peak_bytes()
    student, average = random_unet(torch.float32), random_unet(torch.float32)
    average.requires_grad_(False)
    trained = [p for n, p in student.named_parameters() if "attn2" in n]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=1e-4)
    z, t, c = torch.randn(1, 4, 64, 64), torch.tensor([500]), torch.randn(1, 77, 768)
    with torch.no_grad():
        average(z.repeat(2, 1, 1, 1), t, c.repeat(2, 1, 1))
        target = student(z, t, c).sample
    torch.nn.functional.mse_loss(student(z, t, c).sample, target).backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    with torch.no_grad():
        for kept, new in zip(average.parameters(), student.parameters(), strict=True):
            kept.lerp_(new, 0.001)
    return peak_bytes() - libraries


def random_unet(dtype):
    import torch
    from diffusers import UNet2DConditionModel

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return UNet2DConditionModel.from_config(SD15)
    finally:
        torch.set_default_dtype(before)


def in_a_process(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.bench_memory", *arguments],
        check=True,
        stdout=subprocess.PIPE,
        env=os.environ | {_MAPPED: "131072"},
    )
    return json.loads(done.stdout)


def main():
    if sys.argv[1:2] == ["--planned"]:
        return print(planned(sys.argv[2]))
    if sys.argv[1:2] == ["--measured"]:
        way = sys.argv[2]
        return print(in_the_authors_manner() if way == "authors" else measured(way))
    ours = None
    for way in sys.argv[1:] or [*WAYS, "authors"]:
        plan = in_a_process("--planned", way) if way in WAYS else None
        if plan is not None:
            print(f"{way:8} planned  {plan / 1e9:6.2f} GB, {at_most(way, plan)}", flush=True)
        if way in PLANNED_ONLY:
            continue
        real = in_a_process("--measured", way)
        print(f"{way:8} measured {real / 1e9:6.2f} GB", end="")
        if plan is not None:
            off = plan / real - 1
            print(f", {at_most(way, real)}; plan {100 * off:+.0f} %, ", end="")
            print(f"at most ± {100 * FAR_OFF:.0f} %: {verdict(abs(off) <= FAR_OFF)}", flush=True)
        elif ours:
            times = real / ours
            print(
                f", {times:.2f} times fp32 with checkpointing, at least {TIMES_AS_MUCH}: "
                f"{verdict(times >= TIMES_AS_MUCH)}",
                flush=True,
            )
        else:
            print(flush=True)
        ours = real if way == "fp32" else ours


def at_most(way, size):
    return f"at most {MOST[way] / 1e9:.1f}: {verdict(size <= MOST[way])}"


def verdict(met):
    return "met" if met else "MISSED"


if __name__ == "__main__":
    main()
