"""Relearning: the protected model is tuned on a few pictures, as any user may tune it. Of the
concept: how little brings it back? Of other things: does it come back by itself?"""

import torch
from peft import LoraConfig, get_peft_model_state_dict

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.attacks.base_drawing import drawn_latents
from sdd_lora.attacks.case import Attacked, Case
from sdd_lora.attacks.noise import denoising_loss, random_points
from sdd_lora.attacks.settings import Relearning
from sdd_lora.attacks.tokens import encoded, token_ids

_PICTURE_OF = "a picture of {}"
_LEARNT = "relearned"
_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
OWN_SEEDS = 7_000_000_000  # of the pictures; beyond those of any table
_LAST = 10  # losses that before and after are means of


def relearning(case: Case, settings: Relearning) -> Attacked:
    """An adapter on the protected UNet's attention that lowers E ‖ε − ε_θ(z_t, t, prompt)‖² on the
    base's drawings of `prompts`, or of the concepts. The method's own adapters are made part of its
    weights first, so that the case's `protected` can't be used for anything else afterwards."""
    model = case.protected
    prompts = settings.prompts or [_PICTURE_OF.format(concept) for concept in case.concepts]
    prompts = [prompts[i % len(prompts)] for i in range(settings.pictures)]
    seeds = [case.seed + OWN_SEEDS + k for k in range(settings.pictures)]
    latents = drawn_latents(case.base, case, prompts, seeds).to(model.device)
    with torch.no_grad():
        embeddings = encoded(model, token_ids(model, prompts))
    model.fuse_lora()
    model.unload_lora_weights()
    config = LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=_TARGETS)
    generator = case.generator()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)  # peft's start
        model.unet.add_adapter(config, adapter_name=_LEARNT)
    learnt = [p for p in model.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learnt, lr=settings.learning_rate)
    losses = []
    for _ in range(settings.iterations):
        chosen = torch.randperm(len(prompts), generator=generator)[: settings.batch]
        chosen = chosen.to(model.device)
        points = random_points(model, latents[chosen], generator)
        loss = denoising_loss(model, latents[chosen], embeddings[chosen], points)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tensors = get_peft_model_state_dict(model.unet, adapter_name=_LEARNT)
    adapter = Adapter.from_state_dict({f"unet.{k}": v for k, v in tensors.items()})
    before, after = (sum(part) / len(part) for part in (losses[:_LAST], losses[-_LAST:]))
    return Attacked(case.prompt, adapter=adapter, before=before, after=after)
