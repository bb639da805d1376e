"""Attacks on the embedded model: each changes what it should, and nothing else."""

from dataclasses import replace

import pytest
import torch
from support.adapters import random_adapter

from sdd_lora.attacks.base_drawing import drawings
from sdd_lora.attacks.case import Case
from sdd_lora.attacks.inversion import inversion
from sdd_lora.attacks.noise import denoising_loss, frozen, random_points
from sdd_lora.attacks.ring_a_bell import (
    concept_vector,
    named_in,
    ring_a_bell,
    sentence_pairs,
)
from sdd_lora.attacks.settings import Inversion, RingABell, UnlearnDiffAtk, Words
from sdd_lora.attacks.tokens import encoded, free_words, plain_words, token_ids
from sdd_lora.attacks.unlearndiffatk import onto_simplex, sampled_words, unlearndiffatk
from sdd_lora.attacks.words import group_word, group_words, paraphrase, reworded
from sdd_lora.demo.vocabulary import nouns
from sdd_lora.errors import BadInput
from sdd_lora.generation.sampling import Sampling
from sdd_lora.recipe import Recipe
from sdd_lora.runs.many import packaged_recipe
from sdd_lora.sd.pipeline import load_pipeline

PROMPT = "a drawing of an axe, pencil sketch"


@pytest.fixture(scope="module")
def base():
    return frozen(load_pipeline("demo", device="cpu"))


@pytest.fixture(scope="module")
def case(base):
    protected = frozen(load_pipeline("demo", [(random_adapter(0.3), 1.0)], device="cpu"))
    return Case(protected, base, ["axe", "bomb"], PROMPT, 7, Sampling(2, 3.0))


def parameters(pipeline):
    parts = (pipeline.unet, pipeline.text_encoder)
    return [p.detach().clone() for part in parts for p in part.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# words


def test_paraphrases_come_from_outside_the_recipe(case):
    assert paraphrase(case, Words()).prompt == "a drawing of a chopper tool, pencil sketch"
    assert group_word(case, Words()).prompt == "a drawing of a weapon, pencil sketch"
    for recipe in map(Recipe.load, sorted(packaged_recipe("demo/x").parent.glob("*.yaml"))):
        trained = {*recipe.concepts, *recipe.preserve.prompts}
        told = [p for noun in nouns() for p in noun.paraphrases]
        assert told and not [p for p in told if any(p in text for text in trained)]


def test_words_come_in_the_vocabularys_order():
    erased = [noun.names[0] for noun in nouns()]
    names = [name for noun in nouns() for name in noun.names]
    assert list(group_words(erased, Words())) == names


def test_words_keep_the_rest_of_the_prompt_and_are_chosen_by_seed():
    words = {"axe": ["hewer", "old cleaver"], "pole axe": ["halberd"]}
    assert reworded("an axe and an axe", 1, words) == "an old cleaver and an axe"
    assert reworded("the axe", 0, words) == "the hewer"
    assert reworded("a pole axe", 0, words) == "a halberd"
    assert reworded("a drawing of an axe", 0, {"axe": ["gore"]}) == "a drawing of gore"
    with pytest.raises(BadInput, match="no other words for 'an axeman': expected one of axe"):
        reworded("an axeman", 0, {"axe": ["x"]})


# tokens


def test_plain_words_are_read_back_one_by_one(base):
    words = plain_words(base.tokenizer, without=["bow and arrow"])
    assert {"dagger", "weapon"} <= set(words) and not {"bow", "arrow", "and"} & set(words)
    ids = base.tokenizer(" ".join(words[:70])).input_ids[1:-1]
    assert base.tokenizer.convert_ids_to_tokens(ids) == [f"{word}</w>" for word in words[:70]]


def test_a_free_word_with_its_own_embedding_changes_nothing(base):
    ids = token_ids(base, [PROMPT, "a cat"])
    table = base.text_encoder.get_input_embeddings().weight
    usual = encoded(base, ids)
    with free_words(base.text_encoder, 2, table[ids[:, 2:4]]):
        assert torch.equal(encoded(base, ids), usual)
    with free_words(base.text_encoder, 2, torch.zeros(1, table.shape[1])):
        changed = encoded(base, ids)
    assert torch.equal(changed[:, :2], usual[:, :2])  # causal: what comes before stays
    assert not torch.isclose(changed[:, 2:], usual[:, 2:]).all(-1).any()
    assert torch.equal(encoded(base, ids), usual)


# Ring-A-Bell


def test_ring_a_bells_search_comes_nearer_to_its_goal(case):
    settings = RingABell(population=16, generations=25, mutation=0.5)
    found = ring_a_bell(case, settings)
    assert found.after < 0.95 * found.before and not found.words
    words = found.prompt.split()
    assert len(words) == 16 and not {"axe", "bomb"} & set(words)
    pairs = sentence_pairs(named_in(case.prompt, case.concepts))
    goal = encoded(case.base, token_ids(case.base, [PROMPT])).flatten(1)
    goal = goal + 3.0 * concept_vector(case.base, pairs)
    reached = encoded(case.base, token_ids(case.base, [found.prompt])).flatten(1)
    assert (reached - goal).square().sum().item() == pytest.approx(found.after, rel=1e-4)
    assert ring_a_bell(case, settings) == found


def test_the_vector_is_of_the_concepts_that_the_prompt_names():
    concepts = ["axe", "bow and arrow", "pill"]
    assert named_in("an axe on a pillow", concepts) == ["axe"]
    assert named_in("A pill and an Axe", concepts) == ["axe", "pill"]
    assert named_in("a weapon", concepts) == concepts
    assert named_in("a C++ sticker", ["C++", "bomb"]) == ["C++"]


def test_a_concept_vector_is_the_mean_difference_of_its_pairs(base):
    def f(text):
        return encoded(base, token_ids(base, [text])).flatten(1)

    pairs = [("a picture of a bomb", "a picture"), ("a bomb", "a cat")]
    expected = (f(pairs[0][0]) - f(pairs[0][1]) + f(pairs[1][0]) - f(pairs[1][1])) / 2
    torch.testing.assert_close(concept_vector(base, pairs), expected)


# concept inversion


def test_inversion_lowers_its_loss_and_changes_the_new_word_alone(case):
    before = parameters(case.protected), parameters(case.base)
    found = inversion(case, Inversion(pictures=2, steps=12, learning_rate=0.05))
    assert found.after < found.before
    assert same(parameters(case.protected), before[0]) and same(parameters(case.base), before[1])
    assert all(p.grad is None for p in case.protected.unet.parameters())
    assert found.prompt == "a picture of <attack-0>"
    ((name, vector),) = found.words.items()
    assert vector.shape == (128,) and not vector.requires_grad

    pipeline = load_pipeline("demo", device="cpu")
    known = pipeline.text_encoder.get_input_embeddings().weight.detach().clone()
    pipeline.load_textual_inversion([vector], token=[name])
    table = pipeline.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[: len(known)], known) and torch.equal(table[len(known)], vector)
    # what is drawn is what was learnt with
    with free_words(case.protected.text_encoder, 4, vector[None]):
        learnt = encoded(case.protected, token_ids(case.protected, ["a picture of a"]))
    torch.testing.assert_close(pipeline.encode_prompt(found.prompt, "cpu", 1, False)[0], learnt)


def test_inversion_of_no_words_starts_from_a_word(case):
    found = inversion(replace(case, prompt=""), Inversion(pictures=1, steps=1))
    assert torch.isfinite(found.words["<attack-0>"]).all() and found.after < 10


def test_the_pictures_are_the_bases_from_seeds_of_their_own(case):
    two = drawings(case, 2)
    assert two.shape == (2, 4, 16, 16) and not torch.isclose(two[0], two[1]).all()
    usual = case.base(
        [PROMPT],
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=[case.generator()],
        output_type="latent",
    ).images
    assert not torch.isclose(two, usual).all(dim=(1, 2, 3)).any()
    assert torch.equal(drawings(case, 2), two)
    wide = replace(case, sampling=replace(case.sampling, width=128))
    assert drawings(wide, 1).shape == (1, 4, 16, 32)


# UnlearnDiffAtk


def test_unlearndiffatk_finds_words_better_than_random_ones(case):
    before = parameters(case.protected)
    found = unlearndiffatk(case, UnlearnDiffAtk(words=3, steps=12, points=4, learning_rate=0.1))
    assert found.after < found.before
    assert same(parameters(case.protected), before)
    words = plain_words(case.protected.tokenizer)
    *prefix, rest = found.prompt.split(" ", 3)
    assert rest == PROMPT and set(prefix) <= set(words)

    # at noise that the search has not seen, against the mean of random words
    latents = drawings(case, 1).repeat(16, 1, 1, 1)
    points = random_points(case.protected, latents, torch.Generator().manual_seed(99))

    @torch.no_grad()
    def loss(text):
        embeddings = encoded(case.protected, token_ids(case.protected, [text] * 16))
        return denoising_loss(case.protected, latents, embeddings, points).item()

    chosen = torch.randint(len(words), (4, 3), generator=torch.Generator().manual_seed(3))
    texts = [" ".join([*(words[i] for i in row.tolist()), PROMPT]) for row in chosen]
    assert loss(found.prompt) < sum(map(loss, texts)) / len(texts)


def test_the_simplex_is_the_nearest_one():
    rows = torch.tensor([[0.2, 0.3, 0.5], [2.0, 0.0, 0.0], [0.5, 0.9, -3.0], [0.0, 0.0, 0.0]])
    expected = [[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.3, 0.7, 0.0], [1 / 3, 1 / 3, 1 / 3]]
    torch.testing.assert_close(onto_simplex(rows), torch.tensor(expected))


def test_sampled_words_are_single_words_whose_gradient_reaches_the_chances():
    chances = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]], requires_grad=True)
    drawn = sampled_words(chances, 64, torch.Generator().manual_seed(0))
    assert drawn.shape == (64, 2, 3) and drawn.sum(2).eq(1).all()
    assert drawn[:, 0, 1].eq(1).all() and 16 < drawn[:, 1, 0].sum() < 48
    weights = torch.arange(6.0).view(2, 3)
    (drawn * weights).sum().backward()
    torch.testing.assert_close(chances.grad, 64 * weights)
