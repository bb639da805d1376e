"""Prompts → embeddings; what does not fit 77 tokens."""

import pytest
import torch

from sdd_lora.errors import BadInput
from sdd_lora.recipe import Recipe
from sdd_lora.sd.model import load_training_parts
from sdd_lora.sd.pipeline import load_pipeline
from sdd_lora.sd.prompts import cut_off, embed, join_concepts, token_count
from sdd_lora.training.embeddings import encode_prompts


@pytest.fixture(scope="module")
def parts():
    return load_training_parts("demo")


def test_embeddings_are_the_text_encoders(parts):
    both = embed(["", "a bomb"], parts.tokenizer, parts.text_encoder)
    assert both.shape == (2, 77, parts.unet.config.cross_attention_dim)
    assert not torch.allclose(both[0], both[1])
    assert torch.allclose(
        both[1:], embed(["a bomb"], parts.tokenizer, parts.text_encoder), atol=1e-5
    )


def test_any_string_tokenises(parts):
    assert token_count(parts.tokenizer, "Zürich 日本 🙂") > 5
    assert parts.tokenizer.decode(parts.tokenizer("a bomb").input_ids[1:-1]).strip() == "a bomb"


def test_few_concepts_are_joined_as_in_the_paper(parts):
    assert join_concepts(["bomb", "axe"], parts.tokenizer) == ["bomb, axe"]


def test_many_concepts_rotate_and_none_is_lost(parts):
    concepts = [f"bomb number {i}" for i in range(60)]
    joined = join_concepts(concepts, parts.tokenizer)
    assert len(joined) > 1
    assert all(token_count(parts.tokenizer, text) <= 77 for text in joined)
    assert ", ".join(joined) == ", ".join(concepts)


def test_what_a_long_prompt_loses_is_said(parts, caplog):
    text = "a cat " * 50 + "and a bomb"
    assert cut_off(parts.tokenizer, text).endswith("and a bomb")
    assert cut_off(parts.tokenizer, "a cat") == ""
    embed([text], parts.tokenizer, parts.text_encoder)
    assert "not read" in caplog.text and "and a bomb" in caplog.text


def test_a_damaged_text_encoder_is_bad_input(parts):
    broken = load_training_parts("demo").text_encoder
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(BadInput, match="not finite"):
        embed(["a bomb"], parts.tokenizer, broken)


def test_a_recipes_clip_skip_reads_prompts_as_a_pipeline_with_it_does(parts):
    texts = ["a bomb", ""]
    whole = embed(texts, parts.tokenizer, parts.text_encoder)
    recipe = Recipe.parse("name: x\nmodel: demo\nconcepts: [a bomb]\nclip_skip: 2")
    found = encode_prompts(recipe, parts)
    encoder = load_pipeline("demo", clip_skip=2).text_encoder
    expected = embed(texts, parts.tokenizer, encoder)
    assert torch.equal(torch.cat([found.concepts, found.empty]), expected)
    assert not torch.allclose(expected, whole)
    assert torch.equal(embed(texts, parts.tokenizer, parts.text_encoder), whole)
    assert recipe.sha256 != recipe.model_copy(update={"clip_skip": None}).sha256
