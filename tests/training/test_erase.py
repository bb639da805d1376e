"""Erasers from words alone, on the embedded model's text encoder."""

import numpy as np
import pytest

from sdd_lora import erase, sd1, stack
from sdd_lora.adapter.adapter import Adapter
from sdd_lora.checkpoint.portable import adapter_on
from sdd_lora.errors import BadInput
from sdd_lora.recipe import Recipe
from sdd_lora.runs.measure import measure
from sdd_lora.runs.train import train
from sdd_lora.sd.model import load_text_parts, load_training_parts
from sdd_lora.sd.pipeline import load_pipeline
from sdd_lora.training import erase as module
from sdd_lora.training import words
from sdd_lora.training.embeddings import encode_prompts
from sdd_lora.training.erase import made_for, solve


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDD_LORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def change(adapter: Adapter) -> np.ndarray:
    return adapter.factors[sd1.EMBEDDINGS].delta()


def moved(adapter: Adapter, prompt: str) -> float:
    """How far a prompt's embeddings move, beside how far they are from the empty prompt's."""
    text = load_text_parts("demo")
    embedded, empty = module._embed(text, [prompt, ""]).numpy()
    return np.linalg.norm(embedded @ change(adapter).T) / np.linalg.norm(embedded - empty)


def test_a_concept_moves_in_any_wording_and_other_words_stay():
    erased = erase(["axe"])
    for prompt in ("an axe", "axe emoji", "a sticker of an axe, fluent style"):
        assert moved(erased.adapter, prompt) > 0.4
    for prompt in ("a cat", "a guitar, fluent style", "a small picture of a tree"):
        assert moved(erased.adapter, prompt) < 0.2
    assert not {"cat", "tree", "guitar"} & set(erased.near)


def test_words_too_near_are_named_and_go_unless_they_are_kept():
    erased = erase(["kitchen knife", "dagger", "bomb"])
    assert {"blade", "explosive"} <= set(erased.near)
    assert "pizza" not in erased.near
    kept = erase(["kitchen knife", "dagger", "bomb"], keep=["Blade"])
    assert "blade" not in kept.near
    assert moved(kept.adapter, "a blade") < 0.7 * moved(erased.adapter, "a blade")


def test_into_another_concept():
    text = load_text_parts("demo")
    axe, flower = module._embed(text, ["a photo of an axe", "a photo of a sunflower"]).numpy()
    step = change(erase(["axe"], into="sunflower", rank=12).adapter)
    assert np.linalg.norm(axe + axe @ step.T - flower) < 0.6 * np.linalg.norm(axe - flower)


def test_the_same_words_give_the_same_eraser_with_and_without_the_cache(tmp_path, monkeypatch):
    one = erase(["axe"]).adapter
    assert erase(["axe"]).adapter.identity == one.identity
    monkeypatch.setenv("SDD_LORA_CACHE", str(tmp_path / "empty"))
    assert erase(["axe"]).adapter.identity == one.identity


def test_one_eraser_solved_is_itself_and_several_are_the_eraser_of_all(tmp_path):
    one, other = erase(["axe"]), erase(["bomb"], keep=["skull"])
    path = one.adapter.save(tmp_path / "one.safetensors")
    assert solve([Adapter.load(path)]).adapter.identity == one.adapter.identity
    both = solve([one.adapter, other.adapter])
    assert both.adapter.metadata.concepts == ["axe", "bomb"]
    assert both.adapter.identity == erase(["axe", "bomb"], keep=["skull"]).adapter.identity


def test_only_erasers_from_words_are_solved():
    adapter = erase(["axe"]).adapter
    for metadata in ({"name": "bare"}, {"name": "of nothing", "words": {}}):
        bare = Adapter(adapter.factors, metadata)
        with pytest.raises(BadInput, match="words"):
            solve([bare, bare])
    with pytest.raises(BadInput, match="into"):
        solve([adapter, erase(["bomb"], into="cat").adapter])


@pytest.mark.parametrize(
    ("concepts", "options", "told"),
    [
        ([""], {}, "reads nothing"),
        (["axe", "  "], {}, "reads nothing"),
        (["very " * 60 + "sharp axe"], {}, "too long"),
        ([], {}, "concepts"),
        (["axe"], {"keep": ["axe"]}, "axe"),
        (["Axe"], {"keep": ["axe"]}, "Axe"),
        (["hot  dog"], {"into": "Hot dog"}, "hot"),
        (["axe"], {"into": "axe"}, "axe"),
        (["axe"], {"rank": 129}, "128"),
    ],
)
def test_what_can_t_be_erased_is_told(concepts, options, told):
    with pytest.raises(BadInput, match=told):
        erase(concepts, **options)


def test_unknown_words_and_other_scripts_are_read_byte_by_byte():
    assert erase(["zyxwv", "斧"]).adapter.rank >= 1


def test_the_vocabulary_is_whole_words_the_most_frequent_first():
    tokenizer = load_text_parts("demo").tokenizer
    found = words.whole_words(tokenizer, 50)
    assert len(found) == 50 and found[:2] == ["the", "ing"]
    assert all(len(tokenizer(w, add_special_tokens=False).input_ids) == 1 for w in found)
    prompts = words.contexts(found, 10)
    assert prompts == words.contexts(found, 10) and len(prompts) == 15
    assert all(word in text for text, members in prompts for word in members)


def test_for_another_text_encoder_it_is_told_and_made_anew(tmp_path, caplog):
    pipeline = load_pipeline("demo")
    state = {k: v * 1.01 for k, v in pipeline.text_encoder.state_dict().items()}
    pipeline.text_encoder.load_state_dict(state)
    pipeline.save_pretrained(tmp_path / "other")
    other, eraser = str(tmp_path / "other"), erase(["axe"]).adapter
    assert made_for(eraser, "demo") is eraser and not caplog.text
    assert made_for(eraser, other) is eraser and "another text encoder" in caplog.text
    anew = made_for(eraser, other, resolve=True)
    assert anew.metadata.words.text_encoder == load_text_parts(other).fingerprint
    assert anew.identity == erase(["axe"], other).adapter.identity != eraser.identity
    assert made_for(anew, other, resolve=True) is anew
    with pytest.raises(BadInput, match="scaled, stacked or resized"):
        made_for(stack([(eraser, 0.5)]), other, resolve=True)


def test_words_beyond_the_most_frequent_are_read_in_short(monkeypatch):
    read = {}
    embed = module._embed

    def counting(text, prompts, positions=tuple(module._POSITIONS)):
        read[len(positions)] = read.get(len(positions), 0) + len(prompts)
        return embed(text, prompts, positions)

    monkeypatch.setattr(module, "_embed", counting)
    monkeypatch.setattr(module, "_WHOLE", 120)
    text = load_text_parts("demo")
    known = module._Vocabulary.of(text, 150)
    assert read == {len(module._POSITIONS): 120 + 900, module._FIRST: 30}
    assert known.first.shape[:2] == (1050, module._FIRST) and len(known.rest) == 1020
    less = known.without({known.words[0], known.words[130]})
    assert len(less.words) == 148 and len(less.rest) < 1020
    whole = embed(text, words.fill("{a}", known.words[120:121]), range(module._FIRST))
    assert (known.first[120] - whole[0]).norm() < 0.02 * whole.norm()  # bf16 products


def test_a_training_starts_from_words_and_stays_portable(tmp_path):
    fields = {
        "name": "axe",
        "model": "demo",
        "concepts": ["axe"],
        "wordings": True,
        "objective": {"variant": "reference"},
        "lora": {"rank": 2, "alpha": 6, "init": "words"},
        "preserve": {"vocabulary": 20},
        "rollout": {"steps": 3, "batch": 2},
    }
    start, eraser = {"training": {"iterations": 0}}, erase(["axe"], rank=2).adapter
    shared = Recipe.model_validate(fields | start | {"parameters": "embeddings"})
    adapter = train(shared, tmp_path / "start")
    assert np.allclose(change(adapter), change(eraser), atol=1e-3) and adapter.is_portable
    apart = train(Recipe.model_validate(fields | start), tmp_path / "apart")
    expected = adapter_on(eraser, "demo")
    for name, factors in expected.factors.items():
        assert np.allclose(apart.factors[name].delta(), factors.delta(), atol=2e-3)
    steps = Recipe.model_validate(
        fields | {"parameters": "embeddings", "training": {"iterations": 2}}
    )
    trained = train(steps, tmp_path / "on")
    assert 0 < np.abs(change(trained) - change(adapter)).max() < 0.1
    assert trained.metadata.words is None  # not made again from its words: it was trained


def test_the_loss_has_every_wording_and_kept_words_none_that_is_near():
    fields = {"name": "axe", "model": "demo", "concepts": ["axe"], "preserve": {"vocabulary": 9}}
    parts = load_training_parts("demo")
    plain = encode_prompts(Recipe.model_validate(fields), parts)
    worded = encode_prompts(Recipe.model_validate(fields | {"wordings": True}), parts)
    assert len(plain.concepts) == 1 and len(plain.kept) == 9 and plain.eraser is None
    assert len(worded.concepts) == len(words.THINGS) + 3 * len(words.COMPANY)
    known = words.whole_words(parts.tokenizer, 100)
    kept = words.kept_prompts(known, {known[3]}, 10_000)
    assert len(kept) > 300 and not any(known[3] in prompt.split() for prompt in kept)
    fields["concepts"] = ["axe, noto style"]
    styled = encode_prompts(Recipe.model_validate(fields), parts)
    assert (styled.kept == plain.kept).all()  # the axe's words are left out, not the style's


def test_an_eraser_is_measured_as_any_adapter(tmp_path):
    prompts = {"concept": ["an axe"], "kept": ["a cat"]}
    recipe = Recipe(
        name="axe",
        model="demo",
        concepts=["axe"],
        measure={"prompts": prompts, "images": 1, "steps": 2, "detector": "judge"},
    )
    metrics = measure(erase(["axe"]).adapter, recipe, tmp_path / "run")
    assert {row["name"] for row in metrics["measures"]} == {"concept drawn", "noun kept"}
    saved = Adapter.load(tmp_path / "run")
    assert saved.is_portable and len(saved.metadata.measures) == 2
    assert "rank 1" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (["axe"], {"rank": -1}, "rank: expected 1 to 128.*found -1"),
        (["axe"], {"vocabulary": -1}, "vocabulary: expected 1 word or more, found -1"),
        ("<|endoftext|>", {}, r"concepts '<\|endoftext\|>': the model reads nothing"),
    ],
)
def test_numbers_that_can_not_be_are_refused_and_a_text_is_no_list_of_letters(
    words, options, message
):
    with pytest.raises(BadInput, match=message):
        erase(words, **options)
