"""Adapters for one model that fight: ways of making them one, against their plain sum.

    python tests/benchmarks/bench_ways_of_stacking.py [WEAPONS SUBSTANCES GORE]

Takes adapters/demo's unless others are named. Prints a line a way: what is left of each group and
how far kept prompts have moved, both as parts of ‖ε_b(c) − ε_b(∅)‖² (see bench_estimates.py).
Deltas are dense and exact here, as at this size they may be.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

sys.path.insert(0, str(Path(__file__).parent))

from estimates import Probe, group_of, of_one_thing

from sdd_lora import Adapter
from sdd_lora.recipe import Recipe
from sdd_lora.sd.model import load_training_parts
from sdd_lora.sd.prompts import embed
from sdd_lora.training.init import second_moment

ROOT = Path(__file__).parents[2]
GROUPS = ("weapons", "substances", "gore")
PUBLISHED = ROOT / "adapters" / "demo"

Deltas = dict[str, torch.Tensor]  # by module; (out, in), fp32
Moments = dict[str, torch.Tensor]  # of each group's phrases, and of kept prompts ("")


def plain(parts: list[Deltas], _: Moments) -> Deltas:
    return {module: sum(p[module] for p in parts) for module in parts[0]}


def budget(parts: list[Deltas], _: Moments) -> Deltas:
    """No module is changed more strongly than the strongest part changes it."""
    total = plain(parts, _)
    most = {m: max(p[m].norm() for p in parts) for m in total}
    return {m: d * min(1.0, float(most[m] / d.norm())) for m, d in total.items()}


def orthogonal(parts: list[Deltas], _: Moments) -> Deltas:
    """Each part without what of it lies along the earlier ones."""
    total: Deltas = {}
    for module in parts[0]:
        basis: list[torch.Tensor] = []
        for part in parts:
            rest = part[module].flatten()
            for earlier in basis:
                rest = rest - (rest @ earlier) / (earlier @ earlier) * earlier
            basis.append(rest)
        total[module] = torch.stack(basis).sum(0).view_as(parts[0][module])
    return total


def ties(parts: list[Deltas], _: Moments, density: float = 0.5) -> Deltas:
    """Trim, elect the sign, sum what agrees (Yadav et al. 2023; a sum, where theirs is a mean)."""
    total: Deltas = {}
    for module in parts[0]:
        trimmed = []
        for part in parts:
            delta = part[module]
            keep = delta.abs() >= delta.abs().flatten().quantile(1 - density)
            trimmed.append(delta * keep)
        stacked = torch.stack(trimmed)
        total[module] = (stacked * (stacked.sign() == stacked.sum(0).sign())).sum(0)
    return total


def dare(parts: list[Deltas], _: Moments, density: float = 0.5) -> Deltas:
    """Drop elements at random, scale the rest up (Yu et al. 2024), sum."""
    generator = torch.Generator().manual_seed(0)

    def thinned(delta: torch.Tensor) -> torch.Tensor:
        keep = torch.rand(delta.shape, generator=generator) < density
        return delta * keep / density

    return plain([{m: thinned(d) for m, d in part.items()} for part in parts], _)


def closed_form(parts: list[Deltas], moments: Moments, kept: float = 1.0) -> Deltas:
    """Each part's effect on its own prompts, none on kept ones, in least squares (MACE, Lu et al.
    2024, Eq. 10, with embeddings' second moments for the sums)."""
    ridge = 1e-4 * sum(moments[g].trace() for g in GROUPS) / len(moments[""])
    whole = sum(moments[g] for g in GROUPS) + ridge * torch.eye(len(moments[""])).double()
    whole = whole + kept * moments[""]
    total: Deltas = {}
    for module in parts[0]:
        goal = sum(p[module].double() @ moments[g] for p, g in zip(parts, GROUPS, strict=True))
        total[module] = torch.linalg.solve(whole, goal.T).T.float()
    return total


WAYS: dict[str, Callable[[list[Deltas], Moments], Deltas]] = {
    "plain sum": plain,
    "plain sum × 0.85": lambda p, _: {m: 0.85 * d for m, d in plain(p, _).items()},
    "norm budget": budget,
    "orthogonal": orthogonal,
    "TIES": ties,
    "DARE": dare,
    "closed form": closed_form,
    "closed form, kept × 0": lambda p, m: closed_form(p, m, 0.0),
    "closed form, kept × 3": lambda p, m: closed_form(p, m, 3.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "adapters",
        nargs="*",
        type=Path,
        metavar="ADAPTER",
        help="of weapons, substances, gore, in this order",
        default=[PUBLISHED / g for g in GROUPS],
    )
    asked = parser.parse_args()
    adapters = [Adapter.load(path) for path in asked.adapters]
    parts = [{m: a.delta(m) for m in a.factors} for a in adapters]
    recipe = Recipe.load(ROOT / "recipes" / "demo" / "unsafe.yaml")
    model = load_training_parts(recipe.model)

    def embedded(texts: list[str]) -> torch.Tensor:
        return embed(texts, model.tokenizer, model.text_encoder)

    @contextmanager
    def changed(deltas: Deltas) -> Iterator[UNet2DConditionModel]:
        weights = {m: model.unet.get_submodule(m).weight for m in deltas}
        before = {m: weight.clone() for m, weight in weights.items()}
        with torch.no_grad():
            for module, weight in weights.items():
                weight.add_(deltas[module])
            yield model.unet
            for module, weight in weights.items():
                weight.copy_(before[module])

    measured = recipe.measure.prompts
    texts = of_one_thing([*measured.concept, *measured.kept])
    probe = Probe(lambda: changed({}), model.scheduler, texts, embedded(texts), embedded([""]))
    moments = {
        group: second_moment(embedded([p for p in recipe.concepts if group_of(p) == group]))
        for group in GROUPS
    }
    moments[""] = second_moment(embedded([*recipe.preserve.prompts, ""]))
    singles = {f"{group} alone": part for group, part in zip(GROUPS, parts, strict=True)}
    for name, deltas in (singles | {w: make(parts, moments) for w, make in WAYS.items()}).items():
        to_empty, moved = probe.distances(lambda d=deltas: changed(d))
        left = probe.parts(to_empty, group_of)
        kept = {g: x for g, x in probe.parts(moved, group_of).items() if g not in GROUPS}
        print(
            f"{name:24} left "
            + "  ".join(f"{g} {left[g]:.3f}" for g in GROUPS)
            + "   moved "
            + "  ".join(f"{g} {x:.3f}" for g, x in kept.items()),
            flush=True,
        )


if __name__ == "__main__":
    main()
