"""The attacks by their names in a bench's or a recipe's `attacks`, and what they share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from sdd_lora.attacks import words
from sdd_lora.attacks.case import Attacked, Case
from sdd_lora.attacks.completion import completion
from sdd_lora.attacks.emphasis import emphasis
from sdd_lora.attacks.img2img_attack import image_to_image
from sdd_lora.attacks.inpainting import inpainting
from sdd_lora.attacks.inversion import inversion
from sdd_lora.attacks.noise_search import noise_search
from sdd_lora.attacks.null_text import null_text
from sdd_lora.attacks.relearning import relearning
from sdd_lora.attacks.ring_a_bell import ring_a_bell
from sdd_lora.attacks.unlearndiffatk import unlearndiffatk
from sdd_lora.generation.given import Given, as_drawn, from_given
from sdd_lora.generation.sampling import Job, Sampling

#: attacks that are found; the others are conditions alone (settings.py)
ATTACK_FUNCTIONS: dict[str, Callable[[Case, Any], Attacked]] = {
    "paraphrase": words.paraphrase,
    "group_word": words.group_word,
    "emphasis": emphasis,
    "noise_search": noise_search,
    "completion": completion,
    "img2img": image_to_image,
    "inpainting": inpainting,
    "ring_a_bell": ring_a_bell,
    "inversion": inversion,
    "unlearndiffatk": unlearndiffatk,
    "null_text": null_text,
    "relearning": relearning,
}


@dataclass
class Passes:
    """Samples that went forward through UNets."""

    count: int = 0


@contextmanager
def counted(pipelines: Sequence[StableDiffusionPipeline]) -> Iterator[Passes]:
    """Counts the samples that go through the pipelines' UNets within the block."""
    passes = Passes()

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        passes.count += len(inputs[0])

    unets = {id(pipeline.unet): pipeline.unet for pipeline in pipelines}
    with ExitStack() as hooks:
        for unet in unets.values():
            hooks.enter_context(unet.register_forward_pre_hook(count))
        yield passes


def armed_pipeline(
    pipeline: StableDiffusionPipeline,
    sampling: Sampling,
    new_words: Mapping[str, torch.Tensor],
    given: Mapping[Job, Callable[[], Given]],
) -> StableDiffusionPipeline:
    """The pipeline with the words that attacks found, embeddings (d,), drawing each job from what
    is given for it, if anything is."""
    if new_words:
        pipeline.load_textual_inversion(list(new_words.values()), token=list(new_words))
    if not given:
        return pipeline
    found = {as_drawn(job, sampling, pipeline): load for job, load in given.items()}
    return from_given(pipeline, lambda job: found[job]())
