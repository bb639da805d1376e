"""Two iterations of every recipe for SD 1.5, at its true size with random weights, small latents.

    python -m tests.benchmarks.bench_sd15_recipes [RECIPE]...

No model is downloaded: prompts are random embeddings, as many as the recipe has, and latents are
8×8. It shows that a recipe runs, and that its loss is finite; nothing about erasing.
"""

import gc
import sys
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from support.small import ddim

from sdd_lora.recipe import Recipe
from sdd_lora.training.embeddings import Embeddings
from sdd_lora.training.trainer import Trainer

FOLDER = Path(__file__).parents[2] / "recipes" / "sd15"
CONFIG = {"sample_size": 8, "cross_attention_dim": 768}
ITERATIONS = 2


def prompts(count):
    return torch.randn(count, 77, 768)


def main():
    for path in map(Path, sys.argv[1:] or sorted(FOLDER.glob("*.yaml"))):
        # rollouts of four steps: fifty say no more about a recipe, and take long
        recipe = Recipe.load(path, {"training.iterations": ITERATIONS, "rollout.steps": 4})
        embeddings = Embeddings(
            prompts(1),
            prompts(len(recipe.concepts)),
            prompts(1),
            prompts(len(recipe.preserve.prompts)),
        )
        started = time.monotonic()
        trainer = Trainer(recipe, UNet2DConditionModel.from_config(CONFIG), ddim(), embeddings)
        report = trainer.run()
        assert report.iterations == len(trainer.losses) == ITERATIONS
        print(f"{path.stem:20} losses {trainer.losses}  {time.monotonic() - started:.0f} s")
        del trainer
        gc.collect()


if __name__ == "__main__":
    main()
