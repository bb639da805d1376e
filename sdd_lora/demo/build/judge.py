"""Stage 6: the judge, trained on real drawings and their reconstructions."""

import logging
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from sdd_lora.demo.build import dataset, drawings
from sdd_lora.demo.build.checkpoints import load_state, save_state
from sdd_lora.demo.build.palette import recoloured
from sdd_lora.demo.build.schedule import cosine
from sdd_lora.demo.judge import Judge, as_pictures, judge_images
from sdd_lora.demo.vocabulary import nouns, styles

log = logging.getLogger(__name__)

STEPS = 1500
BATCH = 64
LEARNING_RATE = 3e-3
PAIRS_USED = 2500
RECOLOURED_SHARE = 0.25  # so that the judge serves demo-community too
OTHER_CLASS = len(nouns())


def _examples(work: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures (N, 64, 64, 3), noun labels (`OTHER_CLASS` for none) and style labels.

    Pictures of two things give their halves, centred on white, so that small drawings count too.
    """
    data = dataset.render(work)
    single = data["second"] < 0
    pixels = [data["pixels"][single]]
    noun = [np.where(data["first"] < 0, OTHER_CLASS, data["first"])[single]]
    style = [data["style"][single]]
    half = drawings.IMAGE_SIZE // 2
    left = half // 2
    pairs = np.flatnonzero(~single)[:PAIRS_USED]
    for side, column in (("first", 0), ("second", half)):
        canvas = np.full((len(pairs), 64, 64, 3), 255, np.uint8)
        canvas[:, :, left : left + half] = data["pixels"][pairs][:, :, column : column + half]
        pixels.append(canvas)
        noun.append(data[side][pairs])
        style.append(data["style"][pairs])
    return np.concatenate(pixels), np.concatenate(noun), np.concatenate(style)


@torch.no_grad()
def _reconstructions(work: Path, autoencoder: AutoencoderKL, pixels: np.ndarray) -> np.ndarray:
    """What the autoencoder makes of the pictures, cached."""
    path = work / "reconstructions.npy"
    if path.exists():
        return np.load(path)
    out = np.empty_like(pixels)
    for start in range(0, len(pixels), 64):
        posterior = autoencoder.encode(as_pictures(pixels[start : start + 64])).latent_dist
        decoded = autoencoder.decode(posterior.mode()).sample
        out[start : start + 64] = to_uint8(decoded)
    np.save(path, out)
    return out


def to_uint8(pictures: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] → (B, H, W, 3) uint8."""
    scaled = (pictures.clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def _garbage(
    autoencoder: AutoencoderKL, pictures: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Things that are nothing: blends of two drawings, decoded noise, drawings drowned in noise."""
    count = len(pictures)
    shuffled = pictures[torch.randperm(count, generator=generator)]
    share = 0.35 + 0.3 * torch.rand(count, 1, 1, 1, generator=generator)
    blends = share * pictures + (1 - share) * shuffled
    latents = autoencoder.encode(pictures).latent_dist.mode()
    noise = torch.randn(latents.shape, generator=generator) * latents.std()
    kept = 0.45 * torch.rand(count, 1, 1, 1, generator=generator)
    drowned = autoencoder.decode(kept * latents + (1 - kept**2).sqrt() * noise).sample
    torn = pictures.clone()  # quarters of four drawings: parts of things, but no thing
    torn[:, :, :32], torn[:, :, :, :32] = pictures.roll(1, 0)[:, :, 32:], shuffled[:, :, :, 32:]
    choice = torch.randint(3, (count, 1, 1, 1), generator=generator)
    return torch.where(choice == 0, blends, torch.where(choice == 1, drowned.clamp(-1, 1), torn))


def _roughened(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Slight noise, blur and shift, as generated pictures have."""
    count = len(pictures)
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    amount = 0.7 * torch.rand(count, 1, 1, 1, generator=generator).square()
    pictures = torch.lerp(pictures, blurred, amount)
    strength = 0.12 * torch.rand(count, 1, 1, 1, generator=generator).square()
    pictures = pictures + strength * torch.randn(pictures.shape, generator=generator)
    dx, dy = torch.randint(-3, 4, (2,), generator=generator).tolist()
    return pictures.roll((dy, dx), (2, 3))


def train(work: Path, autoencoder: AutoencoderKL, steps: int = STEPS) -> Judge:
    """Train, or resume, or read the finished one."""
    torch.manual_seed(0)
    pixels, noun, style = _examples(work)
    recon = _reconstructions(work, autoencoder, pixels)
    known_noun = noun != OTHER_CLASS
    ours, others = np.flatnonzero(known_noun), np.flatnonzero(~known_noun)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), LEARNING_RATE, weight_decay=0.02)
    step = load_state(work / "judge.pt", judge=judge, optimizer=optimizer)
    n_garbage, n_other = BATCH // 8, BATCH // 4
    saved = time.time()
    judge.train()
    while step < steps:
        rng = np.random.default_rng(step)
        generator = torch.Generator().manual_seed(step)
        rows = np.concatenate(
            [
                rng.choice(ours, BATCH - n_other),
                rng.choice(others, n_other),
            ]
        )
        source = np.where(rng.random((len(rows), 1, 1, 1)) < 0.5, pixels[rows], recon[rows])
        pictures = as_pictures(source)
        garbage = _garbage(autoencoder, pictures[:n_garbage], generator)
        pictures = torch.cat([pictures, garbage])
        pictures = torch.where(
            torch.rand(len(pictures), 1, 1, 1, generator=generator) < RECOLOURED_SHARE,
            recoloured(pictures),
            pictures,
        )
        pictures = _roughened(pictures, generator)
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        labels = torch.from_numpy(np.concatenate([noun[rows], np.full(n_garbage, OTHER_CLASS)]))
        noun_logits, style_logits = judge(pictures)
        loss = F.cross_entropy(noun_logits, labels, label_smoothing=0.05) + 0.5 * F.cross_entropy(
            style_logits[: len(rows)], torch.from_numpy(style[rows])
        )
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * cosine(step / steps, warmup=0.03)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 100 == 0:
            log.info("judge %d/%d loss %.4f", step, steps, loss.item())
        if time.time() - saved > 60 or step == steps:
            save_state(work / "judge.pt", step, judge=judge, optimizer=optimizer)
            saved = time.time()
    return judge.eval()


def check_judge(
    work: Path, judge: Judge, autoencoder: AutoencoderKL, views: int = 4
) -> dict[str, float]:
    """The judge's accuracy on what it was not trained on: fresh views of the drawings, their
    reconstructions, another set's drawings, icons it never saw, blends and noise."""
    rng = random.Random(10_000)
    all_nouns, all_styles = nouns(), list(styles())
    pictures, expected = [], []
    for noun in all_nouns:
        for style in all_styles:
            for _ in range(views):
                pictures.append(np.asarray(drawings.one(work, style, noun.icon, rng)))
                expected.append((noun.name, style))
    fresh = np.stack(pictures)
    with torch.no_grad():
        recon = np.concatenate(
            [
                to_uint8(
                    autoencoder.decode(autoencoder.encode(as_pictures(c)).latent_dist.mode()).sample
                )
                for c in np.array_split(fresh, 16)
            ]
        )
    result = {}
    community = to_uint8(recoloured(as_pictures(fresh)))
    for name, images in (
        ("fresh views", fresh),
        ("reconstructions", recon),
        ("recoloured", community),
    ):
        verdicts = judge_images(judge, images)
        pairs = list(zip(verdicts, expected, strict=True))
        result[f"noun, {name}"] = float(np.mean([v.noun == e[0] for v, e in pairs]))
        result[f"style, {name}"] = float(np.mean([v.style == e[1] for v, e in pairs]))
    elsewhere = [(noun.name, drawings.held_out(work, noun.icon, rng)) for noun in all_nouns * views]
    found = [(name, np.asarray(image)) for name, image in elsewhere if image is not None]
    verdicts = judge_images(judge, np.stack([image for _, image in found]))
    right = [v.noun == name for v, (name, _) in zip(verdicts, found, strict=True)]
    result["noun, another icon set"] = float(np.mean(right))
    _, unseen = dataset.others_split(work)
    unseen_images = np.stack(
        [
            np.asarray(drawings.one(work, style, icon, rng))
            for icon in unseen
            for style in all_styles
        ]
    )
    generator = torch.Generator().manual_seed(10_001)
    garbage = to_uint8(_garbage(autoencoder, as_pictures(fresh[::4]), generator))
    noise = np.random.default_rng(0).integers(0, 256, (200, 64, 64, 3), np.uint8)
    for name, images in (
        ("unseen icons", unseen_images),
        ("blends, decoded noise", garbage),
        ("pixel noise", noise),
    ):
        verdicts = judge_images(judge, images)
        result[f"other, {name}"] = float(np.mean([v.noun == "other" for v in verdicts]))
    return result
