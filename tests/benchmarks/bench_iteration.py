"""Cost of an iteration outside UNet passes, and what keeping freed memory is worth on the CPU.

    python tests/benchmarks/bench_iteration.py [ITERATIONS]

On the embedded model, for several recipes: the share of an iteration's time that is spent neither
in the UNet's forward nor in the backward pass (optimizer, average, solver, bookkeeping), to be at
most 5 %. Then, in processes of their own and in turn, the same training with glibc's own habits
and with freed memory kept: the ratio of their speeds.
"""

import json
import subprocess
import sys
import time
from contextlib import contextmanager

from sdd_lora.recipe import Recipe
from sdd_lora.sd.model import load_training_parts
from sdd_lora.training import trainer as trainer_module
from sdd_lora.training.embeddings import encode_prompts
from sdd_lora.training.trainer import Trainer

RECIPE = """
name: bench
model: demo
preset: demo
concepts: [bomb, axe, dagger]
preserve: {prompts: [a cat, a dog]}
"""
WAYS = {
    "lora": {},
    "one trajectory": {"rollout.batch": 1},
    "fast": {"preset": "fast"},
    "full": {"parameters": "full", "optimizer.learning_rate": 1.0e-5},
}
MOST_OUTSIDE = 0.05


class Clock:
    """Seconds spent inside what it is wrapped around, nested calls counted once."""

    def __init__(self):
        self.seconds, self.depth = 0.0, 0

    @contextmanager
    def running(self):
        self.depth += 1
        started = time.perf_counter()
        try:
            yield
        finally:
            self.depth -= 1
            if not self.depth:
                self.seconds += time.perf_counter() - started

    def around(self, function):
        def timed(*arguments, **options):
            with self.running():
                return function(*arguments, **options)

        return timed


def trainer_of(**changes):
    recipe = Recipe.parse(RECIPE, overrides=changes)
    parts = load_training_parts(recipe.model)
    return Trainer(recipe, parts.unet, parts.scheduler, encode_prompts(recipe, parts))


def outside_share(iterations, **changes):
    """(share of the time outside the UNet, seconds an iteration)."""
    trained, clock = trainer_of(**changes), Clock()
    trained.step()
    trained.roles.unet.forward = clock.around(trained.roles.unet.forward)
    trained.accelerator.backward = clock.around(trained.accelerator.backward)
    started = time.perf_counter()
    for _ in range(iterations):
        trained.step()
    seconds = time.perf_counter() - started
    return 1 - clock.seconds / seconds, seconds / iterations


def seconds_with(keep, iterations):
    """Seconds an iteration in a fresh process, freed memory kept or not."""
    arguments = [sys.executable, __file__, str(iterations), "keep" if keep else "give back"]
    return json.loads(subprocess.run(arguments, check=True, capture_output=True).stdout)


def main():
    iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    if len(sys.argv) > 2:
        if sys.argv[2] == "give back":
            trainer_module.keep_freed_memory = lambda: False
        print(json.dumps(outside_share(iterations)[1]))
        return
    worst = 0.0
    for name, changes in WAYS.items():
        share, seconds = outside_share(iterations, **changes)
        worst = max(worst, share)
        print(f"{name:16} {seconds:6.2f} s an iteration, {100 * share:4.1f} % outside the UNet")
    print(f"at most {100 * MOST_OUTSIDE:.0f} %: {'met' if worst <= MOST_OUTSIDE else 'MISSED'}")
    pairs = [(seconds_with(False, iterations), seconds_with(True, iterations)) for _ in range(3)]
    ratios = sorted(given_back / kept for given_back, kept in pairs)
    print(f"freed memory kept: {ratios[1]:.2f} times as fast ({ratios[0]:.2f} … {ratios[2]:.2f})")


if __name__ == "__main__":
    main()
