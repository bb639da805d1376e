"""`sdd-lora plan`."""

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdd_lora.cli.common import Changes, Recipes, Result, parse_overrides, verb
from sdd_lora.cli.tables import table
from sdd_lora.errors import BadInput

if TYPE_CHECKING:
    from sdd_lora.recipe import Recipe
    from sdd_lora.training.plan import Footprint, Saving

    Counted = tuple[Footprint, list[Saving]]

#: what a device's context, its allocator's gaps and the kernels' workspaces take beside tensors
_RESERVED = 600_000_000
#: fp16 or bf16 operations a second that an RTX 3060 comes to in a UNet, about 40 % of what its data
#: sheet promises; an estimate, not measured here
_CARD, _CARD_FLOPS = "RTX 3060", 1e13
#: SD 1.x's text encoder and UNet in fp32, which is what a training loads of a hub repository
_DOWNLOAD_BYTES = 3_930_000_000
#: parts of the memory (fields of Footprint), as they are printed
_MEMORY_PARTS = {
    "base": "base",
    "adapter": "adapter",
    "average": "average (teacher)",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "loss_activations": "activations: loss",
    "rollout_activations": "activations: rollout",
    "total": "peak",
}
#: images drawn at once where the recipe measures, and by `generate`; fewer where a card has less
_MEASURED_AT_ONCE, _GENERATED_AT_ONCE = 16, 8
_UNITS = {"GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20}


@verb("plan")
def plan(
    recipes: Recipes,
    changes: Changes = None,
    within: Annotated[
        str | None,
        typer.Option(
            "--fit", help="Find settings that fit this much memory, such as 8GB.", metavar="SIZE"
        ),
    ] = None,
) -> Result:
    """Say what training a recipe will take, before anything is downloaded or allocated.

    Memory by part, UNet passes, arithmetic, disk. Several recipes have a row each, and their sum.

    Examples:

        sdd-lora plan recipes/sd15/nudity.yaml

        sdd-lora plan recipes/sd15/nudity.yaml --fit 4GB

        sdd-lora plan recipes/sd15 --set training.precision=fp32 --json
    """
    from sdd_lora.recipe import Recipe
    from sdd_lora.runs.many import recipe_files

    most = None if within is None else _bytes_of(within)
    overrides = parse_overrides(changes)
    read = [Recipe.load(path, overrides) for path in recipe_files(recipes)]
    counted: dict[str, Counted] = {}
    plans = []
    for recipe in read:
        kind = _footprint_key(recipe)
        if kind not in counted:
            counted[kind] = _count_bytes(recipe, most)
        plans.append(_planned(recipe, most, *counted[kind]))
    data: dict[str, Any] = {"plans": [data for data, _ in plans]}
    several = len(plans) > 1
    text = "\n\n".join(text for _, text in plans)
    if several and most is None:
        text = _plans_table(data["plans"])
    if several:
        data["sum"] = _sum(data["plans"])
        text += "\n\n" + _sum_text(data["sum"])
    unfit = any(p.get("fits") is False for p in data["plans"])
    return Result(data, text, exit_code=1 if unfit else 0)


def _footprint_key(recipe: "Recipe") -> str:
    """Of the recipe, what its footprint depends on: that of a hundred concepts is counted once."""
    from sdd_lora.recipe import MeasureSettings

    prompts = [""] if recipe.preserve.any else []
    preserve = recipe.preserve.model_copy(update={"prompts": prompts})
    training = recipe.training.model_copy(update={"iterations": 1, "seed": 0})
    alike = {"name": "", "concepts": [], "measure": MeasureSettings(), "preset": "paper"}
    return recipe.model_copy(update=alike | {"preserve": preserve, "training": training}).to_yaml()


def _count_bytes(recipe: "Recipe", most: int | None) -> "Counted":
    """The footprint, and what brings it down to `most` bytes."""
    from sdd_lora.sd.model import unet_config
    from sdd_lora.training.plan import fit, footprint

    config = unet_config(recipe.model)
    found = footprint(recipe, config)
    return found, [] if most is None else fit(recipe, config, found, most - _RESERVED)


def _planned(
    recipe: "Recipe", most: int | None, found: "Footprint", savings: "list[Saving]"
) -> tuple[dict[str, Any], str]:
    from sdd_lora.checkpoint.locate import local
    from sdd_lora.training.plan import passes_of_drawings

    iterations, drawings = recipe.training.iterations, passes_of_drawings(recipe)
    forwards = found.cost_in_forwards * iterations + drawings
    flops = forwards * found.forward_flops
    data: dict[str, Any] = {
        "name": recipe.name,
        "model": recipe.model,
        "parameters": found.parameters,
        "trained": found.trained,
        "bytes": {part: getattr(found, part) for part in _MEMORY_PARTS},
        "iterations": iterations,
        "rollout_passes": round(found.rollout_passes * iterations) + drawings,
        "loss_passes": found.loss_passes * iterations,
        "unet_passes": round(found.passes * iterations) + drawings,
        "cost_in_forwards": round(forwards),
        "forward_flops": found.forward_flops,
        "flops": flops,
        "estimated_seconds": {_CARD: flops / _CARD_FLOPS},
        "disk": _disk(recipe, found, downloaded=local(recipe.model) is None),
        "drawing": (drawing := _drawing(recipe)),
        "host_bytes": 4 * (found.parameters + drawing["text_encoder_parameters"]),
    }
    text = _plan_text(data)
    if most is not None:
        least = savings[-1].plan.total if savings else found.total
        data["fits"] = least + _RESERVED <= most
        data["savings"] = [
            {"set": s.changes, "costs": s.costs, "total": s.plan.total} for s in savings
        ]
        text += "\n\n" + _fit_text(found.total, savings, most, data["fits"])
    return data, text


def _drawing(recipe: "Recipe") -> dict[str, Any]:
    """What drawing takes in fp16, in which a card draws where nobody chose otherwise."""
    from sdd_lora.generation.batches import drawing_footprint
    from sdd_lora.sd.model import part_configs

    found = drawing_footprint(part_configs(recipe.model, ("unet", "vae", "text_encoder")))
    images = _GENERATED_AT_ONCE if recipe.measure.detector == "none" else _MEASURED_AT_ONCE
    return {
        "images_at_once": images,
        "bytes": {
            "weights": found.weights,
            "each_image": found.each,
            "decoding": found.decoding,
            "one_image": found.total(1),
            "total": found.total(images),
        },
        "text_encoder_parameters": found.text_encoder_parameters,
    }


def _disk(recipe: "Recipe", found: "Footprint", downloaded: bool) -> dict[str, int]:
    """Adapter files are fp16, in two forms; the state holds student, average and optimizer."""
    result = 2 * 2 * found.trained if recipe.parameters == "lora" else found.adapter
    return {
        "download": _DOWNLOAD_BYTES if downloaded else 0,
        "result": result,
        "state_while_training": found.adapter + found.average + found.optimizer,
    }


def _plan_text(data: dict[str, Any]) -> str:
    disk, passes, drawing = data["disk"], data["unet_passes"], data["drawing"]
    seconds = data["estimated_seconds"][_CARD]
    rows = [[label, f"{data['bytes'][part] / 1e9:.3f}"] for part, label in _MEMORY_PARTS.items()]
    lines = [
        f"{data['name']} on {data['model']}: {data['parameters'] / 1e6:.1f} M parameters, "
        f"{data['trained']:,} trained",
        table(["memory", "GB"], rows),
        f"beside tensors, about {_gb(_RESERVED)} GB for the device's context and workspaces",
        f"drawing, in fp16: {_gb(drawing['bytes']['total'])} GB for {drawing['images_at_once']} "
        f"images at once, {_gb(drawing['bytes']['one_image'])} for one; a card draws as many as "
        "its free memory holds",
        f"host memory: {_gb(data['host_bytes'])} GB while loading, beside Python's libraries",
        f"{data['iterations']} iterations: {passes:,} UNet passes ({data['rollout_passes']:,} for "
        f"rollouts, {data['loss_passes']:,} for the loss), as much arithmetic as "
        f"{data['cost_in_forwards']:,} forwards of {data['forward_flops'] / 1e12:.3g} TFLOP",
        f"{_CARD}, in half precision: about {_time(seconds)} (an estimate at "
        f"{_CARD_FLOPS / 1e12:.0f} TFLOP/s; not measured)",
        f"disk: {_gb(disk['download'])} GB to download unless it is here already, "
        f"{disk['result'] / 1e6:.1f} MB of results, {disk['state_while_training'] / 1e6:.1f} MB "
        "more while training",
    ]
    return "\n".join(lines)


def _plans_table(plans: list[dict[str, Any]]) -> str:
    head = ["recipe", "peak GB", "iterations", "UNet passes", f"{_CARD}, about", "results MB"]
    rows = [
        [
            p["name"],
            _gb(p["bytes"]["total"]),
            str(p["iterations"]),
            f"{p['unet_passes']:,}",
            _time(p["estimated_seconds"][_CARD]),
            f"{p['disk']['result'] / 1e6:.1f}",
        ]
        for p in plans
    ]
    return table(head, rows)


def _fit_text(as_it_is: int, savings: list["Saving"], most: int, fits: bool) -> str:
    goal = f"{_gb(most)} GB ({_gb(_RESERVED)} of them for the context)"
    if not savings:
        return f"fits {goal} as it is" if fits else f"does not fit {goal}, and nothing takes less"
    rows = [["as it is", _gb(as_it_is), ""]]
    for saving in savings:
        options = [
            f"--set {name}={str(value).lower() if isinstance(value, bool) else value}"
            for name, value in saving.changes.items()
        ]
        rows.append([" ".join(options), _gb(saving.plan.total), saving.costs])
    verdict = "fits {} with these:" if fits else "does not fit {} even with these:"
    return f"{verdict.format(goal)}\n{table(['change', 'peak GB', 'costs'], rows)}"


def _sum(plans: list[dict[str, Any]]) -> dict[str, Any]:
    """One after another: the greatest peak, the sum of the passes, one download of each model."""
    return {
        "recipes": len(plans),
        "peak": max(p["bytes"]["total"] for p in plans),
        "unet_passes": sum(p["unet_passes"] for p in plans),
        "estimated_seconds": {_CARD: sum(p["estimated_seconds"][_CARD] for p in plans)},
        "download": sum({p["model"]: p["disk"]["download"] for p in plans}.values()),
        "result": sum(p["disk"]["result"] for p in plans),
    }


def _sum_text(total: dict[str, Any]) -> str:
    return (
        f"all {total['recipes']}, one after another: peak {_gb(total['peak'])} GB, "
        f"{total['unet_passes']:,} UNet passes, about {_time(total['estimated_seconds'][_CARD])} "
        f"on an {_CARD} (an estimate), {_gb(total['download'])} GB to download, "
        f"{total['result'] / 1e6:.0f} MB of results"
    )


def _bytes_of(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    if not found or found[2].upper() not in _UNITS:
        raise BadInput(f"--fit {text}: expected a size with its unit, such as 8GB or 7.5GiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"
