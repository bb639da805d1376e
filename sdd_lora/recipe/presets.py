"""What a recipe leaves open: named sets of fields, and what a field's value implies."""

from typing import Any

from sdd_lora.recipe.sections import ATTENTION, NOXATTN, Lora

#: named sets of fields, overridden by what a recipe writes; `paper` is the defaults above
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    # Starts as an eraser from the concepts' words (training/erase.py), which leaves the training
    # little to do: small steps, and of a trajectory's passes as much use as the demo allows, three
    # latents and three prompts of both kinds each (tests/benchmarks/bench_fewer_passes.py).
    # Untried at full size.
    "fast": {
        "wordings": True,
        "preserve": {"vocabulary": 240},
        "lora": {"init": "words"},
        "ema": {"decay": 0.99, "warmup": True},
        "optimizer": {"learning_rate": 5.0e-4},
        "rollout": {"steps": 10, "timesteps_per_trajectory": 3, "prompts_per_latent": 3},
        "training": {"iterations": 200},
    },
    "demo": {
        "wordings": True,
        "objective": {"variant": "reference"},
        "preserve": {"vocabulary": 240, "weight": 6.0},
        "lora": {"rank": 8, "alpha": 8.0, "init": "words"},
        "ema": {"decay": 0.96, "warmup": True},
        "optimizer": {"learning_rate": 5.0e-4},
        "rollout": {
            "steps": 10,
            "timesteps_per_trajectory": 3,
            "batch": 4,
            "prompts_per_latent": 3,
        },
        "training": {"iterations": 40},
        "measure": {"detector": "judge", "images": 16, "guidance": 3.0},
    },
    # Stable Diffusion 1.5 on a small card; untested on a GPU, its reasons: recipes/sd15/README.md
    "sd15": {
        "objective": {"variant": "reference"},
        "preserve": {"weight": 4.0},
        "lora": {"rank": 8, "alpha": 4.0},
        "ema": {"warmup": True},
        "optimizer": {
            "learning_rate": 2.0e-4,
            "weight_decay": 1.0e-4,
            "schedule": "cosine",
            "warmup_iterations": 50,
        },
        "rollout": {"steps": 25, "timesteps_per_trajectory": 4, "batch": 4},
        "training": {
            "iterations": 1000,
            "precision": "bf16",
            "base_precision": "bf16",
            "gradient_checkpointing": True,
        },
        "measure": {"images": 24, "guidance": 7.5},
    },
}

# the papers' losses alone, on the prompts that a recipe names
_ESD: dict[str, Any] = {
    "wordings": None,
    "preserve": {"vocabulary": None},
    "objective": {"eta": 1.0},
    "lora": {"init": "random"},
    "ema": {"decay": 0.0, "warmup": False},
    "rollout": {"prompts_per_latent": 1},
}
#: what one field's value implies for others, on top of the preset, below what a recipe writes
IMPLIED: dict[tuple[tuple[str, ...], str], dict[str, Any]] = {
    (("objective", "kind"), "esd-x"): _ESD,
    # Lion's steps are their signs: a tenth of AdamW's rate (Chen et al. 2023, arXiv 2302.06675)
    (("optimizer", "kind"), "lion8bit"): {"optimizer": {"learning_rate": 1.0e-4}},
    (("objective", "kind"), "esd-u"): _ESD | {"lora": {"init": "random", "targets": [NOXATTN]}},
    (("objective", "kind"), "leco"): _ESD
    | {"lora": {"init": "random", "rank": 4, "alpha": 1.0, "targets": [ATTENTION]}},
    # learning rate of both papers; whole weights move further a step than a product of factors
    (("parameters",), "full"): {
        "lora": Lora().model_dump(),
        "preserve": {"damping": 0.0},
        "optimizer": {"learning_rate": 1.0e-5},
    },
    # what Prodigy's own estimate is multiplied by (Mishchenko and Defazio 2024, arXiv 2306.06101)
    (("optimizer", "kind"), "prodigy"): {"optimizer": {"learning_rate": 1.0}},
}
