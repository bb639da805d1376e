"""SD: the model as it is, with whatever adapters it carries."""

import torch
from diffusers import StableDiffusionPipeline

from sdd_lora.generation.guided import size_of
from sdd_lora.generation.sampling import Sampling


def sample(
    pipeline: StableDiffusionPipeline,
    prompts: list[str],
    generators: list[torch.Generator],
    sampling: Sampling,
) -> torch.Tensor:
    """Latents (B, 4, h, w), one a prompt."""
    # left out where nothing is said: an image-to-image pipeline takes its image's size
    size = {}
    if sampling.width or sampling.height:  # the pipeline would drop one without the other
        size = dict(zip(("width", "height"), size_of(pipeline, sampling), strict=True))
    return pipeline(
        prompts,
        negative_prompt=[sampling.negative_prompt] * len(prompts),
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance,
        generator=generators,
        output_type="latent",
        **size,
    ).images
