"""Prompts below the level of texts: words of a tokenizer, and words whose embedding is free."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer

from sdd_lora.sd.prompts import tokenize
from sdd_lora.training.words import whole_words


def plain_words(tokenizer: CLIPTokenizer, without: Sequence[str] = ()) -> list[str]:
    """Words that are one token each and are read back as that token, so that a row of them is a
    text that anybody can type; none that stands in one of the texts `without`."""
    left_out = {word for text in without for word in text.lower().split()}
    words = [word for word in whole_words(tokenizer, shortest=1) if word not in left_out]
    read = tokenizer(words, add_special_tokens=False).input_ids
    own = tokenizer.convert_tokens_to_ids([f"{word}</w>" for word in words])
    return [w for w, ids, token in zip(words, read, own, strict=True) if ids == [token]]


def token_ids(pipeline: StableDiffusionPipeline, prompts: Sequence[str]) -> torch.Tensor:
    """Tokens (B, 77) as the pipeline reads them."""
    return tokenize(prompts, pipeline.tokenizer).to(pipeline.device)


def encoded(pipeline: StableDiffusionPipeline, ids: torch.Tensor) -> torch.Tensor:
    """Embeddings (B, 77, d) of tokens (B, 77), with their gradient."""
    return pipeline.text_encoder(ids).last_hidden_state


@contextmanager
def free_words(text_encoder: CLIPTextModel, first: int, vectors: torch.Tensor) -> Iterator[None]:
    """Within the block the tokens from position `first` on have the embeddings `vectors`, (n, d)
    or, each prompt its own, (B, n, d); they get gradients, nothing else changes."""

    def replace(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        own = vectors.to(output).expand(len(output), *vectors.shape[-2:])
        return torch.cat([output[:, :first], own, output[:, first + own.shape[1] :]], dim=1)

    with text_encoder.get_input_embeddings().register_forward_hook(replace):
        yield
