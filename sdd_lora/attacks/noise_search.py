"""Noise search: another starting noise under which the protected model draws what was erased.

No detector of the concept is needed: the unprotected model judges, as a classifier (Li et al. 2023,
arXiv 2303.16203).
"""

import torch

from sdd_lora.attacks.base_drawing import drawn_latents
from sdd_lora.attacks.case import Attacked, Case
from sdd_lora.attacks.noise import denoising_loss, random_points
from sdd_lora.attacks.settings import NoiseSearch
from sdd_lora.attacks.tokens import encoded, token_ids
from sdd_lora.generation.given import Given

_BETWEEN = 1_000_003  # seeds tried for one case are as good as never another case's own


@torch.no_grad()
def noise_search(case: Case, settings: NoiseSearch) -> Attacked:
    """argmin over noises of E ‖ε − ε_base(z_t, t, prompt)‖² − ‖ε − ε_base(z_t, t, ∅)‖², z being
    what the protected model draws from each; the case's own noise is the first one."""
    seeds = [case.seed + _BETWEEN * k for k in range(settings.tries)]
    drawn = drawn_latents(case.protected, case, [case.prompt] * len(seeds), seeds)
    texts = encoded(case.base, token_ids(case.base, [case.prompt, ""]))
    generator = case.generator()
    scores = torch.zeros(len(seeds))
    for _ in range(settings.points):
        t, noise = random_points(case.base, drawn[:1], generator)  # the same for all
        for index, latents in enumerate(drawn.to(case.base.device)):
            with_prompt, without = (
                denoising_loss(case.base, latents[None], text[None], (t, noise)) for text in texts
            )
            scores[index] += (with_prompt - without).item() / settings.points
    best = int(scores.argmin())
    noise = torch.randn(drawn[:1].shape, generator=torch.Generator().manual_seed(seeds[best]))
    given = Given(latents=noise[0] * case.protected.scheduler.init_noise_sigma)
    return Attacked(case.prompt, given=given, before=scores[0].item(), after=scores[best].item())
