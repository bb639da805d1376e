"""An ordinary style LoRA of the embedded model, as people make them: the usual diffusion loss on
pictures of one look. It stands beside safety adapters in tests and tables."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.checkpoint.locate import DEMO_FOLDER
from sdd_lora.demo.build import diffusion
from sdd_lora.demo.build.palette import recoloured

STEPS = 300
LEARNING_RATE = 2e-3
RANK = 8
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def train(work: Path, autoencoder: AutoencoderKL, steps: int, learning_rate: float) -> Adapter:
    """Train on recoloured drawings, all attention layers of the UNet, the averaged weights."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        DEMO_FOLDER, dtype=torch.float32, safety_checker=None
    )
    unet = pipeline.unet.to(memory_format=torch.channels_last).requires_grad_(False)
    pipeline.text_encoder.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS)))
    model = torch.nn.ModuleDict({"unet": unet, "text_encoder": pipeline.text_encoder})
    scale = torch.tensor(pipeline.vae.config.scaling_factor)
    encoded = diffusion.encode_pictures(
        work, autoencoder, "latents-community.pt", recoloured, scale
    )
    state = work / "look.pt"
    average = diffusion.train(encoded, model, pipeline.tokenizer, state, steps, learning_rate, {})
    average.copy_to(model)
    tensors = {f"unet.{key}": value for key, value in get_peft_model_state_dict(unet).items()}
    return Adapter.from_state_dict(tensors, {"name": "look", "description": __doc__})
