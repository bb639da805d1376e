"""A diffusers pipeline of a MODEL with adapters on its UNet and text encoder."""

from collections.abc import Sequence

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.model import load_base_pipeline

_SCHEDULERS = {
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "euler-a": EulerAncestralDiscreteScheduler,
    "pndm": PNDMScheduler,
}


def set_scheduler(pipeline: StableDiffusionPipeline, name: str) -> None:
    """Give the pipeline a sampler by its short name: ddim, dpm++, euler-a or pndm."""
    pipeline.scheduler = _SCHEDULERS[name].from_config(
        pipeline.scheduler.config, clip_sample=False
    )


def load_adapters(named: Sequence[tuple[str, float]]) -> list[tuple[Adapter, float]]:
    """Adapters from their files or run folders, with their weights."""
    return [(Adapter.load(name), weight) for name, weight in named]


def load_pipeline(
    model: str,
    adapters: Sequence[tuple[Adapter, float]] = (),
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> StableDiffusionPipeline:
    """A `StableDiffusionPipeline` of MODEL; the adapters are live, not merged, on the device.

    Raises BadInput for a model that is no SD 1.x and for adapters that don't fit it.
    """
    pipeline = load_base_pipeline(model, dtype)
    pipeline.set_progress_bar_config(disable=True)
    names = [f"adapter_{number}" for number in range(len(adapters))]
    for name, (adapter, _) in zip(names, adapters, strict=True):
        tensors = {k: torch.from_numpy(v) for k, v in adapter.to_state_dict("kohya").items()}
        pipeline.load_lora_weights(tensors, adapter_name=name)
    if adapters:
        pipeline.set_adapters(names, [weight for _, weight in adapters])
    return pipeline.to(device)
