"""Train the tests' tiny UNet under torchrun and write the losses: RECIPE-BATCH OUTPUT."""

import json
import sys
from pathlib import Path

from sdd_lora.recipe import Recipe
from sdd_lora.training.trainer import Trainer
from tests.small import ddim, embeddings, small_unet

recipe = Recipe.model_validate(
    {
        "name": "test", "model": "none", "concepts": ["a", "b", "c"], "lora": {"rank": 2},
        "optimizer": {"kind": "adamw", "learning_rate": 0.01}, "ema": {"decay": 0.9},
        "rollout": {"steps": 4, "batch": int(sys.argv[1])}, "training": {"iterations": 4},
    }
)  # fmt: skip
trainer = Trainer(recipe, small_unet(), ddim(), embeddings())
report = trainer.run()
if trainer.accelerator.is_main_process:
    result = {"losses": trainer.losses, "passes": report.unet_passes,
              "processes": trainer.accelerator.num_processes}  # fmt: skip
    Path(sys.argv[2]).write_text(json.dumps(result))
