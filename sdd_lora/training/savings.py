"""What takes less memory: for `plan --fit`, and for who runs out of it."""

from typing import Any

from sdd_lora.recipe import Recipe


def savings(recipe: Recipe) -> list[tuple[dict[str, Any], str]]:
    """Changes of a recipe (dotted names → values) that take less memory, and what each costs; the
    cheapest in erasure and time first."""
    training, batch = recipe.training, recipe.rollout.batch
    found: list[tuple[dict[str, Any], str]] = []
    if not training.gradient_checkpointing:
        found.append(
            ({"training.gradient_checkpointing": True}, "the loss's forward is computed twice")
        )
    if training.base_precision == "fp32":
        half = "bf16" if training.precision == "fp32" else training.precision
        found.append((
            {"training.precision": half, "training.base_precision": half},
            f"the base is rounded to {half}; faster where the card computes in it",
        ))  # fmt: skip
    if recipe.optimizer.kind == "adamw":
        found.append((
            {"optimizer.kind": "adamw8bit"}, "the optimizer's averages are rounded to 8 bits"
        ))  # fmt: skip
    if training.base_precision != "nf4" and recipe.parameters == "lora":
        found.append((
            {"training.base_precision": "nf4"},
            "the base's linear layers are rounded to 4 bits and unpacked for each forward",
        ))  # fmt: skip
    parts = training.gradient_accumulation
    while batch > 1 and batch % 2 == 0:
        batch, parts = batch // 2, parts * 2
        found.append((
            {"rollout.batch": batch, "training.gradient_accumulation": parts},
            "the same samples in smaller forwards: a card is less busy",
        ))  # fmt: skip
    return found
