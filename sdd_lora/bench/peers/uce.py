"""UCE (Gandikota et al. 2024, arXiv 2308.14761): cross-attention edited in closed form."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from sdd_lora.io.atomic import atomic_output
from sdd_lora.io.safetensors import serialize
from sdd_lora.sd.prompts import tokenize

_KEYS_AND_VALUES = (".attn2.to_k.weight", ".attn2.to_v.weight")


def edited(
    weight: Tensor,
    concepts: Tensor,
    targets: Tensor,
    kept: Tensor,
    erase_scale: float = 1.0,
    preserve_scale: float = 1.0,
    regularisation: float = 0.5,
) -> Tensor:
    """W' = (λW + a Σ W c* cᵀ + b Σ W p pᵀ)(λI + a Σ c cᵀ + b Σ p pᵀ)⁻¹ (the paper's eq. 7, with
    the released code's scales a, b and λ), fp32.

    W is (out, d); `concepts` c and `targets` c* are (n, d), paired; `kept` p is (m, d).
    """
    w, c, goal, p = (x.double() for x in (weight, concepts, targets, kept))
    identity = torch.eye(w.shape[1], dtype=w.dtype, device=w.device)
    wanted = regularisation * w + erase_scale * (w @ goal.T) @ c + preserve_scale * (w @ p.T) @ p
    moment = regularisation * identity + erase_scale * c.T @ c + preserve_scale * p.T @ p
    return torch.linalg.solve(moment, wanted, left=False).float()


@torch.no_grad()
def last_subject_tokens(pipeline: StableDiffusionPipeline, texts: Sequence[str]) -> Tensor:
    """Embeddings (n, d) of each text's last word's last token; ∅'s is its first end token."""
    tokenizer = pipeline.tokenizer
    ids = tokenize(texts, tokenizer).to(pipeline.device)
    hidden = pipeline.text_encoder(ids).last_hidden_state  # (n, 77, d)
    ends = (ids == tokenizer.eos_token_id).int().argmax(1)
    places = [
        end - 1 if text.strip() else end for text, end in zip(texts, ends.tolist(), strict=True)
    ]
    return hidden[torch.arange(len(places)), torch.tensor(places)].float()


def write_uce(
    pipeline: StableDiffusionPipeline,
    concepts: Sequence[str],
    path: Path,
    target: str = "",
    kept: Sequence[str] = (),
) -> int:
    """Write the edited keys and values of all cross-attention, fp32 by diffusers' names; returns
    how many matrices. Concepts become `target`; `kept` are prompts whose outputs are held."""
    c = last_subject_tokens(pipeline, concepts)
    goal = last_subject_tokens(pipeline, [target]).expand_as(c)
    p = last_subject_tokens(pipeline, kept) if kept else c.new_zeros(0, c.shape[1])
    weights = {
        name: edited(weight.float(), c, goal, p).cpu().numpy()
        for name, weight in pipeline.unet.state_dict().items()
        if name.endswith(_KEYS_AND_VALUES)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_output(path) as file:
        for chunk in serialize(weights, {"format": "pt"}):
            file.write(chunk)
    return len(weights)
