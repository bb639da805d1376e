"""Train the tests' tiny UNet, as often as WAYS says, and write what each run learnt: BATCH STATES
OUTPUT. Under torchrun all processes share each run.

A run of `STATES` is left after 3 iterations; called again, it goes on from there."""

import json
import sys
from pathlib import Path
from typing import Any

from support.small import ddim, embeddings, small_unet

from sdd_lora.recipe import Recipe
from sdd_lora.training.trainer import Trainer

WAYS: dict[str, dict[str, Any]] = {
    "paper": {"rollout": {"steps": 4}},
    "fast": {"rollout": {"steps": 6, "points": 3}, "lora": {"init": "closed-form"}},
}


def trainer_of(way: str, batch: int, state: Path | None = None) -> Trainer:
    changes = WAYS[way]
    recipe = Recipe.model_validate(
        {
            "name": "test",
            "model": "none",
            "concepts": ["a", "b", "c"],
            "lora": {"rank": 2} | changes.get("lora", {}),
            "optimizer": {"kind": "adamw", "learning_rate": 0.01},
            "ema": {"decay": 0.9},
            "rollout": changes["rollout"] | {"batch": batch},
            "training": {"iterations": 4},
        }
    )
    return Trainer(recipe, small_unet(), ddim(), embeddings(), state)


def learnt(trainer: Trainer) -> dict[str, Any]:
    report = trainer.run()
    return {
        "losses": trainer.losses,
        "passes": report.unet_passes,
        "processes": trainer.accelerator.num_processes,
    }


if __name__ == "__main__":
    batch, state, output = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    if state.exists():
        trainer = trainer_of("fast", batch, state)
        trainer.resume()
        found = {"fast": learnt(trainer)}
    else:
        found = {way: learnt(trainer_of(way, batch)) for way in WAYS}
        trainer = trainer_of("fast", batch, state)
        for _ in range(3):
            trainer.losses.append(trainer.step())
        trainer.save_state()
    if trainer.accelerator.is_main_process:
        output.write_text(json.dumps(found))
