"""Prompt-gated adapters: SPM's facilitated transport (Lyu et al. 2023, arXiv 2312.16145) for any
adapter: the change that a prompt gets grows with its similarity to the concept."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import CLIPTextModel, CLIPTokenizer

from sdd_lora.errors import BadInput
from sdd_lora.generation.methods import sd
from sdd_lora.generation.sampling import Sampling
from sdd_lora.sd.prompts import embed


@dataclass
class Gate:
    """The gain (B,) by which each prompt's change is multiplied.

    A batch may hold the prompts several times over, one after the other, as guidance has them.
    """

    gain: torch.Tensor

    def __call__(self, module: torch.nn.Module, inputs: Any, change: torch.Tensor) -> torch.Tensor:
        gain = self.gain.repeat(len(change) // len(self.gain)).to(change)
        return change * gain.view(-1, *[1] * (change.ndim - 1))


def sample(
    pipeline: StableDiffusionPipeline,
    prompts: list[str],
    generators: list[torch.Generator],
    sampling: Sampling,
) -> torch.Tensor:
    """Latents (B, 4, h, w), one a prompt; `sampling.concept` is one concept or several,
    separated by commas. Raises BadInput where no adapter is there to be gated."""
    concepts = concepts_of(sampling.concept)
    with gated(pipeline, Gate(torch.zeros(1))) as gate:
        # closed meanwhile: an adapter of the text encoder must not change the similarity
        read = pipeline.maybe_convert_prompt(prompts, pipeline.tokenizer)  # learned words in full
        gate.gain = similarity(read, concepts, pipeline.tokenizer, pipeline.text_encoder)
        return sd.sample(pipeline, prompts, generators, sampling)


def concepts_of(text: str) -> list[str]:
    """ "bomb, axe" → ["bomb", "axe"]."""
    return [concept.strip() for concept in text.split(",") if concept.strip()]


@contextmanager
def gated(pipeline: StableDiffusionPipeline, gate: Gate) -> Iterator[Gate]:
    """Within the block, what the active adapters add passes the gate: once, behind the up factor,
    so that a gain m scales a change by m (SPM's released code multiplies both factors: m²)."""
    with ExitStack() as hooks:
        for up in gated_layers(pipeline):
            hooks.enter_context(up.register_forward_hook(gate))
        yield gate


def gated_layers(pipeline: StableDiffusionPipeline) -> list[torch.nn.Module]:
    """The up layers of all active adapters. Raises BadInput where there is none."""
    ups = [
        layer.lora_B[name]
        for part in (pipeline.unet, pipeline.text_encoder)
        for layer in part.modules()
        if isinstance(layer, BaseTunerLayer)
        for name in layer.active_adapters
        if name in layer.lora_B
    ]
    if not ups:
        raise BadInput("method sdd-gated: there is no adapter to gate; give one")
    return ups


def similarity(
    prompts: Sequence[str],
    concepts: Sequence[str],
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
) -> torch.Tensor:
    """Similarity of each prompt to its nearest concept, (B,) from 0 to 1, on the encoder's device.

    The greater of two measures: the cosine of the embeddings, flattened, and the share of the
    concept's tokens that the prompt has. All prompts share their first token's embedding, so that
    the cosine is well above 0 for unrelated ones too.
    """
    wanted, found = token_sets(concepts, tokenizer), token_sets(prompts, tokenizer)
    shares = [[len(has & needs) / len(needs) for needs in wanted] for has in found]
    flat = embed([*prompts, *concepts], tokenizer, text_encoder).flatten(1)
    flat = torch.nn.functional.normalize(flat, dim=1)
    cosines = flat[: len(prompts)] @ flat[len(prompts) :].T  # (B, concepts)
    near = torch.maximum(cosines, torch.tensor(shares, device=cosines.device))
    return near.amax(dim=1).clamp(0, 1)


def token_sets(texts: Sequence[str], tokenizer: CLIPTokenizer) -> list[set[int]]:
    """The tokens of each text as far as the model reads, without those that start, end and pad."""
    ids = tokenizer(list(texts), truncation=True, max_length=tokenizer.model_max_length).input_ids
    return [set(found) - set(tokenizer.all_special_ids) for found in ids]
