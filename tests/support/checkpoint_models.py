"""Checkpoints for the tests: SD 1.x in small, in every layout, and the list of a full-size file."""

from __future__ import annotations

import copy
import errno
import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

from sdd_lora import sd1 as names
from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.factors import Factors
from sdd_lora.demo.build.ldm import as_ldm
from sdd_lora.io.safetensors import read_tensors, serialize

DATA = Path(__file__).parents[1] / "data"
K0 = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
DTYPES = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
}


def full_size_keys() -> dict[str, tuple[tuple[int, ...], str | None]]:
    """Key → shape and fixed dtype of every tensor of a full SD 1.x file, EMA copies left out."""
    keys = {}
    for line in (DATA / "sd1_ldm_keys.tsv").read_text().splitlines():
        if not line.startswith("#"):
            key, shape, *dtype = line.split("\t")
            keys[key] = (tuple(int(n) for n in shape.split(",")), dtype[0] if dtype else None)
    return keys


@lru_cache
def parts() -> dict[str, torch.nn.Module]:
    """UNet, VAE and text encoder of the embedded model's sizes, random."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        cross_attention_dim=128,
        attention_head_dim=2,
        norm_num_groups=16,
    )
    vae = AutoencoderKL(
        block_out_channels=(24, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=99,
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            bos_token_id=97,
            eos_token_id=98,
            pad_token_id=98,
        )
    )
    return {"unet": unet, "vae": vae, "text_encoder": text}


def tokenizer() -> CLIPTokenizer:
    """98 one-letter tokens; enough to tell prompts apart."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(33, 33 + 48)]
    words = letters + [f"{c}</w>" for c in letters] + ["x", "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: n for n, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def pipeline() -> StableDiffusionPipeline:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        **copy.deepcopy(parts()),
        tokenizer=tokenizer(),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def states() -> dict[str, dict[str, np.ndarray]]:
    """The three models' state dicts as fp32 numpy arrays."""
    return {
        name: {key: tensor.numpy() for key, tensor in module.state_dict().items()}
        for name, module in parts().items()
    }


def ldm_tensors(ema: bool = False, ema_prefix: int = 0) -> dict[str, np.ndarray]:
    """The whole model in LDM names, fp32, with an EMA copy (slightly other weights) on request."""
    tensors = as_ldm(**states())
    if ema:
        tensors["model_ema.decay"] = np.array(0.9999, np.float32)
        tensors["model_ema.num_updates"] = np.array(7, np.int32)
        for key in [k for k in tensors if k.startswith(names.LDM_UNET_PREFIX)]:
            tensors[names.ema_keys(key)[ema_prefix]] = tensors[key] * np.float32(1.01)
    return tensors


def cast(tensors: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    return {
        key: tensor.astype(DTYPES[dtype]) if tensor.dtype == np.float32 else tensor
        for key, tensor in tensors.items()
    }


def write(path: Path, tensors: dict[str, np.ndarray], metadata: dict | None = None) -> Path:
    with open(path, "wb") as file:
        file.writelines(serialize(tensors, metadata or {}))
    return path


def write_folder(folder: Path, variant: str | None = None, shard: str | None = None) -> Path:
    """A diffusers folder, saved by diffusers."""
    pipe = pipeline()
    if variant == "fp16":
        pipe.unet.half(), pipe.vae.half(), pipe.text_encoder.half()
    pipe.save_pretrained(folder, variant=variant, max_shard_size=shard or "10GB")
    return folder


def checkpoint_key(name: str) -> str:
    """Where an LDM single file keeps the weight of a module."""
    if name.startswith(names.TEXT_PREFIX):
        return f"{names.LDM_TEXT_PREFIX}{name.removeprefix(names.TEXT_PREFIX)}.weight"
    return f"{names.LDM_UNET_PREFIX}{names.to_ldm(name)}.weight"


def cross_attention_shapes(widths: names.Widths = names.SD15) -> dict[str, names.Shape]:
    """The 64 matrices' names → (out, in)."""
    shapes = names.unet_shapes(widths)
    return {name: shapes[name] for name in names.CROSS_ATTENTION}


def adapter(
    rank: int = 4,
    seed: int = 0,
    size: float = 0.01,
    leaves: tuple[str, ...] = ("to_k", "to_v"),
    widths: names.Widths = names.DEMO,
    text: bool = False,
    name: str = "adapter",
) -> Adapter:
    """Random factors on cross-attention, ‖ΔW‖ per entry about `size`."""
    rng = np.random.default_rng(seed)
    shapes = {
        module: shape
        for module, shape in cross_attention_shapes(widths).items()
        if module.endswith(leaves)
    }
    if text:
        shapes |= {m: s for m, s in names.text_encoder_shapes(128, 2).items() if "q_proj" in m}
    factors = {}
    for module, (out, wide_in) in shapes.items():
        down = rng.standard_normal((rank, wide_in)).astype(np.float32)
        up = (size / rank**0.5 * rng.standard_normal((out, rank))).astype(np.float32)
        factors[module] = Factors(down, up, float(rank))
    return Adapter(factors, {"name": name})


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return {p.name: p.read_bytes() for p in files}


def tensors_in(path: Path) -> dict[tuple[str, str], bytes]:
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    return {
        (file.name if path.is_dir() else "", key): tensor.tobytes()
        for file in files
        for key, tensor in read_tensors(file)[0].items()
    }


def write_protect(monkeypatch, path: Path) -> None:
    """What the system does to all but root, as whom containers run tests."""
    real = open

    def guarded(file, mode="r", *rest, **named):
        if "+" in mode and Path(file) == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return real(file, mode, *rest, **named)

    monkeypatch.setattr("builtins.open", guarded)
