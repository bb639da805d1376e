"""How an adapter comes to erase, and what else it moves, without drawing a picture.

    python tests/benchmarks/bench_estimates.py RECIPE [--set NAME=VALUE]… [--every N]

Trains the recipe and prints, before it and every N iterations, on latents that the base samples
towards the recipe's measured prompts (no training sees them): what is left of the concept,
‖ε(c) − ε_b(∅)‖² for the average's ε and the base's ε_b; and how far the kept prompts have moved,
‖ε(c) − ε_b(c)‖²; both as parts of ‖ε_b(c) − ε_b(∅)‖². Then the kept things that moved most. It
compares trials in minutes that pictures would take hours for; it says nothing of what is drawn.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from estimates import Probe, noun_of, of_one_thing

from sdd_lora.cli.common import parse_overrides
from sdd_lora.recipe import Recipe
from sdd_lora.sd.model import load_training_parts
from sdd_lora.sd.prompts import embed
from sdd_lora.training.embeddings import encode_prompts
from sdd_lora.training.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="N=V")
    parser.add_argument("--every", type=int, default=40, help="iterations")
    asked = parser.parse_args()
    recipe = Recipe.load(asked.recipe, parse_overrides(asked.overrides))
    parts = load_training_parts(recipe.model)
    trainer = Trainer(recipe, parts.unet, parts.scheduler, encode_prompts(recipe, parts))

    def probe(prompts: list[str]) -> Probe:
        texts = of_one_thing(prompts)
        embedded = embed(texts, parts.tokenizer, parts.text_encoder)
        empty = trainer.embeddings.empty
        return Probe(trainer.roles.base, parts.scheduler, texts, embedded, empty)

    measured, teacher = recipe.measure.prompts, trainer.roles.teacher
    erased, kept = probe(measured.concept), probe(measured.kept)
    parts.scheduler.set_timesteps(recipe.rollout.steps)
    print(f"{len(erased.texts)} prompts of concepts, {len(kept.texts)} kept", flush=True)
    took: list[float] = []
    while True:
        if not trainer.iteration % asked.every or trainer.iteration == recipe.training.iterations:
            left, moved = erased.distances(teacher)[0], kept.distances(teacher)[1]
            print(
                f"{trainer.iteration:5d}  left {left.sum() / erased.scale.sum():.3f}  "
                f"moved {moved.sum() / kept.scale.sum():.4f}",
                flush=True,
            )
        if trainer.iteration == recipe.training.iterations:
            break
        started = time.monotonic()
        trainer.step()
        took.append(time.monotonic() - started)
    passes = trainer.rollout.unet_passes + trainer.training_passes
    print(f"{passes} UNet passes, {sum(took):.0f} s")
    by_noun = kept.parts(moved, noun_of)
    for noun in sorted(by_noun, key=by_noun.__getitem__, reverse=True)[:10]:
        print(f"  {noun:16} {by_noun[noun]:.3f}")


if __name__ == "__main__":
    main()
