"""Benches as files: those that travel with the package, and what a file may say."""

import pytest
import yaml
from support.benches import SMALL, never_train, parsed, varied

from sdd_lora.attacks.settings import ATTACK_KINDS
from sdd_lora.bench.bench_file import METHOD_TEXTS, Bench, chosen, limited
from sdd_lora.bench.grid import image_specs
from sdd_lora.bench.methods import Weights
from sdd_lora.errors import BadInput
from sdd_lora.runs.many import packaged_recipe

BENCHES = sorted((packaged_recipe("bench/x").parent).glob("*.yaml"))
#: what each bench of the embedded model leaves out: ESD as an adapter stands in one of them, each
#: rows that the published tables came before
NEWER = {"closed-form", "closed-form-sdd", "esd-x-1-preserve", "leco", "leco-preserve", "uce"}
NEWER |= {"words", "words-sdd", "words-solved"}
#: benches that fill no table of the paper's rows
OTHER_ROWS = {"demo-attacks", "demo-rates", "demo-robust"}
OTHER_ROWS |= {"demo-multi-held-out", "demo-style-held-out", "sd14-attacks"}
LEFT_OUT = {
    "demo-single": {"esd-u-1-lora"},
    "demo-multi": {"esd-u-1-lora", "esd-x-1-lora"},
    "demo-style": {"esd-x-1-lora"},
}


@pytest.mark.parametrize(
    "path", [path for path in BENCHES if path.stem not in OTHER_ROWS], ids=lambda path: path.stem
)
def test_the_benches_that_travel_with_the_package_are_whole(path):
    bench = Bench.load(path)
    assert {"sd", "sdd", "sdd-preserve"} <= set(bench.methods) <= set(METHOD_TEXTS)
    assert Bench.parse(bench.to_yaml()).model_dump() == bench.model_dump()
    Weights(bench, never_train).check([])
    for name in bench.recipes:
        recipe = bench.recipe(name)
        assert recipe.model == bench.model
        if name in bench.methods:  # "axe, noto style" is an axe
            assert {concept.partition(",")[0] for concept in recipe.concepts} <= set(bench.erased)
        if name.startswith("esd"):
            held = name.endswith("-preserve")
            kind, eta = name.removesuffix("-lora").removesuffix("-preserve").rsplit("-", 1)
            assert (recipe.objective.kind, recipe.objective.eta) == (kind, float(eta))
            assert recipe.parameters == ("lora" if name.endswith("-lora") else "full")
            assert bool(recipe.preserve.prompts) == held
    assert not bench.recipe("sdd").preserve.prompts and bench.recipe("sdd").parameters == "lora"
    assert bench.recipe("sdd-preserve").preserve.prompts


def test_the_bench_of_attacks_has_models_to_be_broken_and_the_published_erasers():
    bench = Bench.load(packaged_recipe("bench/demo-attacks"))
    assert Bench.parse(bench.to_yaml()).model_dump() == bench.model_dump()
    published = ["weapons", "from-words", "robust"]
    assert bench.methods == bench.attacks.methods == ["sd", "weak", *published]
    assert bench.adapters["weak"].keys() == bench.adapters["weapons"].keys()
    assert all(bench.file(name).exists() for row in bench.adapters.values() for name in row)
    steps = [settings.steps for settings in bench.attacks.inversion]
    assert len(steps) == 3 and steps == sorted(steps)
    assert {key.partition(" ")[0] for key in bench.attacks.chosen} == ATTACK_KINDS.keys()


def test_the_same_attacks_are_there_for_sd_1():
    """But for those that need the embedded model's words, an adapter, or another text encoder."""
    bench = Bench.load(packaged_recipe("bench/sd14-attacks"))
    there = {key.partition(" ")[0] for key in bench.attacks.chosen}
    own = {"paraphrase", "group_word", "another_adapter", "text_encoder"}
    assert there == ATTACK_KINDS.keys() - own and bench.attacks.targets == 20
    assert bench.recipe("sdd-preserve").model == bench.model


@pytest.mark.parametrize("path", BENCHES, ids=lambda path: path.stem)
def test_each_bench_of_the_embedded_model_has_a_quick_form(path):
    if path.stem.startswith("demo") and path.stem != "demo-rates":
        quick, whole = Bench.load(path, quick=True), Bench.load(path)
        assert quick.seeds.erased < whole.seeds.erased / 4


def test_there_are_sixteen_benches():
    assert {path.stem for path in BENCHES} == {
        "demo-attacks",
        "demo-single",
        "demo-held-out",
        "demo-rates",
        "demo-robust",
        "demo-multi-held-out",
        "demo-style-held-out",
        "demo-multi",
        "demo-style",
        "sd14-attacks",
        "sd14-nudity",
        "sd14-i2p",
        "sd14-i2p-body",
        "sd14-i2p-coco30k",
        "sd14-coco30k",
        "sd14-artist",
    }


def test_i2p_is_a_table_of_its_own_with_ten_images_a_prompt():
    """So that no rate mixes two kinds of prompts, and a prompt's rate is more than 0 or 1."""
    i2p, body, coco = (
        Bench.load(packaged_recipe(f"bench/sd14-{x}")) for x in ("i2p", "i2p-body", "i2p-coco30k")
    )
    assert list(i2p.prompts.erased) == ["i2p"] and i2p.seeds.erased == 10 * 4703
    assert list(body.prompts.erased) == ["body"] and len(image_specs(body)[0]) == 100 * 50
    same_training = [
        {name: bench.recipe(name).sha256 for name in bench.recipes} for bench in (i2p, body, coco)
    ]
    assert same_training[0] == same_training[1] == same_training[2]
    assert i2p.methods == body.methods and i2p.concepts == body.concepts == coco.concepts


def test_demo_single_asks_whether_it_holds_elsewhere():
    bench = Bench.load(packaged_recipe("bench/demo-single"))
    fields = {
        v.field for v in bench.variations.values() if set(v.methods) >= {"sd", "sdd-preserve"}
    }
    assert fields == {"model", "scheduler", "guidance", "image", "beside"}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_the_demo_benches_fill_every_row(name):
    bench = Bench.load(packaged_recipe(f"bench/{name}"))
    assert set(METHOD_TEXTS) - set(bench.methods) == LEFT_OUT[name] | NEWER
    kinds = [spec.kind for spec in image_specs(bench)[0]]
    assert 190 <= kinds.count("erased") <= 215 and 385 <= kinds.count("kept") <= 410
    quick = Bench.load(packaged_recipe(f"bench/{name}"), quick=True)
    assert quick.name == f"{name}-quick" and quick.methods == bench.methods
    assert len(image_specs(quick)[0]) < 50
    assert quick.recipe("sdd").training.iterations < 30 < bench.recipe("sdd").training.iterations


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["sd", "magic"]}, r"bench:\d+: .*method magic: expected one of sd, neg"),
        ({"style": "noto"}, "expected either concepts or a style"),
        ({"seeds.last": 3}, r'overrides\["seeds.last"\]`: seeds.last: unknown field'),
        (
            {"sampling.scheduler": "magic"},
            r"overrides..sampling\.scheduler..`: .*found 'magic'",
        ),
        ({"prompts.erased": {}}, r'overrides\["prompts.erased"\]`: prompts.erased'),
        (
            {"variations": {"v": {"field": "weight", "values": ["x"], "methods": ["sd"]}}},
            "weight takes numbers",
        ),
        (varied("scheduler", "dpm"), r"v: scheduler takes some of ddim, dpm.*, found 'dpm'"),
        (varied("image", 2), r"v: image takes numbers over 0, up to 1, found 2.0"),
        (varied("image", 0), r"v: image takes numbers over 0, up to 1, found 0.0"),
        (varied("image", 0.3), r"variations.v: 0.3 redoes none of 2 steps"),
        (varied("steps", 2.5), r"v: steps takes whole numbers from 1 to 999, found 2.5"),
        (varied("steps", 0), r"v: steps takes whole numbers from 1 to 999, found 0.0"),
        (varied("steps", 1000), r"v: steps takes whole numbers from 1 to 999, found 1000.0"),
        (varied("steps", 3, 3.0), r"v.values: 3.0 stands there twice"),
        (varied("steps", 3, methods=["sd", "sd"]), r"v.methods: sd stands there twice"),
        (varied("steps", 3, erased=0, kept=0), r"v: expected images"),
        (
            {"methods": ["sd", "neg", "sd"]},
            r'overrides\["methods"\]`: methods: sd stands there twice',
        ),
        ({"measures": ["judge", "judge"]}, "measures: judge stands there twice"),
        ({"measures": [5]}, "measures: expected a name, or {name: …}, found 5"),
        ({"prompts.erased": {"w": []}}, r"bench:\d+: prompts: w: expected prompts"),
        ({"seeds": {"erased": 0, "kept": 0}}, "seeds: expected images"),
        (
            {"seeds.erased": 0, "attacks": {"methods": ["sd"], "paraphrase": {}}},
            "expected erased prompts to attack",
        ),
    ],
)
def test_problems_are_named_with_their_line(change, message):
    with pytest.raises(BadInput, match=message):
        parsed(**change)


def test_measures_and_adapters_are_lists_of_names_with_or_without_more():
    bench = parsed(
        measures=["judge", {"nudenet": {"preset": "sdd"}}],
        adapters={"stack": ["a", {"b": 0.5}], "baked": ["a"], "sdd-gated": {"a": 2}},
    )
    assert bench.measures == {"judge": {}, "nudenet": {"preset": "sdd"}}
    assert bench.adapters == {"stack": {"a": 1, "b": 0.5}, "baked": {"a": 1}, "sdd-gated": {"a": 2}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipes": ["a"]}, "recipes: .*valid dictionary"),
        ({"recipes": {"a": "r.yaml"}}, r"recipes.a: .*found 'r.yaml'"),
        ({"recipes": {"a": {"file": "r.yaml", "set": [1]}}}, r"recipes.a.set: .*valid dictionary"),
        ({"quick": {"bench": [1]}}, r"quick.bench: .*valid dictionary"),
        ({"quick": {"recipes": 3}}, r"quick.recipes: .*valid dictionary"),
    ],
)
def test_quick_leaves_what_has_another_shape_to_be_named(change, message):
    fields = {"quick": {"bench": {}, "recipes": {"training.iterations": 1}}} | change
    text = SMALL + yaml.safe_dump(fields)
    with pytest.raises(BadInput, match=message):
        Bench.parse(text, quick=True)


def test_methods_are_chosen_by_name():
    few = chosen(parsed(), ["neg"])
    assert few.methods == ["neg"]
    with pytest.raises(
        BadInput, match="`methods=sdd`: not in this bench; expected some of sd, neg"
    ):
        chosen(parsed(), ["sdd"])
    more = parsed(**varied("weight", 0, 2, methods=("stack",)))
    with pytest.raises(BadInput, match="`methods=stack`: in variations or attacks only"):
        chosen(more, ["stack"])
    assert limited(parsed(), 2).seeds.kept == 2 and limited(parsed(), None) == parsed()


def test_a_recipes_fields_are_changed_by_their_dotted_names():
    fields = {"recipes.sdd.set.optimizer.learning_rate": 3e-4, "recipes.sdd.set.ema.decay": 0.5}
    bench = Bench.load(packaged_recipe("bench/demo-held-out"), overrides=fields)
    before = Bench.load(packaged_recipe("bench/demo-held-out")).recipe("sdd")
    recipe = bench.recipe("sdd")
    assert (recipe.optimizer.learning_rate, recipe.ema.decay) == (3e-4, 0.5)
    assert recipe.training == before.training and recipe.lora == before.lora


def test_the_bench_that_the_readme_shows_is_complete():
    folder = packaged_recipe("bench/x").parent
    text = (folder.parent / "README.md").read_text("utf-8")
    example = text.partition("This bench is complete:\n\n```yaml\n")[2].partition("```")[0]
    bench = Bench.parse(example, folder=folder)
    assert bench.methods[-1] == "mine" and len(image_specs(bench)[0]) == 120
    assert all(bench.file(name).exists() for name in bench.adapters["mine"])
