"""Recipes: strict, typed, every error at once with its line."""

from pathlib import Path

import pytest
import yaml
from support.recipe_reference import README, renewed

from sdd_lora.cli.common import parse_overrides
from sdd_lora.errors import BadInput
from sdd_lora.recipe import Lora, Recipe, RolloutSettings

RECIPES = Path(__file__).parent.parent / "recipes"
#: of rollout: the earlier names, and those of now
NAMES = [("points", "prompts"), ("timesteps_per_trajectory", "prompts_per_latent")]
MINIMAL = "name: mine\nmodel: demo\nconcepts: [bomb]\n"


def test_a_minimal_recipe_gets_the_papers_defaults():
    recipe = Recipe.parse(MINIMAL)
    assert recipe.training.iterations == 1500
    assert recipe.ema.decay == 0.999 and not recipe.ema.warmup
    assert recipe.objective.guidance_scale == 3.0
    assert recipe.rollout.steps == 50 and recipe.rollout.batch == 1


def test_the_written_recipe_is_complete_and_reads_back_equal():
    recipe = Recipe.parse(MINIMAL + "preset: demo\n")
    again = Recipe.parse(recipe.to_yaml())
    assert again == recipe
    assert again.sha256 == recipe.sha256


def test_all_errors_come_at_once_with_their_lines():
    text = (
        "name: a b\nmodel: demo\nconcepts: []\nlora:\n  rank: -1\n  rnak: 2\nsurprise: 1\n"
        "ema:\n  decay: much\n"
    )
    with pytest.raises(BadInput) as caught:
        Recipe.parse(text, where="r.yaml")
    message = str(caught.value)
    assert message.count("\n") == 5
    for part in (
        "r.yaml:1: name",
        "r.yaml:3: concepts",
        "r.yaml:5: lora.rank",
        "r.yaml:6: lora.rnak: unknown field; did you mean lora.rank?",
        "r.yaml:7: surprise: unknown field; expected one of name, model",
        "r.yaml:9: ema.decay",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("conepts: [bomb]", "concepts"),
        ("lr: 1e-3", "optimizer.learning_rate"),
        ("optimizer: {lr: 1e-3}", "optimizer.learning_rate"),
        ("rank: 8", "lora.rank"),
        ("training: {learning_rat: 1e-3}", "optimizer.learning_rate"),
        ("trainign: {iterations: 3}", "training"),
        ("lora: {network_dim: 8}", "lora.rank"),
    ],
)
def test_an_unknown_field_is_told_which_one_was_meant(written, meant):
    with pytest.raises(BadInput, match=f"did you mean {meant}"):
        Recipe.parse(MINIMAL + written + "\n")


def test_what_an_override_got_wrong_is_blamed_on_it_and_the_rest_on_the_file():
    overrides = {"lora.rnak": 2, "trainign.iterations": 3, "ema.decay": "much", "rollout.steps": 1}
    with pytest.raises(BadInput) as caught:
        Recipe.parse(MINIMAL + "lora: {rank: 0}\n", "r.yaml", overrides=overrides)
    lines = str(caught.value).splitlines()
    blamed = {line.partition(": ")[0] for line in lines}
    assert blamed == {"r.yaml:4", *(f'`overrides["{name}"]`' for name in overrides)}


@pytest.mark.parametrize("name", ["judge", "nudenet", "open_nsfw", "none"])
def test_detectors(name):
    assert Recipe.parse(MINIMAL + f"measure: {{detector: {name}}}\n").measure.detector == name


def test_esd_keeps_no_average_and_has_an_eta():
    recipe = Recipe.parse(MINIMAL + "preset: demo\nobjective: {kind: esd-x}\n")
    assert (recipe.objective.eta, recipe.ema.decay, recipe.ema.warmup) == (1.0, 0.0, False)
    assert recipe.rollout.steps == 10  # the preset's other fields stay
    written = Recipe.parse(MINIMAL + "objective: {kind: esd-x, eta: 3}\nema: {decay: 0}\n")
    assert written.objective.eta == 3.0
    for again in (recipe, written):
        assert Recipe.parse(again.to_yaml()) == again


def test_esd_u_as_an_adapter_adapts_what_esd_u_trains():
    recipe = Recipe.parse(MINIMAL + "preset: demo\nobjective: {kind: esd-u}\n")
    assert (recipe.parameters, recipe.lora.targets, recipe.lora.init) == (
        "lora",
        ["noxattn"],
        "random",
    )
    assert Recipe.parse(recipe.to_yaml()) == recipe
    whole = Recipe.parse(MINIMAL + "objective: {kind: esd-u}\nparameters: full\n")
    assert Recipe.parse(whole.to_yaml()) == whole


def test_leco_is_an_adapter_of_all_attention_at_its_own_rank_and_alpha():
    recipe = Recipe.parse(MINIMAL + "preset: demo\nobjective: {kind: leco}\n")
    assert recipe.lora == Lora(rank=4, alpha=1.0, targets=["attention"])
    assert (recipe.objective.eta, recipe.ema.decay) == (1.0, 0.0)
    assert Recipe.parse(recipe.to_yaml()) == recipe


def test_full_training_starts_from_the_papers_learning_rate():
    recipe = Recipe.parse(MINIMAL + "preset: demo\nparameters: full\n")
    assert recipe.optimizer.learning_rate == 1e-5
    assert Recipe.parse(recipe.to_yaml()) == recipe
    faster = Recipe.parse(MINIMAL + "parameters: full\noptimizer: {learning_rate: 2e-4}\n")
    assert faster.optimizer.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("objective: {eta: 1}", "eta belongs to esd-x, esd-u and leco"),
        ("objective: {kind: esd-x}\nema: {decay: 0.9}", "esd-x keeps no average"),
        (
            "objective: {kind: esd-u}\nlora: {targets: [to_k]}",
            "esd-u changes what is outside the cross-attention: expected ['noxattn']",
        ),
        (
            "objective: {kind: leco}\nlora: {targets: [to_k]}",
            "leco changes what is in self- and cross-attention: expected ['attention']",
        ),
        (
            "lora: {targets: [to_q, noxattn]}",
            "sdd changes what is in the cross-attention: expected ['to_q']",
        ),
        ("objective: {kind: esd-u}\nlora: {init: concepts}", "init: concepts starts to_k and to_v"),
        ("objective: {kind: esd-u}\npreserve: {damping: 1}", "preserve.damping changes"),
        ("parameters: full\nlora: {rank: 8}", "leave lora away"),
        ("rollout: {steps: 5, points: 5}", "need more than 5 steps"),
        ("rollout: {guidance_interval: [0.8, 0.2]}", "rollout.guidance_interval: is gone"),
        ("rollout: {solver: dpmsolver++}", "rollout.solver: is gone"),
        ("objective: {kind: [esd-x]}", "objective.kind"),
    ],
)
def test_fields_that_contradict_each_other_are_bad_input(lines, message):
    with pytest.raises(BadInput) as caught:
        Recipe.parse(MINIMAL + lines + "\n")
    assert message in str(caught.value)


def test_recipes_of_before_keep_fields_that_are_gone_and_their_identity():
    plain = Recipe.parse(MINIMAL)
    old = Recipe.parse(MINIMAL + "rollout: {solver: ddim, guidance_interval: [0, 1]}\n")
    assert (old, old.sha256, old.to_yaml()) == (plain, plain.sha256, plain.to_yaml())
    assert "solver" not in plain.to_yaml()
    assert plain.sha256 == "16ead4e02743ca96db3217f3a173167c3cb38fd1964611ed9cc8c81f81959d9a"


def test_earlier_names_of_fields_are_read_and_hashed_alike():
    text = MINIMAL + "preset: demo\nrollout: {%s: 2, %s: 4}\n"
    old, new = (Recipe.parse(text % names) for names in NAMES)
    assert old == new and old.sha256 == new.sha256 and old.content() == new.content()
    assert (new.rollout.timesteps_per_trajectory, new.rollout.prompts_per_latent) == (2, 4)
    assert (new.rollout.points, new.rollout.prompts) == (2, 4)
    assert "timesteps_per_trajectory: 2" in old.to_yaml() and "points" not in old.to_yaml()
    assert list(new.content()["rollout"]) == [
        "solver",
        "steps",
        "points",
        "prompts",
        "batch",
        "guidance_interval",
    ]


@pytest.mark.parametrize("written", [0, 1])
@pytest.mark.parametrize("typed", [0, 1])
def test_set_wins_whichever_name_it_uses(written, typed):
    recipe = Recipe.parse(
        MINIMAL + f"rollout: {{{NAMES[written][0]}: 2}}\n",
        overrides={f"rollout.{NAMES[typed][0]}": 3},
    )
    assert recipe.rollout.timesteps_per_trajectory == 3


def test_a_problem_under_an_earlier_name_has_its_line():
    with pytest.raises(BadInput, match=r"^r\.yaml:5: rollout\.points: "):
        Recipe.parse(MINIMAL + "rollout:\n  points: 0\n", "r.yaml")


def test_a_preset_is_applied_in_python_as_in_a_file():
    fields = {"name": "mine", "model": "demo", "concepts": ["bomb"], "preset": "demo"}
    assert Recipe(**fields) == Recipe.parse(MINIMAL + "preset: demo\n")
    changed = Recipe(**fields, rollout=RolloutSettings(steps=7), objective={"kind": "esd-x"})
    assert changed == Recipe.parse(
        MINIMAL + "preset: demo\nrollout: {steps: 7}\nobjective: {kind: esd-x}\n"
    )
    assert (changed.rollout.batch, changed.ema.decay) == (4, 0.0)


def test_several_concepts_in_one_text_are_refused_with_the_list_to_write():
    with pytest.raises(BadInput, match=r"recipe:3: concepts: .*\[gun, knife\]"):
        Recipe.parse("name: mine\nmodel: demo\nconcepts: gun, knife\n")
    with pytest.raises(ValueError, match="expected a list"):
        Recipe(name="mine", model="demo", concepts="gun, knife")
    assert Recipe.parse(MINIMAL.replace("[bomb]", "bomb")).concepts == ["bomb"]
    one = Recipe.parse(MINIMAL.replace("[bomb]", "['a gun, a knife']"))
    assert one.concepts == ["a gun, a knife"]


def test_a_list_in_a_file_is_no_concept_in_python():
    with pytest.raises(ValueError, match=r"Recipe\.load"):
        Recipe(name="mine", model="demo", concepts=["concepts.txt"])


def test_a_concept_that_is_preserved_too_is_refused_by_name():
    with pytest.raises(BadInput, match=r"concepts: Bomb: stands in preserve\.prompts too"):
        Recipe.parse(
            "name: mine\nmodel: demo\nconcepts: [Bomb, axe]\npreserve: {prompts: [' bomb']}\n"
        )


def test_the_fast_preset_is_a_rollout_of_few_steps():
    fast = Recipe.parse(MINIMAL + "preset: fast\n").rollout
    assert fast.timesteps_per_trajectory > 1 and fast.prompts_per_latent > 1 and fast.steps < 20


def test_a_recipe_as_a_run_keeps_it_stays_as_it_is_when_a_preset_learns_more():
    settings = {"wordings": None, "preserve.vocabulary": None}
    recipe = Recipe.parse(MINIMAL + "preset: demo\n", overrides=settings)
    assert "wordings" not in recipe.to_yaml() and Recipe.parse(MINIMAL + "preset: demo\n").wordings
    assert Recipe.parse(recipe.to_yaml()) == Recipe.model_validate(recipe.model_dump()) == recipe


def test_a_written_field_wins_over_the_preset_and_set_wins_over_both():
    recipe = Recipe.parse(
        MINIMAL + "preset: demo\nrollout: {steps: 7}\n", overrides={"rollout.batch": 3}
    )
    assert (recipe.rollout.steps, recipe.rollout.batch) == (7, 3)
    assert recipe.measure.detector == "judge"


def test_lists_may_stand_in_text_files_beside_the_recipe(tmp_path):
    (tmp_path / "concepts.txt").write_text("bomb\n\n dagger \n")
    (tmp_path / "kept.txt").write_text("a cat\n")
    (tmp_path / "r.yaml").write_text(
        "name: mine\nmodel: demo\nconcepts: concepts.txt\n"
        "measure: {prompts: {kept: [kept.txt, a dog]}}\n"
    )
    recipe = Recipe.load(tmp_path / "r.yaml")
    assert recipe.concepts == ["bomb", "dagger"]
    assert recipe.measure.prompts.kept == ["a cat", "a dog"]


def test_a_missing_list_and_broken_yaml_are_bad_input(tmp_path):
    with pytest.raises(BadInput, match=r"gone\.txt"):
        Recipe.parse("name: mine\nmodel: demo\nconcepts: gone.txt\n", folder=tmp_path)
    with pytest.raises(BadInput, match="not valid YAML"):
        Recipe.parse("name: [\n")
    with pytest.raises(BadInput, match="expected a recipe"):
        Recipe.load(tmp_path / "gone.yaml")


def test_lists_from_any_editor_are_read_alike(tmp_path):
    (tmp_path / "LIST.TXT").write_bytes("\ufeffbomb\r\na\u2028b\r\n".encode())
    recipe = Recipe.parse("name: mine\nmodel: demo\nconcepts: LIST.TXT\n", folder=tmp_path)
    assert recipe.concepts == ["bomb", "a\u2028b"]


@pytest.mark.parametrize(
    ("lines", "field"),
    [
        ("training: {iterations: true}", "training.iterations"),
        ("training: {iterations: '7'}", "training.iterations"),
        ("training: {iterations: 1:30}", "training.iterations"),
        ("training: {iterations: 010}", "training.iterations"),
        ("training: {iterations: 7.0}", "training.iterations"),
        ("training: {gradient_checkpointing: 'off'}", "training.gradient_checkpointing"),
        ("training: {gradient_checkpointing: 1}", "training.gradient_checkpointing"),
        ("ema: {decay: false}", "ema.decay"),
        ("measure: {steps: 1001}", "measure.steps"),
        ("measure: {seed: 4611686018427387904}", "measure.seed"),
        ("training: {seed: 4611686018427387904}", "training.seed"),
    ],
)
def test_values_of_another_type_or_size_are_bad_input(lines, field):
    with pytest.raises(BadInput) as caught:
        Recipe.parse(MINIMAL + lines + "\n")
    assert str(caught.value).startswith(f"recipe:4: {field}")


def test_numbers_may_be_written_as_people_do():
    text = "optimizer: {learning_rate: 1e-3}\nlora: {alpha: 2}\nobjective: {guidance_scale: .5}\n"
    recipe = Recipe.parse(MINIMAL + text, overrides=parse_overrides(["ema.decay=9e-1"]))
    assert (recipe.optimizer.learning_rate, recipe.lora.alpha) == (1e-3, 2.0)
    assert (recipe.objective.guidance_scale, recipe.ema.decay) == (0.5, 0.9)
    named = Recipe.parse("name: mine\nmodel: demo\nconcepts: ['1:30', '010', '1e-3', 'no']\n")
    assert Recipe.parse(named.to_yaml()) == named


@pytest.mark.parametrize("text", ["concepts: [' ']", "concepts: [bomb, '']", "model: ' '"])
def test_concepts_and_models_have_names(text):
    key = text.partition(":")[0]
    lines = [line for line in MINIMAL.splitlines() if not line.startswith(key)]
    with pytest.raises(BadInput, match=f"{key}.*at least 1 character"):
        Recipe.parse("\n".join([*lines, text]))
    assert Recipe.parse(MINIMAL.replace("bomb", "' bomb '")).concepts == ["bomb"]


@pytest.mark.parametrize(
    "value",
    ["&a [*a]", "&a {prompts: *a}", "[" * 500 + "]" * 500, "9" * 5000, "2020-13-45", "\x01"],
    ids=["in itself", "field in itself", "deep", "digits", "date", "control"],
)
@pytest.mark.parametrize("key", ["concepts", "measure", "training"])
def test_hostile_yaml_is_bad_input_on_one_line(key, value):
    lines = [line for line in MINIMAL.splitlines() if not line.startswith(key)]
    with pytest.raises(BadInput) as caught:
        Recipe.parse("\n".join([*lines, f"{key}: {value}"]))
    assert all(len(line) < 400 for line in str(caught.value).splitlines())
    if "&" not in value:
        with pytest.raises(BadInput):
            Recipe.parse(MINIMAL, overrides=parse_overrides([f"{key}={value}"]))


def test_a_key_that_stands_twice_is_bad_input():
    with pytest.raises(BadInput, match=r"r\.yaml:4: concepts stands here a second time"):
        Recipe.parse(MINIMAL + "concepts: [axe]\n", where="r.yaml")


def test_a_field_may_stand_beside_what_is_merged_into_its_section():
    ema = Recipe.parse(MINIMAL + "ema: {<<: {decay: 0.5, warmup: true}, decay: 0.9}\n").ema
    assert (ema.decay, ema.warmup) == (0.9, True)


def test_a_half_precision_base_needs_that_precision():
    with pytest.raises(BadInput, match="needs precision bf16 too"):
        Recipe.parse(MINIMAL + "training: {base_precision: bf16}\n")


def test_every_field_has_a_reference_and_the_readme_holds_it():
    text = README.read_text("utf-8")
    assert renewed(text) == text, "run: python tests/support/recipe_reference.py"
    written = yaml.safe_load(Recipe.parse(MINIMAL).to_yaml())
    for path in leaves(written):
        assert f"- `{path}` (" in text
    assert "guidance_interval" not in text


def leaves(fields, above=""):
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}"


def test_the_complete_recipe_of_the_readme_is_one():
    text = README.read_text("utf-8").partition("```yaml\n")[2].partition("```")[0]
    recipe = Recipe.parse(text, folder=README.parent)
    assert recipe.preset == "demo" and len(recipe.preserve.prompts) > 100


TO_TRAIN = sorted(path for path in RECIPES.rglob("*.yaml") if path.parent.name != "bench")


@pytest.mark.parametrize("path", TO_TRAIN, ids=lambda path: path.stem)
def test_every_recipe_that_ships_is_valid(path):
    recipe = Recipe.load(path)
    assert recipe.name.endswith(path.stem.removesuffix("-phrases"))
    if recipe.model == "demo":
        assert recipe.measure.prompts.concept and recipe.measure.prompts.kept
    assert not set(recipe.preserve.prompts) & set(recipe.measure.prompts.kept)


def test_overrides_are_read_as_yaml():
    written = ["ema.decay=0.9", "lora.targets=[to_q]"]
    assert parse_overrides(written) == {"ema.decay": 0.9, "lora.targets": ["to_q"]}
    with pytest.raises(BadInput, match="expected name=value"):
        parse_overrides(["ema.decay"])


def test_a_prediction_is_stored_only_where_it_is_given():
    plain = Recipe.parse("name: x\nmodel: demo\nconcepts: [a]\n")
    given = Recipe.parse("name: x\nmodel: demo\nprediction: v\nconcepts: [a]\n")
    assert "prediction" not in plain.content()
    assert given.prediction == given.content()["prediction"] == "v_prediction"
    assert plain.training_sha256 != given.training_sha256
    assert Recipe.parse(given.to_yaml()) == given
    assert Recipe.parse(plain.to_yaml()) == plain
