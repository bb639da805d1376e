"""Ways of making a rollout's forwards cheaper that the product doesn't have: what each would save.

    python tests/benchmarks/bench_rollout.py [--rounds N]

On the embedded model, ten DDIM steps under guidance, 8 trajectories at once, by the teacher of a
student that adapts to_k and to_v: seconds of each way as a share of the plain way's, interleaved,
medians; and how far its latents end from the plain ones, as a part of the latents' norm. `deep` is
DeepCache's idea (Ma et al. 2023): all but the outermost blocks run at every second step only, and
their features are used again at the next.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from diffusers import UNet2DConditionModel

from sdd_lora.recipe import Recipe
from sdd_lora.sd.model import load_training_parts
from sdd_lora.sd.prompts import embed
from sdd_lora.training.embeddings import encode_prompts
from sdd_lora.training.trainer import Trainer

RECIPE = "name: bench\nmodel: demo\npreset: demo\nconcepts: [bomb, axe]\n"
PROMPTS = ["a bomb", "an axe", "a cat", "a pizza", "a car", "a key", "a tree", "a skull"]
STEPS, GUIDANCE = 10, 3.0


@contextmanager
def deep_features_twice(unet: UNet2DConditionModel) -> Iterator[None]:
    """Inner blocks compute at even steps, and give at odd ones what they gave before."""
    blocks = [*unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1]]

    def every_second(forward: Callable) -> Callable:
        given: list = []

        def remembered(*args, **kwargs):
            if not given:
                given.append(forward(*args, **kwargs))
                return given[0]
            return given.pop()

        return remembered

    for block in blocks:
        block.forward = every_second(block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@contextmanager
def channels_last(unet: UNet2DConditionModel) -> Iterator[None]:
    unet.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        unet.to(memory_format=torch.contiguous_format)


@torch.no_grad()
def roll_out(unet, scheduler, z, prompts, empty) -> torch.Tensor:
    scheduler.set_timesteps(STEPS)
    both = torch.cat([empty.expand_as(prompts), prompts])
    for t in scheduler.timesteps:
        e_0, e_p = unet(torch.cat([z, z]), t, both).sample.chunk(2)
        z = scheduler.step(e_0 + GUIDANCE * (e_p - e_0), t, z).prev_sample
    return z


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    recipe, parts = Recipe.parse(RECIPE), load_training_parts("demo")
    trainer = Trainer(recipe, parts.unet, parts.scheduler, encode_prompts(recipe, parts))
    prompts = embed(PROMPTS, parts.tokenizer, parts.text_encoder)
    z = torch.randn(len(PROMPTS), 4, 16, 16, generator=torch.Generator().manual_seed(0))
    unet = trainer.roles.unet
    compiled = torch.compile(unet)
    ways = {
        "plain": (unet, nullcontext),
        "channels_last": (unet, lambda: channels_last(unet)),
        "torch.compile": (compiled, nullcontext),
        "deep": (unet, lambda: deep_features_twice(unet)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    ends = {}
    for turn in range(rounds + 1):  # the first one warms up, and compiles
        for name, (forward, prepared) in ways.items():
            with trainer.roles.teacher(), prepared():
                started = time.perf_counter()
                ends[name] = roll_out(
                    forward, parts.scheduler, z, prompts, trainer.embeddings.empty
                )
                took = time.perf_counter() - started
            if turn:
                seconds[name].append(took)
            elif name == "torch.compile":
                print(f"compiling and one rollout took {took:.0f} s", flush=True)
    for name in ways:
        shares = [a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)]
        off = (ends[name] - ends["plain"]).norm() / ends["plain"].norm()
        print(f"{name:14} {statistics.median(shares):.2f} of the time, latents off by {off:.3f}")


if __name__ == "__main__":
    main()
