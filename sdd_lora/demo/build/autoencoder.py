"""Stage 2: the autoencoder, 64×64 px ↔ 4×16×16 latents."""

import logging
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from sdd_lora.demo.build import dataset
from sdd_lora.demo.build.checkpoints import load_state, save_state
from sdd_lora.demo.build.schedule import WeightAverage, cosine

log = logging.getLogger(__name__)

STEPS = 2600
BATCH = 16
LEARNING_RATE = 2.5e-3
KL_WEIGHT = 1e-3
CHROMA_WEIGHT = 1.5  # a few rare hues (green, purple) come late without it


def make_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(24, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
    )


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 of colours, of colour differences and of gradients; (B, 3, H, W) in [-1, 1]."""

    def chroma(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x[:, 0] - x[:, 1], x[:, 2] - x[:, 1]], dim=1)

    def gradients(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.diff(dim=-1), x.diff(dim=-2)

    loss = F.l1_loss(output, target)
    loss = loss + CHROMA_WEIGHT * F.l1_loss(chroma(output), chroma(target))
    for a, b in zip(gradients(output), gradients(target), strict=True):
        loss = loss + F.l1_loss(a, b)
    return loss


def train(work: Path, steps: int = STEPS) -> AutoencoderKL:
    """Train, or resume, or read the finished one; EMA weights are what is returned."""
    torch.manual_seed(0)
    pixels = torch.from_numpy(dataset.render(work)["pixels"])
    model = make_autoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.99))
    ema = WeightAverage(model, 0.995)
    step = load_state(work / "autoencoder.pt", model=model, optimizer=optimizer, ema=ema)
    started, seen, saved = time.time(), step, time.time()
    while step < steps:
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(pixels), (BATCH,), generator=generator)
        images = pixels[rows].permute(0, 3, 1, 2).float() / 127.5 - 1
        images = images.contiguous(memory_format=torch.channels_last)
        posterior = model.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        output = model.decode(posterior.mean + posterior.std * noise).sample
        reconstruction = reconstruction_loss(output, images)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        (reconstruction + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * cosine(step / steps, warmup=0.02)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
        step += 1
        if step % 50 == 0:
            speed = (step - seen) / (time.time() - started)
            log.info(
                "autoencoder %d/%d loss %.4f kl %.2f %.2f it/s",
                step,
                steps,
                reconstruction.item(),
                kl.item(),
                speed,
            )
        if time.time() - saved > 120 or step == steps:
            save_state(work / "autoencoder.pt", step, model=model, optimizer=optimizer, ema=ema)
            saved = time.time()
    ema.copy_to(model)
    return model.eval()
