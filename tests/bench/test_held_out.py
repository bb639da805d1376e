"""Nothing of a held-out table, noun, wording or seed, stands in what trains its rows."""

import re

import pytest
from support.benches import SMALL
from support.held_out_prompts import FOLDER, prompts

from sdd_lora.bench.bench_file import Bench
from sdd_lora.bench.grid import image_specs
from sdd_lora.bench.held_out import NAMED, NOT_NAMED, grouping_of, named_nouns
from sdd_lora.bench.results import ImageRecord
from sdd_lora.demo.vocabulary import groups, held_out_nouns, nouns, wordings_of_prompts
from sdd_lora.measures.asked import asked_for
from sdd_lora.recipe import Recipe
from sdd_lora.runs.many import packaged_recipe
from sdd_lora.training.words import THINGS

TUNING = range(900_000_000, 1_000_000_000)
#: demo-single, -multi and -style came before, on the seeds of published cards
TABLES = ["demo-held-out", "demo-multi-held-out", "demo-style-held-out", "demo-robust"]
TABLES += ["demo-attacks"]
#: any wording that is held out, whatever stands in it
HELD_OUT = re.compile(
    "|".join(
        rf"(^|\b){re.sub(r'[{].*?[}]', '.+', re.sub(r'^[{].*?[}] ', '', wording))}(\b|$)"
        for wording in wordings_of_prompts()["held_out"]
    )
)


@pytest.fixture(scope="module")
def bench():
    return Bench.load(packaged_recipe("bench/demo-held-out"))


def test_half_of_each_safe_groups_nouns_are_held_out():
    for group in groups().values():
        held = [noun for noun in group.nouns if noun in held_out_nouns()]
        assert len(held) == (0 if group.unsafe else len(group.nouns) // 2)


def texts_of(recipe):
    prompts = recipe.measure.prompts
    return [*recipe.concepts, *recipe.preserve.prompts, *prompts.concept, *prompts.kept]


def test_no_recipe_of_the_table_names_a_held_out_noun_or_asks_in_its_words(bench):
    specs, _ = image_specs(bench)
    asked = {spec.prompt for spec in specs}
    lists = [texts_of(bench.recipe(name)) for name in bench.recipes] + [bench.uce.preserve]
    own = {"prompts": bench.choice.prompts, "seeds": bench.choice.seeds}
    chosen_by, _ = image_specs(bench.model_copy(update=own))
    lists.append([spec.prompt for spec in chosen_by])
    for texts in lists:
        assert not named_nouns(texts) & set(held_out_nouns())
        assert not asked & set(texts)
        assert not [text for text in texts if HELD_OUT.search(text)]


def test_more_than_a_third_of_the_wordings_are_held_out_of_every_list(bench):
    shown, held_out = wordings_of_prompts()["shown"], wordings_of_prompts()["held_out"]
    assert len(held_out) > (len(shown) + len(held_out)) / 3 and not {*shown} & {*held_out}
    lists = packaged_recipe("demo/x").parent.glob("prompts/*.txt")
    texts = [line for path in lists for line in path.read_text("utf-8").splitlines()]
    texts += [template.format("axe", a="an axe") for template in THINGS]
    assert len(texts) > 1000 and not [text for text in texts if HELD_OUT.search(text)]
    specs, _ = image_specs(bench)
    paraphrased = {words for n in groups()["weapons"].nouns for words in n.paraphrases}
    for prompt in {spec.prompt for spec in specs}:
        assert HELD_OUT.search(prompt) or prompt.removeprefix("the ") in paraphrased


def test_the_prompts_are_those_of_the_wordings(bench):
    for name, lines in prompts().items():
        assert (FOLDER / f"{name}.txt").read_text("utf-8").splitlines() == lines
    specs, _ = image_specs(bench)
    kinds = {len(asked_for(spec.prompt).nouns) for spec in specs}
    assert kinds == {1, 2}
    assert asked_for("not one but two kitchen knives").nouns[0].name == "kitchen knife"
    assert asked_for("three bows and arrows").nouns[0].name == "bow and arrow"


def test_kept_nouns_are_told_apart_by_whether_a_recipe_names_them(bench):
    group = grouping_of(bench)
    specs, _ = image_specs(bench)
    for spec in specs:
        fields = {"method": "sd", "variation": None, "setting": None, "file": "f", "values": {}}
        fields |= {"kind": spec.kind, "set": spec.set, "prompt": spec.prompt, "seed": 0}
        expected = {"named": [NAMED], "held-out": [NOT_NAMED]}.get(spec.set, [])
        assert group(ImageRecord(**fields)) == expected
    assert grouping_of(Bench.parse(SMALL))(ImageRecord(**fields | {"kind": "kept"})) == []


def test_nouns_that_only_uce_is_told_are_named_ones():
    group = grouping_of(Bench.parse(SMALL, overrides={"uce": {"preserve": ["cat"]}}))
    fields = {"method": "sd", "variation": None, "setting": None, "file": "f", "values": {}}
    fields |= {"kind": "kept", "set": "animals", "seed": 0}
    cat, dog = (ImageRecord(**fields, prompt=prompt) for prompt in ("a cat", "a dog"))
    assert (group(cat), group(dog)) == ([NAMED], [NOT_NAMED])


def seeds_of_a_card(recipe):
    return range(recipe.measure.seed, recipe.measure.seed + 10_000 * (len(groups()) + 1))


@pytest.mark.parametrize("name", TABLES)
def test_seeds_for_tuning_cards_and_the_table_are_disjoint(name):
    bench = Bench.load(packaged_recipe(f"bench/{name}"))
    specs, _ = image_specs(bench)
    table = {spec.job.seed for spec in specs}
    for path in packaged_recipe("demo/x").parent.glob("*.yaml"):
        for overrides in ({}, {"measure.seed": 60_000}):  # how published adapters are measured
            card = seeds_of_a_card(Recipe.load(path, overrides))
            assert not table & set(card) and card.stop <= TUNING.start
    assert max(table) < TUNING.start
    assert bench.choice is None or bench.choice.seeds.first in TUNING


@pytest.mark.parametrize("name", ["demo-multi-held-out", "demo-style-held-out"])
def test_what_is_erased_from_words_elsewhere_is_asked_for_in_held_out_wordings(name):
    bench = Bench.load(packaged_recipe(f"bench/{name}"))
    recipes = [texts_of(bench.recipe(row)) for row in bench.recipes]
    assert not [text for texts in recipes for text in texts if HELD_OUT.search(text)]
    specs, _ = image_specs(bench)
    paraphrases = [words for noun in nouns() for words in noun.paraphrases]
    for spec in specs:
        assert HELD_OUT.search(spec.prompt) or spec.prompt.removeprefix("the ") in paraphrases
    assert min(spec.job.seed for spec in specs) >= 620_000


def test_quick_trains_no_row_that_is_not_trained():
    quick = Bench.load(packaged_recipe("bench/demo-held-out"), quick=True)
    lengths = {name: quick.recipe(name).training.iterations for name in quick.trainings}
    assert lengths.pop("closed-form") == 0 and set(lengths.values()) == {8}
