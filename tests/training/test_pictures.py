"""Erasure on noised drawings: their target, what is learnt, at what cost."""

import pytest
import torch
import torch.nn.functional as F
from support.trainers import WAYS, recipe, trainer

from sdd_lora.errors import BadInput
from sdd_lora.recipe import Recipe
from sdd_lora.training.plan import passes_of_drawings
from sdd_lora.training.rollout import generator_for

USES = range(32)
LEARNING = WAYS["pictures"]
NOT_LEARNING = LEARNING | {"pictures": LEARNING["pictures"] | {"learnt": 0}}


def test_the_target_is_the_noise_that_would_leave_the_blank():
    pictures = trainer(recipe(**NOT_LEARNING)).pictures
    erased, _ = pictures.sample(0, USES)
    alpha = pictures.alphas[erased.t].view(-1, 1, 1, 1)
    seen = (erased.z_t - (1 - alpha).sqrt() * erased.blank) / alpha.sqrt()
    noisy = erased.t > 300  # in less noise the picture's share of the target is cut off
    assert 5 < noisy.sum() < len(USES)
    torch.testing.assert_close(
        seen[noisy], pictures.blank.expand_as(seen[noisy]), atol=1e-4, rtol=0
    )


def test_concepts_are_erased_under_every_kind_of_prompt_and_kept_drawings_held_under_theirs():
    trained = trainer(recipe(**NOT_LEARNING))
    erased, kept = trained.pictures.sample(0, USES)
    prompts = trained.embeddings
    for asked, allowed in enumerate((prompts.empty, prompts.concepts, prompts.kept)):
        assert all(any(torch.equal(c, a) for a in allowed) for c in erased.c[asked::4])
    assert erased.t[::2].max() < 700 < erased.t[1::2].max()  # ∅ and kept prompts, where it shows
    assert sum(torch.equal(c, prompts.empty[0]) for c in kept.c) == len(USES) // 4


def test_a_blank_is_learnt_where_a_concept_shows_and_the_rest_is_held():
    settings = LEARNING | {
        "pictures": {"weight": 5.0, "drawings": 1, "kept_drawings": 1, "batch": 4},
        "preserve": {"prompts": ["d", "e"], "weight": 1.0},
        "ema": {"decay": 0.0},
        "optimizer": {"learning_rate": 3e-2},
        "lora": {"rank": 2, "targets": ["noxattn"]},
        "rollout": {"steps": 2},
        "training": {"iterations": 4},
    }
    trained = trainer(recipe(**settings))
    trained.run()
    erased, kept = trained.pictures.sample(99, USES)
    unheard_of = torch.randn(erased.c.shape, generator=generator_for(0, 0, 0))

    def losses(unet):
        return [
            F.mse_loss(unet(erased.z_t, erased.t, c).sample, erased.blank).item()
            for c in (erased.c, unheard_of)
        ]

    with trained.roles.base() as unet:
        before, base = losses(unet), unet(kept.z_t, kept.t, kept.c).sample
    with trained.roles.teacher() as unet:
        after, now = losses(unet), unet(kept.z_t, kept.t, kept.c).sample
    assert all(a < 0.95 * b for a, b in zip(after, before, strict=True))
    assert F.mse_loss(now, base) < 0.5 * (before[0] - after[0])


def test_a_learnt_prompt_lowers_the_denoising_loss_of_its_own_concept_and_starts_over():
    pictures = trainer(recipe(**LEARNING)).pictures
    learnt, target = pictures.learnt, torch.randn(77, 16, generator=generator_for(0, 0, 0))
    concept = learnt.sought[1]
    assert torch.equal(learnt.prompt(1), pictures.concepts[concept])

    def loss():
        return F.mse_loss(learnt.prompt(1), target)

    before = loss().item()
    for _ in range(79):
        learnt.learn(0, loss())
    assert loss().item() < before and learnt.steps == [0, 79]
    learnt.learn(0, loss())
    assert torch.equal(learnt.prompt(1), pictures.concepts[learnt.sought[1]])
    assert learnt.steps == [0, 0]


def test_learnt_prompts_stand_before_drawings_of_the_concept_that_they_seek():
    pictures = trainer(recipe(**LEARNING)).pictures
    erased, _ = pictures.sample(0, USES)
    assert erased.c.requires_grad
    starts = [pictures.concepts[concept] for concept in pictures.learnt.sought]
    assert all(any(torch.equal(c, start) for start in starts) for c in erased.c[::3])


def test_what_is_kept_is_held_on_its_own_drawings_and_not_on_the_concepts_latents():
    trained = trainer(recipe(**NOT_LEARNING))
    trained.step()  # from here on preservation is not 0
    batch, samples = trained._roll_out([0, 1]), [0, 1]
    c_0 = trained.embeddings.empty.expand(2, -1, -1)
    with trained.roles.student():
        found = trained._loss(batch, samples).item()
        estimates = trained._estimate, trained._base_estimate
        c = trained._erased_prompts(batch)
        sdd = trained.objective.loss(*estimates, batch.z_t, batch.t, c_0, c).item()
        uses = range(2 * trained.pictures.settings.batch)
        pictures = trained.pictures.loss(trained._estimate, trained.iteration, uses).item()
    assert found == pytest.approx(sdd + pictures, rel=1e-5)


def test_drawings_are_counted_as_planned():
    settings = recipe(**NOT_LEARNING)
    trained = trainer(settings)
    assert len(trained.pictures.erased) == 3 and len(trained.pictures.kept) == 2
    assert trained.training_passes == passes_of_drawings(settings) == 2 * 4 * (3 + 2)
    words = NOT_LEARNING | {"preserve": {"prompts": ["d", "e"], "vocabulary": 5}}
    assert passes_of_drawings(recipe(**words)) == 2 * 4 * (3 + 2 + 5)


def test_without_prompts_to_keep_there_is_nothing_to_hold():
    with pytest.raises(BadInput, match=r"pictures: draws kept prompts too: expected preserve"):
        Recipe.parse("name: x\nmodel: demo\nconcepts: [bomb]\npictures: {}\n")
    words = "name: x\nmodel: demo\nconcepts: [bomb]\npreserve: {vocabulary: 9}\npictures: {}\n"
    assert Recipe.parse(words).preserve.vocabulary == 9


def test_noxattn_stands_beside_the_cross_attention_with_pictures_alone():
    fields = "name: x\nmodel: demo\nconcepts: [bomb]\nlora: {targets: [noxattn, to_k]}\n"
    with pytest.raises(BadInput, match=r"expected \['to_k'\]"):
        Recipe.parse(fields)
    assert Recipe.parse(fields + "preserve: {prompts: [cat]}\npictures: {}\n").pictures
