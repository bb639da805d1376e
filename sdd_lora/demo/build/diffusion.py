"""Stage 4: UNet and text encoder, trained together from scratch on the cached latents."""

import json
import logging
import random
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdd_lora.checkpoint.locate import DEMO_FOLDER
from sdd_lora.demo.build import dataset
from sdd_lora.demo.build.captions import caption
from sdd_lora.demo.build.checkpoints import load_state, save_state
from sdd_lora.demo.build.palette import recoloured
from sdd_lora.demo.build.schedule import WeightAverage, cosine
from sdd_lora.demo.vocabulary import nouns, styles
from sdd_lora.training.ema import update_average

log = logging.getLogger(__name__)

STEPS = 14_000
BATCH = 32
LEARNING_RATE = 8e-4
PAIR_SHARE = 0.14
SNR_GAMMA = 5.0  # Min-SNR weighting (Hang et al. 2023): w = min(SNR, γ) / SNR for ε-prediction
EMA_DECAY = 0.999
TEXT_WIDTH = 128
MISSES_FILES = {"demo": "misses.json", "demo-community": "misses-community.json"}
COMMUNITY_STEPS = 1500
COMMUNITY_LEARNING_RATE = 3e-4

#: SD 1.x's noise schedule
NOISE_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}


def drawing_name(noun: int, style: int) -> str:
    """What `misses.json` calls a drawing, from the indices of its labels."""
    return f"{nouns()[noun].name}, {list(styles())[style]}"


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,  # as in SD 1.x's own configuration, this is the number of heads
        norm_num_groups=16,
    )


@torch.no_grad()
def encode_pictures(
    work: Path,
    autoencoder: AutoencoderKL,
    name: str = "latents.pt",
    look: Callable[[torch.Tensor], torch.Tensor] | None = None,
    scale: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Latents of the nouns' pictures, standardised: `latents` (N, 4, 16, 16), labels, `scale`."""
    path = work / name
    if path.exists():
        return torch.load(path, weights_only=True)
    data = dataset.render(work)
    ours = data["first"] >= 0
    parts = []
    for chunk in torch.from_numpy(data["pixels"][ours]).split(64):
        images = chunk.permute(0, 3, 1, 2).float() / 127.5 - 1
        images = images if look is None else look(images)
        parts.append(autoencoder.encode(images).latent_dist.mode())
    latents = torch.cat(parts)
    scale = 1 / latents.std() if scale is None else scale
    encoded = {"latents": latents * scale, "scale": scale} | {
        key: torch.from_numpy(data[key][ours]) for key in ("first", "second", "style")
    }
    torch.save(encoded, path)
    return encoded


class Batches:
    """Training batches as a function of the step alone, so that a resumed run sees the same."""

    def __init__(
        self, encoded: dict[str, torch.Tensor], tokenizer: CLIPTokenizer, misses: dict[str, int]
    ) -> None:
        self.encoded, self.tokenizer = encoded, tokenizer
        pairs = encoded["second"] >= 0
        self.single_rows = torch.nonzero(~pairs).flatten().tolist()
        often = [
            1 + 2 * misses.get(drawing_name(*labels), 0)
            for labels in zip(encoded["first"].tolist(), encoded["style"].tolist(), strict=True)
        ]
        self.cumulative = list(accumulate(often[row] for row in self.single_rows))
        self.pair_rows = torch.nonzero(pairs).flatten().tolist()

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (B, 4, 16, 16) and token ids (B, 77) of one step."""
        rng = random.Random(step)
        rows = [
            rng.choice(self.pair_rows)
            if rng.random() < PAIR_SHARE
            else rng.choices(self.single_rows, cum_weights=self.cumulative)[0]
            for _ in range(BATCH)
        ]
        labels = zip(
            *(self.encoded[k][rows].tolist() for k in ("first", "second", "style")), strict=True
        )
        texts = [caption(first, second, style, rng) for first, second, style in labels]
        return self.encoded["latents"][rows], self.tokens(texts)

    def tokens(self, texts: list[str]) -> torch.Tensor:
        return self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
        ).input_ids


def diffusion_loss(
    model: torch.nn.ModuleDict,
    scheduler: DDPMScheduler,
    latents: torch.Tensor,
    tokens: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """ε-prediction under Min-SNR weights; returns the scalar loss."""
    t = torch.randint(0, 1000, (len(latents),), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = scheduler.add_noise(latents, noise, t).contiguous(memory_format=torch.channels_last)
    context = model["text_encoder"](tokens).last_hidden_state
    error = (model["unet"](noisy, t, context).sample - noise).pow(2).mean(dim=(1, 2, 3))
    alpha_bar = scheduler.alphas_cumprod[t]
    snr = alpha_bar / (1 - alpha_bar)
    return (error * snr.clamp(max=SNR_GAMMA) / snr).mean()


def train(
    encoded: dict[str, torch.Tensor],
    model: torch.nn.ModuleDict,
    tokenizer: CLIPTokenizer,
    state: Path,
    steps: int,
    learning_rate: float,
    misses: dict[str, int],
) -> WeightAverage:
    """Train, or resume, or read the finished run from `state`; returns the weight average.

    `misses`: drawings, by name, that the model so far drew wrong; each miss makes two more views.
    """
    batches = Batches(encoded, tokenizer, misses)
    scheduler = DDPMScheduler(**NOISE_SCHEDULE)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.99), fused=True)
    ema = WeightAverage(model, EMA_DECAY)
    step = load_state(state, model=model, optimizer=optimizer, ema=ema)
    started, seen, saved, average = time.time(), step, time.time(), 0.0
    while step < steps:
        latents, tokens = batches(step)
        generator = torch.Generator().manual_seed(step)
        loss = diffusion_loss(model, scheduler, latents, tokens, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * cosine(step / steps, warmup=0.03)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
        step += 1
        average = loss.item() if step == seen + 1 else 0.98 * average + 0.02 * loss.item()
        if step % 100 == 0:
            speed = (step - seen) * BATCH / (time.time() - started)
            log.info("diffusion %d/%d loss %.4f %.1f samples/s", step, steps, average, speed)
        if time.time() - saved > 180 or step == steps:
            save_state(state, step, model=model, optimizer=optimizer, ema=ema)
            saved = time.time()
    return ema


def make_model(tokenizer: CLIPTokenizer) -> torch.nn.ModuleDict:
    unet = make_unet().to(memory_format=torch.channels_last)
    return torch.nn.ModuleDict({"unet": unet, "text_encoder": make_text_encoder(tokenizer)})


def train_base(
    work: Path,
    autoencoder: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    steps: int,
    learning_rate: float,
) -> WeightAverage:
    torch.manual_seed(0)
    model = make_model(tokenizer)
    encoded = encode_pictures(work, autoencoder)
    misses = misses_of("demo", work)
    return train(encoded, model, tokenizer, work / "diffusion.pt", steps, learning_rate, misses)


def misses_of(model: str, work: Path) -> dict[str, int]:
    """What the stage that looks for a model's misses has found, if it has run."""
    found = work / MISSES_FILES[model]
    return dict(json.loads(found.read_text("utf-8"))) if found.exists() else {}


def average_so_far(states: Sequence[Path], tokenizer: CLIPTokenizer) -> WeightAverage:
    """The mean of runs' weight averages, finished or not; runs that went on one from another."""
    mean = WeightAverage(make_model(tokenizer), EMA_DECAY)
    for number, state in enumerate(states):
        ema = WeightAverage(make_model(tokenizer), EMA_DECAY)
        load_state(state, ema=ema)
        update_average(mean.average, ema.average, number / (number + 1))
    return mean


def train_community(
    work: Path, autoencoder: AutoencoderKL, steps: int, learning_rate: float
) -> StableDiffusionPipeline:
    """Fine-tune the embedded model on recoloured drawings, as a community model is made."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        DEMO_FOLDER, dtype=torch.float32, safety_checker=None
    )
    unet = pipeline.unet.to(memory_format=torch.channels_last)
    model = torch.nn.ModuleDict({"unet": unet, "text_encoder": pipeline.text_encoder})
    encoded = encode_pictures(
        work,
        autoencoder,
        "latents-community.pt",
        recoloured,
        scale=torch.tensor(pipeline.vae.config.scaling_factor),
    )
    ema = train(
        encoded,
        model,
        pipeline.tokenizer,
        work / "community.pt",
        steps,
        learning_rate,
        misses_of("demo-community", work),
    )
    ema.copy_to(model)
    return pipeline
