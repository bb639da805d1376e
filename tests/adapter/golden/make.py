"""Makes the golden files: one small adapter in each form, spelled out by hand.

Run `python tests/adapter/golden/make.py` after a change here. Key names are literal on purpose:
nothing of `sdd_lora` takes part. All forms hold the same delta, 0.5 · up @ down, on two modules.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent
RANK, SCALE = 2, 0.5
TO_K = "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k"
TO_OUT = "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0"
SHAPES = {TO_K: (32, 128), TO_OUT: (32, 32)}


def factors(name: str) -> tuple[np.ndarray, np.ndarray]:
    """down (2, in) and up (out, 2): small multiples of 1/8, exact in fp16."""
    out, wide_in = SHAPES[name]
    down = (np.arange(RANK * wide_in, dtype=np.float32).reshape(RANK, wide_in) % 7 - 3) / 8
    up = (np.arange(out * RANK, dtype=np.float32).reshape(out, RANK) % 5 - 2) / 8
    return down, up


def delta(name: str) -> np.ndarray:
    down, up = factors(name)
    return np.float32(SCALE) * up @ down


def named(stems: dict[str, str], down_end: str, up_end: str, up_scale: float = 1.0) -> dict:
    tensors = {}
    for name, stem in stems.items():
        down, up = factors(name)
        tensors |= {stem + down_end: down, stem + up_end: up * np.float32(up_scale)}
    return tensors


def kohya() -> tuple[dict, dict]:
    """A: the scale is alpha / rank; A1111, ComfyUI, InvokeAI and diffusers all read it."""
    stems = {
        TO_K: "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_k",
        TO_OUT: "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_out_0",
    }
    alphas = {f"{stem}.alpha": np.array(RANK * SCALE, np.float32) for stem in stems.values()}
    return named(stems, ".lora_down.weight", ".lora_up.weight") | alphas, {"ss_output_name": "gold"}


def ldm() -> tuple[dict, dict]:
    """B: A under LDM's block names; A1111 and ComfyUI read it, InvokeAI and diffusers don't."""
    stems = {
        TO_K: "lora_unet_input_blocks_2_1_transformer_blocks_0_attn2_to_k",
        TO_OUT: "lora_unet_output_blocks_11_1_transformer_blocks_0_attn2_to_out_0",
    }
    alphas = {f"{stem}.alpha": np.array(RANK * SCALE, np.float32) for stem in stems.values()}
    return named(stems, ".lora_down.weight", ".lora_up.weight") | alphas, {}


def peft() -> tuple[dict, dict]:
    """C: alpha is in the header alone; diffusers reads it."""
    config = {
        "unet.r": RANK,
        "unet.lora_alpha": RANK * SCALE,
        "unet.target_modules": [TO_K, TO_OUT],
    }
    stems = {TO_K: f"unet.{TO_K}", TO_OUT: f"unet.{TO_OUT}"}
    header = {"lora_adapter_metadata": json.dumps(config), "format": "pt"}
    return named(stems, ".lora_A.weight", ".lora_B.weight"), header


def peft_plain() -> tuple[dict, dict]:
    """C without metadata: the scale is 1."""
    stems = {TO_K: f"unet.{TO_K}", TO_OUT: f"unet.{TO_OUT}"}
    return named(stems, ".lora_A.weight", ".lora_B.weight", SCALE), {}


def bare() -> tuple[dict, dict]:
    """D: what a model's own `save_lora_adapter` writes; its pipeline loads nothing of it."""
    config = {"r": RANK, "lora_alpha": RANK, "alpha_pattern": {TO_K: RANK * SCALE, TO_OUT: 1.0}}
    stems = {TO_K: TO_K, TO_OUT: TO_OUT}
    header = {"lora_adapter_metadata": json.dumps(config)}
    return named(stems, ".lora_A.weight", ".lora_B.weight"), header


def attn_procs() -> tuple[dict, dict]:
    """E: no alpha, so the scale is 1; to_out has no number. ComfyUI and diffusers read it."""
    stems = {
        TO_K: TO_K.replace("attn2.to_k", "attn2.processor.to_k_lora"),
        TO_OUT: TO_OUT.replace("attn2.to_out.0", "attn2.processor.to_out_lora"),
    }
    stems = {name: f"unet.{stem}" for name, stem in stems.items()}
    return named(stems, ".down.weight", ".up.weight", SCALE), {}


MAKERS = {
    "kohya": kohya,
    "ldm": ldm,
    "peft": peft,
    "peft-plain": peft_plain,
    "bare": bare,
    "attn-procs": attn_procs,
}


if __name__ == "__main__":
    for form, make in MAKERS.items():
        tensors, header = make()
        save_file(tensors, FOLDER / f"{form}.safetensors", metadata=header)
