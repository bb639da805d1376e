"""Concepts → embeddings, once; the text encoder can be dropped afterwards."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import CLIPTextModel, CLIPTokenizer

from sdd_lora.errors import BadInput
from sdd_lora.progress import warn


def token_count(tokenizer: CLIPTokenizer, text: str) -> int:
    """Tokens of a prompt, start and end included."""
    return len(tokenizer(text, truncation=False, verbose=False).input_ids)


def cut_off(tokenizer: CLIPTokenizer, text: str) -> str:
    """The end of a prompt that lies beyond the model's 77 tokens and is not read; "" for none."""
    ids = tokenizer(text, truncation=False, verbose=False).input_ids[1:-1]
    return tokenizer.decode(ids[tokenizer.model_max_length - 2 :]).strip()


def join_concepts(concepts: Sequence[str], tokenizer: CLIPTokenizer) -> list[str]:
    """c_s: concepts joined by ", ", as many as fit the context, rotating through all of them.

    The pseudo-code's `", ".join(concepts)` is what comes back where that fits; where it doesn't,
    several joined prompts come back, each concept in at least one, used in turn.
    """
    joined, start = [], 0
    while start < len(concepts):
        end = start + 1
        while end < len(concepts) and (
            token_count(tokenizer, ", ".join(concepts[start : end + 1]))
            <= tokenizer.model_max_length
        ):
            end += 1
        joined.append(", ".join(concepts[start:end]))
        start = end
    return joined


def tokenize(texts: Sequence[str], tokenizer: CLIPTokenizer) -> torch.Tensor:
    """Tokens (N, 77) of prompts, int64, padded, and cut off where a prompt is longer."""
    tokens: torch.Tensor = tokenizer(
        list(texts),
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids
    return tokens


@torch.no_grad()
def embed(
    texts: Sequence[str], tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel
) -> torch.Tensor:
    """Embeddings (N, 77, d) of prompts, fp32, on the encoder's device.

    Warns of what a prompt over 77 tokens loses. Raises BadInput where embeddings are not finite.
    """
    for text in texts:
        if lost := cut_off(tokenizer, text):
            warn(f"prompt over {tokenizer.model_max_length} tokens: not read: {lost!r}")
    tokens = tokenize(texts, tokenizer).to(text_encoder.device)
    embeddings = text_encoder(tokens).last_hidden_state.float()
    if not torch.isfinite(embeddings).all():
        raise BadInput("the text encoder's output is not finite: its weights are damaged")
    return embeddings


def skip_last_layers(text_encoder: CLIPTextModel, clip_skip: int) -> None:
    """Take the last layers from a text encoder; its final norm stays. `clip_skip` counts as user
    interfaces do, 1 for none of them. Raises BadInput where no layer would be left."""
    encoder = _layered(text_encoder)
    most = len(encoder.layers)
    if not 1 <= clip_skip <= most:
        raise BadInput(
            f"clip skip: expected 1 to {most}, the text encoder's layers, found {clip_skip}"
        )
    encoder.layers = encoder.layers[: most - clip_skip + 1]


@contextmanager
def skipped(text_encoder: CLIPTextModel, clip_skip: int) -> Iterator[CLIPTextModel]:
    """The text encoder without its last layers, whole again after the block."""
    encoder = _layered(text_encoder)
    layers = encoder.layers
    skip_last_layers(text_encoder, clip_skip)
    try:
        yield text_encoder
    finally:
        encoder.layers = layers


def _layered(text_encoder: CLIPTextModel) -> Any:
    """The part that holds the layers; transformers 5 dropped the level text_model."""
    return getattr(text_encoder, "text_model", text_encoder).encoder
