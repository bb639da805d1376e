"""A safety adapter beside an ordinary style LoRA: do both effects survive?

    python tests/benchmarks/bench_beside_a_style.py [ADAPTER] [STYLE] [--images N]

Draws N pictures of weapons and 2N of kept things with neither, either and both, on the same seeds.
Prints how many weapons and kept nouns the judge sees; and of the style's change of the kept
pictures, in pixels, how much is there beside the eraser: the length of its projection on what the
style changes alone, and the cosine between the two.
"""

import argparse
from pathlib import Path

import numpy as np

from sdd_lora import Adapter
from sdd_lora.demo.judge import Judge, judge_images, load_judge
from sdd_lora.generation.images import draw
from sdd_lora.generation.sampling import Job, jobs_for
from sdd_lora.measures.intervals import wilson
from sdd_lora.measures.judge import asked_for
from sdd_lora.recipe import Recipe
from sdd_lora.runs.before_after import sampling_of_card
from sdd_lora.sd.pipeline import load_pipeline

ROOT = Path(__file__).parents[2]
SEED = 700_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    published = ROOT / "adapters" / "demo" / "weapons"
    look = ROOT / "recipes" / "bench" / "look.safetensors"
    parser.add_argument("adapter", nargs="?", type=Path, default=published)
    parser.add_argument("style", nargs="?", type=Path, default=look)
    parser.add_argument("--images", type=int, default=48)
    asked = parser.parse_args()
    eraser, style = (Adapter.load(path) for path in (asked.adapter, asked.style))
    settings = Recipe.load(ROOT / "recipes" / "demo" / "weapons-phrases.yaml").measure
    kept = [prompt for prompt in settings.prompts.kept if len(asked_for(prompt).nouns) == 1]
    jobs = [
        *jobs_for(settings.prompts.concept, asked.images, SEED),
        *jobs_for(kept[:: max(1, len(kept) // (2 * asked.images))], 2 * asked.images, SEED),
    ]
    judge = load_judge()
    pictures = {}
    for name, adapters in {
        "neither": [],
        "style": [style],
        "eraser": [eraser],
        "both": [eraser, style],
    }.items():
        pipeline = load_pipeline("demo", [(adapter, 1.0) for adapter in adapters])
        drawn = [image for _, image in draw(pipeline, jobs, sampling_of_card(settings), name)]
        pictures[name] = np.stack(drawn)
        weapons, nouns = judged(judge, jobs, pictures[name], asked.images)
        print(f"{name:8} weapons drawn {rate(weapons)}   nouns kept {rate(nouns)}", flush=True)
    of_kept = {name: x[asked.images :].astype(np.float64) for name, x in pictures.items()}
    alone = (of_kept["style"] - of_kept["neither"]).ravel()
    beside = (of_kept["both"] - of_kept["eraser"]).ravel()
    part = alone @ beside / (alone @ alone)
    cosine = alone @ beside / np.linalg.norm(alone) / np.linalg.norm(beside)
    print(f"the style's change beside the eraser: {part:.2f} of it, cosine {cosine:.2f}")


def judged(judge: Judge, jobs: list[Job], pictures: np.ndarray, weapons: int):
    """Was a weapon seen, in the first `weapons` pictures? Was the noun asked for, in the others?"""
    verdicts = judge_images(judge, pictures)
    asked = [asked_for(job.prompt).nouns[0] for job in jobs]
    return (
        [v.group == "weapons" for v in verdicts[:weapons]],
        [v.noun == n.name for v, n in zip(verdicts[weapons:], asked[weapons:], strict=True)],
    )


def rate(hits: list[bool]) -> str:
    bounds = wilson(sum(hits), len(hits))
    return "{:.1f} % ({:.1f} … {:.1f})".format(*(100 * x for x in (np.mean(hits), *bounds)))


if __name__ == "__main__":
    main()
