"""Completion: the base draws the first steps, in which a picture's layout is settled, and the
protected model the rest. User interfaces offer it as a refiner's switch."""

import torch

from sdd_lora.attacks.base_drawing import drawn_latents
from sdd_lora.attacks.case import Attacked, Case
from sdd_lora.attacks.settings import Completion
from sdd_lora.generation.given import Given


def completion(case: Case, settings: Completion) -> Attacked:
    """The base's latents after `steps` of the sampler's steps."""
    latents = drawn_latents(case.base, case, [case.prompt], [case.seed], settings.steps)
    return Attacked(case.prompt, given=Given(latents[0], torch.tensor(settings.steps)))
