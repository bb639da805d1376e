"""LECO's, sliders' and ai-toolkit's files, read where a recipe is."""

import pytest
import yaml

from sdd_lora import train
from sdd_lora.errors import BadInput
from sdd_lora.recipe import Recipe

PROMPTS = [
    {
        "target": "van gogh",
        "positive": "van gogh",
        "unconditional": "",
        "neutral": "",
        "action": "erase",
        "guidance_scale": 1.5,
        "resolution": 512,
        "batch_size": 2,
    },
    {"target": "monet", "guidance_scale": 1.5},
]
CONFIG = {
    "prompts_file": "./prompts.yaml",
    "pretrained_model": {"name_or_path": "demo", "v2": False, "v_pred": False},
    "network": {"type": "lierla", "rank": 8, "alpha": 2.0},
    "train": {
        "precision": "bfloat16",
        "noise_scheduler": "ddpm",
        "iterations": 500,
        "lr": 1e-4,
        "optimizer": "AdamW8bit",
        "lr_scheduler": "cosine",
    },
    "save": {"name": "no painters", "path": "./output", "per_steps": 200},
    "logging": {"use_wandb": False},
}
SLIDER = {
    "job": "train",
    "config": {
        "name": "no_gore",
        "training_folder": "output",
        "process": [
            {
                "type": "slider",
                "network": {"type": "lierla", "linear": 8, "linear_alpha": 4},
                "train": {
                    "steps": 300,
                    "lr": 2e-4,
                    "optimizer": "adamw",
                    "dtype": "bf16",
                    "noise_scheduler": "ddpm",
                    "train_text_encoder": False,
                },
                "model": {"name_or_path": "demo", "is_v2": False, "is_xl": False},
                "slider": {
                    "targets": [{"target_class": "", "positive": "", "negative": "gore"}],
                    "anchors": [{"prompt": "a woman"}],
                },
            }
        ],
    },
}


def write(folder, config, prompts=PROMPTS):
    (folder / "prompts.yaml").write_text(yaml.safe_dump(prompts))
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def changed(config, dotted, value):
    """A copy with one field of fields changed."""
    config = yaml.safe_load(yaml.safe_dump(config))
    place = config
    *path, last = dotted.split(".")
    for key in path:
        place = place[int(key) if key.isdigit() else key]
    place[last] = value
    return config


def test_lecos_config_becomes_its_own_objective(tmp_path, caplog):
    recipe = Recipe.load(write(tmp_path, CONFIG))
    assert (recipe.name, recipe.model, recipe.concepts) == (
        "no-painters",
        "demo",
        ["van gogh", "monet"],
    )
    objective = recipe.objective
    assert (objective.kind, objective.eta, objective.guidance_scale) == ("leco", 1.5, 3.0)
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets) == (8, 2.0, ["attention"])
    assert recipe.ema.decay == 0
    optimizer = recipe.optimizer
    assert (optimizer.kind, optimizer.learning_rate, optimizer.weight_decay) == (
        "adamw8bit",
        1e-4,
        0.01,
    )
    assert optimizer.schedule == "cosine"
    assert (recipe.training.iterations, recipe.training.base_precision) == (500, "bf16")
    assert (recipe.rollout.steps, recipe.rollout.batch) == (50, 2)
    for difference in (
        "attention alone is adapted",
        "sampled by DDIM, not by ddpm",
        "batch_size is 2 for all prompts",
        "not taken over: logging, save.path, save.per_steps",
    ):
        assert difference in caplog.text
    assert Recipe.parse(recipe.to_yaml()) == recipe


def test_a_list_of_prompts_wants_a_model(tmp_path):
    path = tmp_path / "prompts.yaml"
    path.write_text("# a list alone\n" + yaml.safe_dump(PROMPTS))
    with pytest.raises(BadInput, match=r'prompts.yaml: .*add `overrides\["model"\]=MODEL`'):
        Recipe.load(path)
    recipe = Recipe.load(path, {"model": "demo", "lora.rank": 2})
    assert (recipe.name, recipe.model, recipe.lora.rank) == ("prompts", "demo", 2)
    assert (recipe.training.iterations, recipe.optimizer.learning_rate) == (500, 1e-4)


def test_the_layer_that_reads_prompts_is_taken_over(tmp_path):
    recipe = Recipe.load(write(tmp_path, changed(CONFIG, "pretrained_model.clip_skip", 2)))
    assert recipe.clip_skip == 2


def test_a_list_of_prompts_that_is_no_text_is_told(tmp_path):
    path = write(tmp_path, changed(CONFIG, "prompts_file", "latin.yaml"))
    (tmp_path / "latin.yaml").write_bytes(b"- target: caf\xe9\n")
    with pytest.raises(
        BadInput, match=r"latin.yaml: expected LECO.s list of prompts, found no UTF-8"
    ):
        Recipe.load(path)


@pytest.mark.parametrize(("method", "kind"), [("xattn", "esd-x"), ("noxattn", "esd-u")])
def test_sliders_training_methods_are_esds(tmp_path, method, kind):
    recipe = Recipe.load(write(tmp_path, changed(CONFIG, "network.training_method", method)))
    assert recipe.objective.kind == kind


def test_an_ai_toolkit_slider_that_only_erases_is_read(tmp_path, caplog):
    recipe = Recipe.load(write(tmp_path, SLIDER))
    assert (recipe.name, recipe.concepts, recipe.preserve.prompts) == (
        "no_gore",
        ["gore"],
        ["a woman"],
    )
    assert (recipe.objective.kind, recipe.objective.eta) == ("leco", 1.0)
    assert (recipe.lora.rank, recipe.lora.alpha) == (8, 4.0)
    assert recipe.training.iterations == 300
    assert recipe.training.gradient_checkpointing
    assert "trained the other way at weight -1" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": "enhance"}, r"prompt 1: action: enhance .* strengthens a concept"),
        ({"positive": "old"}, r"prompt 1: target: 'van gogh', positive: 'old': .*same text"),
        ({"neutral": "a man"}, r"prompt 1: neutral: 'a man': .*expected neutral: ''"),
        ({"unconditional": "x"}, r"prompt 1: unconditional: 'x'"),
        ({"guidance_scale": 2}, r"guidance_scale: expected one for all .*found 1.5, 2"),
        ({"mask": "x.png"}, r"prompt 1: mask: has no counterpart here"),
    ],
)
def test_prompts_that_do_more_than_erase_are_refused_by_name(tmp_path, change, message):
    prompts = [PROMPTS[0] | change, PROMPTS[1]]
    with pytest.raises(BadInput, match=message):
        Recipe.load(write(tmp_path, CONFIG, prompts))


def test_enhancing_by_a_negative_scale_is_erasing(tmp_path):
    prompts = [{"target": "van gogh", "action": "enhance", "guidance_scale": -2}]
    assert Recipe.load(write(tmp_path, CONFIG, prompts)).objective.eta == 2


@pytest.mark.parametrize(
    ("config", "dotted", "value", "message"),
    [
        (CONFIG, "pretrained_model.v2", True, "pretrained_model: v2: not to be had here"),
        (CONFIG, "network.training_method", "selfattn", "training_method: selfattn: expected one"),
        (CONFIG, "train.optimizer", "dadaptation", "train: optimizer: dadaptation: expected one"),
        (CONFIG, "train.lr", "high", "train.lr: Input should be a valid number"),
        (CONFIG, "prompts_file", "gone.yaml", "prompts_file: .*gone.yaml: no such file"),
        (SLIDER, "config.process.0.model.is_xl", True, "model: is_xl: not to be had here"),
        (SLIDER, "config.process.0.train.train_text_encoder", True, "train: train_text_encoder:"),
        (SLIDER, "config.process.0.type", "sd_trainer", "expected one of type slider, found sd_t"),
        (SLIDER, "config.process.0.slider.targets.0.positive", "calm", "positive: 'calm': stren"),
        (SLIDER, "config.process.0.slider.targets.0.target_class", "man", "target_class: 'man':"),
    ],
)
def test_settings_that_can_not_be_had_are_refused_by_name(tmp_path, config, dotted, value, message):
    with pytest.raises(BadInput, match=message):
        Recipe.load(write(tmp_path, changed(config, dotted, value)))


def test_what_leco_would_erase_is_trained(tmp_path):
    train_fields = {"precision": "float32", "iterations": 2, "max_denoising_steps": 3}
    config = write(tmp_path, CONFIG | {"train": train_fields}, [{"target": "bomb"}])
    made = train(config, tmp_path / "run")
    assert made.metadata.concepts == ["bomb"]
    assert len(made.factors) == 128  # all of self- and cross-attention
    assert {part.rank for part in made.factors.values()} == {8}
    assert any(part.norm() > 0 for part in made.factors.values())


def test_other_lists_are_no_recipes(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text("- one\n- two\n")
    with pytest.raises(BadInput, match="expected fields such as `concepts:`"):
        Recipe.load(path)
