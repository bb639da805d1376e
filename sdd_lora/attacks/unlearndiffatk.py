"""UnlearnDiffAtk (Zhang et al. 2023, arXiv 2310.11868): words before the prompt under which the
protected model itself finds a picture of what was erased likely."""

import torch

from sdd_lora.attacks.base_drawing import drawings
from sdd_lora.attacks.case import Attacked, Case
from sdd_lora.attacks.noise import denoising_loss, random_points
from sdd_lora.attacks.settings import UnlearnDiffAtk
from sdd_lora.attacks.tokens import encoded, free_words, plain_words, token_ids

_EVALUATIONS, _LOOKS = 4, 8


def unlearndiffatk(case: Case, settings: UnlearnDiffAtk) -> Attacked:
    """δ* = argmin E ‖ε − ε_θ(z_t, t, δ + prompt)‖² over words δ (the paper's attack objective), z
    being one drawing of the base's; by projected gradient descent on the chances of words.

    The paper draws and classifies after every timestep and stops at success. Here nothing looks on,
    and the words are taken that have the lowest loss at held-out points, so that the rates here are
    of one drawing each, and no more than a lower bound of what the paper's way would find.
    """
    model = case.protected
    words = plain_words(model.tokenizer)
    latents = drawings(case, 1).to(model.device).repeat(settings.points, 1, 1, 1)
    generator = case.generator()
    held = [random_points(model, latents, generator) for _ in range(_EVALUATIONS)]

    def text_of(prefix: torch.Tensor) -> str:
        return " ".join([*(words[index] for index in prefix.tolist()), case.prompt])

    @torch.no_grad()
    def held_loss(prefix: torch.Tensor) -> float:
        embeddings = encoded(model, token_ids(model, [text_of(prefix)] * len(latents)))
        losses = [denoising_loss(model, latents, embeddings, points) for points in held]
        return torch.stack(losses).mean().item()

    start = torch.randint(len(words), (settings.words,), generator=generator)
    best, before = start, held_loss(start)
    lowest = before
    chances = torch.full((settings.words, len(words)), 1 / len(words), device=model.device)
    optimizer = torch.optim.Adam([chances.requires_grad_()], lr=settings.learning_rate)
    ids = token_ids(model, [text_of(start)] * settings.points)
    vocabulary = model.tokenizer.convert_tokens_to_ids([f"{word}</w>" for word in words])
    table = model.text_encoder.get_input_embeddings().weight[vocabulary].detach()
    for step in range(1, settings.steps + 1):
        drawn = sampled_words(chances, settings.points, generator)  # (points, words, V)
        with free_words(model.text_encoder, 1, drawn @ table):
            embeddings = encoded(model, ids)
        points = random_points(model, latents, generator)
        loss = denoising_loss(model, latents, embeddings, points)
        (chances.grad,) = torch.autograd.grad(loss, [chances])
        optimizer.step()
        chances.data = onto_simplex(chances.data)
        if step % max(1, settings.steps // _LOOKS) == 0 or step == settings.steps:
            prefix = chances.argmax(1).cpu()
            if (found := held_loss(prefix)) < lowest:
                best, lowest = prefix, found
    return Attacked(text_of(best), before=before, after=lowest)


def sampled_words(chances: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """One-hot words (count, n, V) drawn by their chances (n, V), whose gradient goes straight
    through to the chances."""
    drawn = torch.multinomial(chances.detach().cpu(), count, replacement=True, generator=generator)
    one_hot = torch.nn.functional.one_hot(drawn.T, chances.shape[1]).to(chances)
    return one_hot + chances - chances.detach()


def onto_simplex(rows: torch.Tensor) -> torch.Tensor:
    """The nearest probabilities to each row (n, V): Duchi et al. 2008, algorithm 1."""
    descending = rows.sort(1, descending=True).values
    excess = descending.cumsum(1) - 1
    ranks = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    last = (descending - excess / ranks > 0).sum(1, keepdim=True)  # ρ
    return (rows - excess.gather(1, last - 1) / last).clamp(min=0)
