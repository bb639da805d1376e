"""Inversion without words: noise and empty prompts from which the protected model draws a picture
of what was erased. Null-text inversion (Mokady et al. 2022, arXiv 2211.09794), used as TINA does:
where an eraser has only cut words from pictures, the pictures are still there."""

import torch
from diffusers import DDIMInverseScheduler

from sdd_lora.attacks.base_drawing import drawn_latents
from sdd_lora.attacks.case import Attacked, Case
from sdd_lora.attacks.settings import NullText
from sdd_lora.attacks.tokens import encoded, token_ids
from sdd_lora.generation.given import Given
from sdd_lora.sd.schedulers import set_scheduler


def null_text(case: Case, settings: NullText) -> Attacked:
    """z_T by DDIM inversion under ∅ of the base's picture of the same prompt and seed, then
    ∅_t = argmin ‖z*_{t−1} − DDIM(z_t, ε_θ(z_t, t, ∅_t))‖² at each step, from the noisiest on (eq. 3
    without guidance); all through the protected model.

    `before` and `after` are the mean squares by which ∅, and the learnt ∅_t, miss the picture's
    latents.
    """
    model, steps = case.protected, case.sampling.steps
    picture = drawn_latents(case.base, case, [case.prompt], [case.seed]).to(model.device)
    with torch.no_grad():
        empty = encoded(model, token_ids(model, [""]))
    set_scheduler(model, "ddim")
    model.scheduler.set_timesteps(steps, device=model.device)
    goals = _inverted(case, picture, empty)

    def stepped(latents: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        predicted = model.unet(latents, t, encoder_hidden_states=text).sample
        return model.scheduler.step(predicted, t, latents).prev_sample

    plain = latents = goals[-1]
    text = empty.clone()
    learnt = []
    for t, goal in zip(model.scheduler.timesteps, reversed(goals[:-1]), strict=True):
        with torch.no_grad():
            plain = stepped(plain, t, empty)
        text = text.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([text], lr=settings.learning_rate)
        for _ in range(settings.steps):
            loss = torch.nn.functional.mse_loss(stepped(latents, t, text), goal)
            (text.grad,) = torch.autograd.grad(loss, [text])
            optimizer.step()
        with torch.no_grad():
            latents = stepped(latents, t, text)
        learnt.append(text.detach()[0])
    missed = [torch.nn.functional.mse_loss(z, picture).item() for z in (plain, latents)]
    given = Given(latents=goals[-1][0], each_step=torch.stack(learnt))
    return Attacked(case.prompt, given=given, before=missed[0], after=missed[1])


@torch.no_grad()
def _inverted(case: Case, picture: torch.Tensor, text: torch.Tensor) -> list[torch.Tensor]:
    """Latents (1, 4, h, w) from the picture to noise, one more than there are steps."""
    model = case.protected
    inverse = DDIMInverseScheduler.from_config(
        model.scheduler.config, clip_sample=False, timestep_spacing="leading"
    )
    inverse.set_timesteps(case.sampling.steps, device=model.device)
    found = [picture]
    for t in model.scheduler.timesteps.flip(0):  # of any spacing; the inverse knows two
        predicted = model.unet(found[-1], t, encoder_hidden_states=text).sample
        found.append(inverse.step(predicted, t, found[-1]).prev_sample)
    return found
