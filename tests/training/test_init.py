"""Adapters that start where the concepts' keys and values are nearest to ∅'s."""

import pytest
import torch
from support.adapters import random_adapter
from support.portable import portable
from support.short_run import short
from support.small import ddim, embeddings, small_unet

from sdd_lora import train
from sdd_lora.adapter.adapter import Adapter
from sdd_lora.checkpoint.portable import adapter_on
from sdd_lora.errors import BadInput
from sdd_lora.io.atomic import sha256_of
from sdd_lora.recipe import Recipe
from sdd_lora.sd.model import load_training_parts
from sdd_lora.training.embeddings import encode_prompts
from sdd_lora.training.init import ClosedForm
from sdd_lora.training.roles import BASE, STUDENT, TEACHER
from sdd_lora.training.trainer import Trainer


def made_up(width: int = 6) -> tuple[torch.Tensor, ...]:
    """Concepts, kept prompts, ∅ of five tokens each, and a matrix that sees them."""
    torch.manual_seed(0)
    shapes = (3, 5, width), (4, 5, width), (1, 5, width), (8, width)
    return tuple(torch.randn(*shape).double() for shape in shapes)


def test_the_change_is_the_least_of_the_sum_in_its_docstring():
    concepts, kept, empty, w = made_up()
    found = (w @ ClosedForm.of(concepts, kept, empty, 0.7).change).requires_grad_()
    assert found.norm() > 1
    erased = (w + found) @ concepts.flatten(0, 1).T - w @ empty[0].T.repeat(1, 3)
    moved = found @ kept.flatten(0, 1).T
    variance = (concepts.square().sum(2).mean() + 0.7 * kept.square().sum(2).mean()) / 6
    ridge = 1e-4 * variance * found.square().sum()
    (erased.square().sum(0).mean() + 0.7 * moved.square().sum(0).mean() + ridge).backward()
    torch.testing.assert_close(found.grad, torch.zeros_like(w), atol=1e-8, rtol=0)


def test_factors_of_full_rank_are_the_whole_change_and_of_less_the_best_of_many():
    concepts, kept, empty, w = made_up()
    solution = ClosedForm.of(concepts, kept, empty, 1.0)
    whole = w @ solution.change

    def excess(product: torch.Tensor) -> float:
        """By how much the sum is over its least."""
        rest = product.double() - whole
        return float((rest @ solution.moment * rest).sum())

    down, up = solution.factors(w, 6)
    assert (down.shape, up.shape, down.dtype) == ((6, 6), (8, 6), torch.float32)
    assert excess(up @ down) < 1e-9
    down, up = solution.factors(w, 2)
    torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0))
    best = excess(up @ down)
    assert 0.01 < best < excess(torch.zeros_like(whole))
    for _ in range(200):
        other = up + 0.1 * torch.randn(8, 2), down + 0.1 * torch.randn(2, 6)
        assert excess(other[0] @ other[1]) > best


def test_what_the_concepts_do_not_have_stays():
    def along(*axes: int) -> torch.Tensor:
        return torch.eye(4)[list(axes)][None].double()

    change = ClosedForm.of(along(0, 1), along(1, 2), along(3, 3), weight=300.0).change
    expected = torch.zeros(4, 4).double()
    expected[0, 0], expected[3, 0] = -1, 1  # the concept's own token becomes ∅'s
    torch.testing.assert_close(change, expected, atol=0.02, rtol=0)


def test_a_rank_that_a_matrix_has_not_is_refused():
    *prompts, w = made_up()
    with pytest.raises(BadInput, match=r"lora.rank: expected 6 at most.*found 7"):
        ClosedForm.of(*prompts, 1.0).factors(w, 7)


def recipe_of(**changes) -> Recipe:
    text = "name: t\nmodel: demo\nconcepts: [bomb, axe]\nlora: {init: closed-form, alpha: 2}\n"
    return Recipe.parse(text, overrides={"objective.variant": "reference"} | changes)


@pytest.mark.parametrize("variant", ["paper", "reference"])
def test_student_and_average_start_there_and_the_base_stays(variant):
    recipe = recipe_of(**{"lora.targets": ["to_q", "to_k"], "objective.variant": variant})
    trainer = Trainer(recipe, small_unet(), ddim(), given := embeddings())
    erased = given.concepts
    if variant == "paper":
        erased = torch.cat([given.concepts, given.joined])
    kept = torch.cat([given.kept, given.empty])
    solution = ClosedForm.of(erased, kept, given.empty, recipe.preserve.weight)
    plain = small_unet()
    for role in (STUDENT, TEACHER):
        for name, layer in trainer.roles.layers.items():
            down, up = (trainer.roles.parameters_of(role)[f"{name}.lora_{x}"] for x in "AB")
            if name.endswith("to_q"):
                assert not up.any()
                continue
            whole = plain.get_submodule(name).weight.double() @ solution.change
            rest = (layer.scaling[role] * up @ down).double() - whole
            assert layer.scaling[role] == 0.5
            assert (rest @ solution.moment * rest).sum() < 0.7 * (
                whole @ solution.moment * whole
            ).sum()
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([500]), given.concepts[:1]
    with torch.no_grad(), trainer.roles.base() as unet:
        torch.testing.assert_close(unet(*inputs).sample, plain(*inputs).sample)
    with trainer.roles.teacher() as unet:
        assert not torch.allclose(unet(*inputs).sample, plain(*inputs).sample, atol=1e-5)


def test_a_packed_base_starts_near_where_a_plain_one_does():
    starts = []
    for precision in ("fp32", "nf4"):
        recipe = recipe_of(**{"training.base_precision": precision, "lora.rank": 8})
        trained = Trainer(recipe, small_unet(), ddim(), embeddings()).roles.parameters_of(STUDENT)
        name = next(name for name in trained if name.endswith("to_v.lora_A"))
        starts.append(trained[name.replace("lora_A", "lora_B")] @ trained[name])
    error = (starts[1] - starts[0]).norm() / starts[0].norm()
    assert 1e-4 < error < 0.3


def test_on_the_embedded_model_it_erases_and_keeps_before_any_training():
    """ε under a concept comes near to ∅'s, under a kept prompt it stays; on noise at t = 800."""
    recipe = Recipe.model_validate(
        {
            "name": "t",
            "model": "demo",
            "concepts": ["a bomb", "a dagger"],
            "objective": {"variant": "reference"},
            "lora": {"rank": 8, "init": "closed-form"},
            "preserve": {"prompts": ["a cat", "a pizza", "a car"], "weight": 1.0},
        }
    )
    parts = load_training_parts("demo")
    trainer = Trainer(recipe, parts.unet, parts.scheduler, given := encode_prompts(recipe, parts))
    z, t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor(800)
    estimates = {}
    for role in (BASE, TEACHER):
        with getattr(trainer.roles, role)() as unet, torch.no_grad():
            for text, prompt in zip(
                ["∅", "bomb", "dagger", "cat", "pizza", "car"],
                [*given.empty, *given.concepts, *given.kept],
                strict=True,
            ):
                estimates[role, text] = unet(z, t, prompt[None]).sample

    def apart(one: tuple[str, str], other: tuple[str, str]) -> float:
        return float((estimates[one] - estimates[other]).norm())

    for concept in ("bomb", "dagger"):
        before = apart((BASE, concept), (BASE, "∅"))
        assert apart((TEACHER, concept), (BASE, "∅")) < 0.4 * before
    for kept in ("cat", "pizza", "car"):
        assert apart((TEACHER, kept), (BASE, kept)) < 0.4 * apart((BASE, kept), (BASE, "∅"))
    trainer.roles.remove()


def test_a_training_goes_on_from_an_adapter(tmp_path, caplog):
    caplog.set_level("INFO")
    start = random_adapter(0.05)
    path = start.save(tmp_path / "start.safetensors", dtype="fp32")
    fields = {"lora.rank": 2, "lora.alpha": 6, "lora.targets": ["to_k", "to_v", "to_out"]}
    recipe = Recipe.parse(
        "name: t\nmodel: demo\nconcepts: [bomb]\nlora: {init: start.safetensors}\n",
        folder=tmp_path,
        overrides=fields,
    )
    trainer = trainer_on_demo(recipe)
    for role in (STUDENT, TEACHER):
        deltas = deltas_of(trainer, role)
        for name, part in start.factors.items():
            torch.testing.assert_close(
                deltas.pop(name), torch.tensor(part.delta(), dtype=torch.float32)
            )
        assert len(deltas) == 16 and not any(delta.any() for delta in deltas.values())
    assert "16 of 48 matrices are not in it, and start at 0" in caplog.text
    assert trainer.started_from.sha256 == sha256_of(path)
    assert trainer.started_from.identity == Adapter.load(path).identity
    assert trainer.step() > 0


def test_a_training_goes_on_from_an_eraser_with_the_models_own_matrices(tmp_path):
    eraser = portable(rank=3)
    eraser.save(tmp_path / "eraser.safetensors", dtype="fp32")
    recipe = recipe_of(**{"lora.init": str(tmp_path / "eraser.safetensors"), "lora.rank": 3})
    trainer = trainer_on_demo(recipe)
    expected = adapter_on(eraser, "demo")
    deltas = deltas_of(trainer, TEACHER)
    assert deltas.keys() == expected.factors.keys() and len(deltas) == 32
    for name, delta in deltas.items():
        torch.testing.assert_close(delta, expected.delta(name), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.rank": 4}, "start.safetensors: has rank 2, found lora.rank 4; expected the same"),
        ({"lora.rank": 2, "lora.targets": ["to_k"]}, r"changes .*to_v \(16 of its 32 matrices\)"),
        ({"lora.init": "gone.safetensors"}, "gone.safetensors: no such file"),
    ],
)
def test_an_adapter_that_the_recipe_does_not_continue_is_refused(tmp_path, changes, message):
    random_adapter(0.05).save(tmp_path / "start.safetensors")
    text = "name: t\nmodel: demo\nconcepts: [bomb]\nlora: {init: start.safetensors}\n"
    recipe = Recipe.parse(text, folder=tmp_path, overrides=changes)
    with pytest.raises(BadInput, match=message):
        trainer_on_demo(recipe)


def test_a_recipes_identity_knows_the_adapters_name_and_no_folder(tmp_path):
    text = "name: t\nmodel: demo\nconcepts: [bomb]\nlora: {init: ./start.safetensors}\n"
    here = Recipe.parse(text, folder=tmp_path)
    there = Recipe.parse(text, folder=tmp_path / "there")
    assert here.lora.starts_from == str(tmp_path / "start.safetensors")
    assert here.sha256 == there.sha256 != Recipe.parse(text.replace("start", "end")).sha256
    assert str(tmp_path) not in str(here.content())
    assert Recipe.parse(here.to_yaml()) == here
    with pytest.raises(BadInput, match=r"lora.init: expected random, .*such as \./closed_form"):
        Recipe.parse(text.replace("./start.safetensors", "closed_form"))


def test_a_training_does_not_resume_from_another_start(tmp_path):
    text = "name: t\nmodel: demo\nconcepts: [bomb]\nlora: {init: start.safetensors, rank: 2}\n"
    recipe = Recipe.parse(text, folder=tmp_path)
    random_adapter(0.05).save(tmp_path / "start.safetensors")
    state = trainer_on_demo(recipe).state_dict()
    random_adapter(0.05, seed=1).save(tmp_path / "start.safetensors")
    with pytest.raises(BadInput, match=r"went on from another file of the name .*start.safe"):
        trainer_on_demo(recipe).load_state_dict(state)


def trainer_on_demo(recipe: Recipe) -> Trainer:
    parts = load_training_parts("demo")
    return Trainer(recipe, parts.unet, parts.scheduler, encode_prompts(recipe, parts))


def deltas_of(trainer: Trainer, role: str) -> dict[str, torch.Tensor]:
    factors = trainer.roles.parameters_of(role)
    return {
        name: (
            layer.scaling[STUDENT] * factors[f"{name}.lora_B"] @ factors[f"{name}.lora_A"]
        ).detach()
        for name, layer in trainer.roles.layers.items()
    }


def test_a_finished_adapter_names_the_one_that_its_training_went_on_from(tmp_path):
    path = random_adapter(0.05).save(tmp_path / "start.safetensors")
    made = train(short(lora__init=str(path), lora__rank=2), tmp_path / "run")
    found = Adapter.load(tmp_path / "run").metadata.started_from
    assert found == made.metadata.started_from
    assert (found.name, found.sha256) == ("random", sha256_of(path))
    assert "from another adapter, random" in (tmp_path / "run" / "README.md").read_text()
