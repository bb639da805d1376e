"""Train the tests' tiny UNet under torchrun and write the losses: BATCH WAY OUTPUT [STATE].

With a state that exists the run goes on from there; otherwise it is left after 3 iterations."""

import json
import sys
from pathlib import Path

from support.small import ddim, embeddings, small_unet

from sdd_lora.recipe import Recipe
from sdd_lora.training.trainer import Trainer

way = json.loads(sys.argv[2])
recipe = Recipe.model_validate(
    {
        "name": "test", "model": "none", "concepts": ["a", "b", "c"],
        "lora": {"rank": 2} | way.get("lora", {}),
        "optimizer": {"kind": "adamw", "learning_rate": 0.01}, "ema": {"decay": 0.9},
        "rollout": way["rollout"] | {"batch": int(sys.argv[1])},
        "training": {"iterations": 4},
    }
)  # fmt: skip
state = Path(sys.argv[4]) if len(sys.argv) > 4 else None
trainer = Trainer(recipe, small_unet(), ddim(), embeddings(), state)
if state and not state.exists():
    for _ in range(3):
        trainer.losses.append(trainer.step())
    trainer.save_state()
    sys.exit()
if state:
    trainer.resume()
report = trainer.run()
if trainer.accelerator.is_main_process:
    result = {"losses": trainer.losses, "passes": report.unet_passes,
              "processes": trainer.accelerator.num_processes}  # fmt: skip
    Path(sys.argv[3]).write_text(json.dumps(result))
