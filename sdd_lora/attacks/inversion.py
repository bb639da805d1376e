"""Concept inversion (Pham et al. 2023, arXiv 2308.01508): textual inversion of what was erased,
through the model that erased it. If one new word brings it back, it was hidden, not gone."""

import torch

from sdd_lora.attacks.base_drawing import drawings
from sdd_lora.attacks.case import Attacked, Case
from sdd_lora.attacks.noise import denoising_loss, random_points
from sdd_lora.attacks.settings import Inversion
from sdd_lora.attacks.tokens import encoded, free_words, token_ids

_SENTENCE = "a picture of {}"
_ANY_WORD = "a"  # stands where the new one will
_EVALUATIONS = 4


def inversion(case: Case, settings: Inversion) -> Attacked:
    """v* = argmin E ‖ε − ε_θ(z_t, t, c(v))‖² over one word's embedding v (d,) (Gal et al. 2022,
    arXiv 2208.01618, eq. 2), ε_θ being the protected model, z the base's drawings of the prompt."""
    model = case.protected
    latents = drawings(case, settings.pictures).to(model.device)
    ids = token_ids(model, [_SENTENCE.format(_ANY_WORD)])
    place = len(model.tokenizer(_SENTENCE.format(_ANY_WORD)).input_ids) - 2
    word = _first_guess(case).requires_grad_()
    optimizer = torch.optim.Adam([word], lr=settings.learning_rate)
    generator = case.generator()

    def loss_at(points: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        with free_words(model.text_encoder, place, word[None]):
            embeddings = encoded(model, ids)
        return denoising_loss(model, latents, embeddings.expand(len(latents), -1, -1), points)

    held = [random_points(model, latents, generator) for _ in range(_EVALUATIONS)]

    @torch.no_grad()
    def held_loss() -> float:
        return sum(loss_at(points).item() for points in held) / len(held)

    before = held_loss()
    for _ in range(settings.steps):
        loss = loss_at(random_points(model, latents, generator))
        (word.grad,) = torch.autograd.grad(loss, [word])
        optimizer.step()
    name = f"<attack-{case.number}>"
    return Attacked(
        _SENTENCE.format(name), {name: word.detach().cpu()}, before=before, after=held_loss()
    )


def _first_guess(case: Case) -> torch.Tensor:
    """The mean of the prompt's own words' embeddings, (d,): the usual start is a word that is
    roughly right. Where it has none, that of any word."""
    ids = case.protected.tokenizer(case.prompt or _ANY_WORD).input_ids[1:-1]
    table = case.protected.text_encoder.get_input_embeddings().weight
    return table[ids].mean(0).detach().clone()
