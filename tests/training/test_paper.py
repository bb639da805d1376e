"""The method on one page: the paper's pseudo-code with two UNets, and the trainer beside it.

`run_sdd` below transcribes the pseudo-code of Kim et al. 2023 (arXiv 2307.05977), line by line. Its
names are the paper's. Read with care in three places, where taken literally it can't be meant:

- it breaks off after `scheduler.step`, so that z_t is one step cleaner than t: the loss is taken at
  the timestep that z_t belongs to, the next one (`until` excludes the last index for this reason);
- `concepts[i % len(concepts)]` means the outer counter, since the inner loop reuses `i`;
- `p = m * p + …` is meant in place.
"""

from copy import deepcopy

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig
from support.small import ddim, embeddings, small_unet

from sdd_lora.recipe import Recipe
from sdd_lora.training.roles import STUDENT, TEACHER
from sdd_lora.training.rollout import generator_for
from sdd_lora.training.trainer import Trainer

SEED, LEARNING_RATE = 3, 1e-3
CONCEPTS = ["a", "b", "c"]


def run_sdd(unet, scheduler, text_encoder, concepts, optimizer, n_iters, m=0.999, s_g=3.0):
    """Returns the EMA model, and the losses. The arguments are those of the paper, with the
    optimizer of the trained parameters."""
    losses = []
    unet_ema = deepcopy(unet)
    c_0, c_s = text_encoder(""), text_encoder(", ".join(concepts))
    for iteration in range(n_iters):
        generator = generator_for(SEED, iteration, 0)
        c_p = text_encoder(concepts[iteration % len(concepts)])  # iterate over concepts
        until = torch.randint(0, len(scheduler.timesteps) - 1, (1,), generator=generator)
        z_t = torch.randn((1, 4, 8, 8), generator=generator)  # initial Gaussian noise z_T
        with torch.no_grad():
            for i, t in enumerate(scheduler.timesteps):
                e_0, e_p = unet_ema(z_t, t, c_0).sample, unet_ema(z_t, t, c_p).sample
                e_tilde = e_0 + s_g * (e_p - e_0)  # sample latents z_t from the EMA model
                z_t = scheduler.step(e_tilde, t, z_t).prev_sample  # for T − t steps by CFG
                if i == until:
                    break
        t = scheduler.timesteps[until + 1]  # the timestep of z_t
        e_0, e_s = unet(z_t, t, c_0).sample, unet(z_t, t, c_s).sample
        loss = ((e_0.detach() - e_s) ** 2).mean()  # L2 norm between two noise estimates
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for p, q in zip(unet_ema.parameters(), unet.parameters(), strict=True):
                if q.requires_grad:
                    p.copy_(m * p + (1 - m) * q)  # EMA update
        losses.append(loss.item())
    return unet_ema, losses


def with_lora(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The parameters of an adapter on cross-attention's to_k and to_v alone are trained."""
    unet.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=r".*\.attn2\.(to_k|to_v)"))
    return unet


def with_cross_attention(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """All weights of the cross-attention are trained: the papers' own way."""
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("attn2" in name)
    return unet


def scheduler_of_five_steps() -> DDIMScheduler:
    scheduler = ddim()
    scheduler.set_timesteps(5)
    return scheduler


@pytest.mark.parametrize(
    ("prepare", "fields"),
    [
        (with_lora, {"lora": {"rank": 2, "alpha": 4}}),
        (with_cross_attention, {"parameters": "full"}),
    ],
    ids=["lora", "full"],
)
def test_the_trainer_agrees_with_the_pseudo_code(prepare, fields):
    prompts = embeddings(concepts=3, kept=0)
    encoded = {"": prompts.empty, "a, b, c": prompts.joined}
    encoded |= {text: c[None] for text, c in zip(CONCEPTS, prompts.concepts, strict=True)}
    unet = prepare(small_unet())
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=1e-4)
    unet_ema, losses = run_sdd(
        unet, scheduler_of_five_steps(), encoded.get, CONCEPTS, optimizer, n_iters=8, m=0.9
    )

    recipe = {
        "name": "paper",
        "model": "none",
        "concepts": CONCEPTS,
        "ema": {"decay": 0.9},
        "optimizer": {
            "kind": "adamw",
            "learning_rate": LEARNING_RATE,
            "weight_decay": 1e-4,
            "max_grad_norm": 1e9,
        },
        "rollout": {"steps": 5},
        "training": {"iterations": 8, "seed": SEED},
    }
    trainer = Trainer(Recipe.model_validate(recipe | fields), small_unet(), ddim(), prompts)
    trainer.run()

    assert len(set(losses)) == 8
    assert trainer.losses == pytest.approx(losses, abs=1e-6)
    teacher = trainer.roles.parameters_of(TEACHER)
    averages = {
        name.replace(".default.weight", ""): parameter
        for (name, parameter), q in zip(unet_ema.named_parameters(), unet.parameters(), strict=True)
        if q.requires_grad
    }
    assert teacher.keys() == averages.keys()
    for name, average in averages.items():
        assert not torch.equal(average, trainer.roles.parameters_of(STUDENT)[name])
        torch.testing.assert_close(teacher[name], average, atol=1e-6, rtol=0)
