"""Down factors that start where concepts and kept prompts differ."""

import pytest
import torch

from sdd_lora.errors import BadInput
from sdd_lora.recipe import Recipe
from sdd_lora.sd.model import load_training_parts
from sdd_lora.training.embeddings import encode_prompts
from sdd_lora.training.init import concept_directions, damping
from sdd_lora.training.roles import STUDENT, TEACHER
from sdd_lora.training.trainer import Trainer


def along(axes: dict[int, float], width: int = 6) -> torch.Tensor:
    """Two prompts of three tokens each that vary along some axes."""
    torch.manual_seed(len(axes))
    tokens = torch.zeros(2, 3, width)
    for axis, size in axes.items():
        tokens[..., axis] = size * torch.randn(2, 3)
    return tokens


def test_the_first_direction_is_what_the_concepts_have_alone_however_small_it_is():
    directions = concept_directions(along({0: 10.0, 3: 1.0}), along({0: 10.0, 1: 5.0}), rank=1)
    assert directions.shape == (1, 6)
    assert directions[0].abs().argmax() == 3
    assert directions[0, :3].abs().max() < 0.05 * directions[0, 3].abs()


def test_every_direction_has_the_same_answer_of_the_concepts():
    concepts, kept = torch.randn(4, 77, 16), torch.randn(9, 77, 16)
    answers = concepts @ concept_directions(concepts, kept, rank=5).T
    torch.testing.assert_close(answers.pow(2).mean((0, 1)).sqrt(), torch.full((5,), 3.0))


def test_more_directions_than_the_prompts_have_are_refused():
    with pytest.raises(BadInput, match=r"lora.rank: expected 6 at most.*found 7"):
        concept_directions(along({0: 1.0}), along({1: 1.0}), rank=7)


def test_damped_factors_minimise_what_their_docstring_says():
    torch.manual_seed(0)
    concepts, kept, down = torch.randn(3, 5, 6), torch.randn(4, 5, 6), torch.randn(2, 6)
    found = (down @ damping(concepts, kept, 0.7)).requires_grad_()
    assert not torch.allclose(found, down, atol=0.1)
    ridge = 1e-4 * concepts.square().mean()
    on_concepts = ((found - down) @ concepts.flatten(0, 1).T).square().sum(0).mean()
    on_kept = (found @ kept.flatten(0, 1).T).square().sum(0).mean()
    (on_concepts + ridge * (found - down).square().sum() + 0.7 * on_kept).backward()
    torch.testing.assert_close(found.grad, torch.zeros_like(down), atol=1e-5, rtol=0)


def test_damping_spares_what_no_kept_prompt_has():
    concepts = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]))[None]  # a token an axis
    kept = torch.diag(torch.tensor([0.0, 10.0, 1.0, 0.0]))[None]
    found = torch.ones(2, 4) @ damping(concepts, kept, 1.0)
    expected = torch.tensor([1.0, 0.01, 0.0, 1.0]).expand(2, 4)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("init", ["random", "concepts"])
def test_a_training_starts_as_the_base_with_the_rows_asked_for(init):
    recipe = Recipe.model_validate(
        {
            "name": "test",
            "model": "demo",
            "concepts": ["bomb", "axe"],
            "preserve": {"prompts": ["a cat"]},
            "lora": {"rank": 2, "init": init, "targets": ["to_q", "to_k"]},
        }
    )
    parts = load_training_parts(recipe.model)
    embeddings = encode_prompts(recipe, parts)
    trainer = Trainer(recipe, parts.unet, parts.scheduler, embeddings)
    rows = concept_directions(embeddings.erased, embeddings.kept_and_empty, 2)
    for role in (STUDENT, TEACHER):
        for name, factor in trainer.roles.parameters_of(role).items():
            if name.endswith("lora_B"):
                assert not factor.any()
            elif ".to_k." in name:
                assert torch.equal(factor, rows) is (init == "concepts")
            else:
                assert not torch.equal(factor, rows)
    trainer.roles.remove()


@pytest.mark.parametrize("kind", ["sdd", "esd-x"])
def test_quarters_of_a_training_end_with_damping_where_it_sees_prompts(kind):
    results = {}
    for strength in (0.0, 1.0):
        recipe = Recipe.model_validate(
            {
                "name": "test",
                "model": "demo",
                "concepts": ["bomb", "axe"],
                "objective": {"kind": kind} | ({"eta": 1.0} if kind == "esd-x" else {}),
                "ema": {"decay": 0.5 if kind == "sdd" else 0.0},
                "preserve": {"prompts": ["a cat", "a pizza"], "damping": strength},
                "lora": {"targets": ["to_q", "to_k", "to_v"]},
                "rollout": {"steps": 3},
                "training": {"iterations": 8},
            }
        )
        parts = load_training_parts(recipe.model)
        embeddings = encode_prompts(recipe, parts)
        trainer = Trainer(recipe, parts.unet, parts.scheduler, embeddings)
        for _ in range(2):
            trainer.step()
            results[strength, trainer.iteration] = {
                f"{role}.{name}": factor.detach().clone()
                for role in (STUDENT, TEACHER)
                for name, factor in trainer.roles.parameters_of(role).items()
            }
        trainer.roles.remove()
    for name, undamped in results[0.0, 2].items():
        assert torch.equal(results[1.0, 1][name], results[0.0, 1][name])
        if name.endswith((".to_k.lora_A", ".to_v.lora_A")):
            damped = undamped @ damping(embeddings.erased, embeddings.kept_and_empty, 1.0)
            torch.testing.assert_close(results[1.0, 2][name], damped)
            answers = [(embeddings.kept @ x.T).square().mean() for x in (undamped, damped)]
            assert answers[1] < 0.2 * answers[0]
        else:
            assert torch.equal(results[1.0, 2][name], undamped)
