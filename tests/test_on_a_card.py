"""Training, drawing and measuring on a GPU, without one: on `support.claimed_device`.

A slip of devices or dtypes fails. Values are the CPU's, so that results can be compared with its.
"""

from pathlib import Path

import pytest
import torch
from support.claimed_device import CARD, claimed_cuda, is_on_card
from support.short_run import short
from support.trainers import WAYS, recipe, result, same, trainer

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.metrics import Metrics
from sdd_lora.attacks.case import Case
from sdd_lora.attacks.inversion import inversion
from sdd_lora.attacks.noise import frozen
from sdd_lora.attacks.settings import Inversion, UnlearnDiffAtk
from sdd_lora.attacks.unlearndiffatk import unlearndiffatk
from sdd_lora.generation.images import draw
from sdd_lora.generation.methods import METHODS
from sdd_lora.generation.sampling import Sampling, jobs_for
from sdd_lora.runs.train import train
from sdd_lora.sd.pipeline import load_pipeline
from sdd_lora.sd.schedulers import SCHEDULERS
from sdd_lora.training.erase import erase

_ADAPTERS = Path(__file__).parents[1] / "adapters"
_SIDES = {"width": 32, "height": 32}  # fp16 is slow on the CPU
_SMALL = {"rollout": {"steps": 2}}
_WAYS = {
    **WAYS,
    "points": {"rollout": {"steps": 3, "points": 2}},
    "accumulation": {"training": {"iterations": 6, "gradient_accumulation": 2}},
    "prompts": {"rollout": {"steps": 2, "prompts": 3}},
    "kept": {"preserve": {"prompts": ["d"], "damping": 0.1}, "training": {"iterations": 4}},
    "no average": {"ema": {"decay": 0.0}},
    "fp16": {"training": {"iterations": 6, "precision": "fp16", "base_precision": "fp16"}},
    "closed form": {"lora": {"rank": 2, "init": "closed-form"}},
    "directions": {"lora": {"rank": 2, "init": "concepts"}},
}


@pytest.fixture
def card():
    with claimed_cuda():
        yield


@pytest.fixture(scope="module")
def on_card():
    """The embedded model with an adapter, as it comes to a card: in fp16."""
    with claimed_cuda():
        weapons = Adapter.load(_ADAPTERS / "demo" / "weapons")
        return load_pipeline("demo", adapters=[(weapons, 1.0)])


@pytest.mark.parametrize("way", _WAYS)
def test_a_step_trains_on_the_card_in_every_way(card, way):
    settings = recipe(**_SMALL | _WAYS[way])
    trained = trainer(settings, kept=2 * bool(settings.preserve.prompts))
    start = result(trained)
    trained.step()
    assert trained.accelerator.device.type == CARD.type
    assert all(map(is_on_card, trained.roles.unet.parameters()))
    assert not any(map(is_on_card, result(trained).values()))
    if way != "fp16":  # whose first steps only find the loss's scale
        assert not same(start, result(trained))


def test_a_step_on_the_card_is_the_cpus():
    settings = recipe(**_SMALL)
    plain = trainer(settings, kept=0)
    plain.step()
    with claimed_cuda():
        on_the_card = trainer(settings, kept=0)
        on_the_card.step()
        found = result(on_the_card)
    for name, factor in result(plain).items():
        torch.testing.assert_close(found[name], factor)


def test_a_card_multiplies_fp32_in_tf32(card, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    trainer(recipe(), kept=0)
    assert chosen == ["high"]


@pytest.mark.parametrize("way", ["8-bit", "full", "points"])
def test_a_resumed_run_on_the_card_equals_an_uninterrupted_one(card, tmp_path, way):
    settings = recipe(**_SMALL | _WAYS[way])
    whole = trainer(settings, tmp_path / "state.pt", kept=0)
    whole.step()
    whole.save_state()
    whole.step()
    resumed = trainer(settings, tmp_path / "state.pt", kept=0)
    resumed.resume()
    resumed.step()
    assert same(result(whole), result(resumed))


def test_a_run_trained_on_the_card_goes_on_without_one(tmp_path):
    settings = recipe(**_SMALL)
    with claimed_cuda():
        first = trainer(settings, tmp_path / "state.pt", kept=0)
        first.step()
        first.save_state()
    assert torch.load(tmp_path / "state.pt", weights_only=True)["iteration"] == 1


def test_train_with_measuring_runs_on_the_card(card, tmp_path):
    settings = short(
        rollout__steps=2,
        rollout__batch=1,
        training__iterations=1,
        measure__prompts={"concept": ["a bomb"], "kept": ["a cat"]},
        measure__images=1,
        measure__steps=1,
        measure__detector="judge",
        measure__every=1,
        measure__precision="fp32",  # the methods below draw in fp16, slowly on the CPU
    )
    train(settings, tmp_path / "run")
    metrics = Metrics.read(tmp_path / "run").as_json()
    assert metrics["measures"] and metrics["training"]["peak_bytes"] == 10**9
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 1


def test_pictures_while_training_are_drawn_on_the_card(card, tmp_path):
    settings = short(
        rollout__steps=2,
        rollout__batch=1,
        training__iterations=1,
        training__precision="fp16",
        training__base_precision="fp16",
        measure__every=1,
        measure__steps=1,
    )
    train(settings, tmp_path / "run")
    assert (tmp_path / "run" / "samples" / "000001.png").exists()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_draws_on_the_card(card, on_card, method):
    concept = "" if method == "sd" else "axe"
    sampling = Sampling(steps=1, guidance=4.0, method=method, concept=concept, **_SIDES)
    ((_, image),) = draw(on_card, jobs_for(["an axe"], 1, 5), sampling, "test")
    assert image.shape == (32, 32, 3) and image.std() > 1
    assert on_card.unet.dtype == torch.float16


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_draws_on_the_card(card, on_card, scheduler):
    sampling = Sampling(steps=2, guidance=1.0, scheduler=scheduler, **_SIDES)
    ((_, image),) = draw(on_card, jobs_for(["an axe"], 1, 5), sampling, "test")
    assert image.std() > 1


def test_attacks_run_on_the_card(card):
    base = frozen(load_pipeline("demo"))
    case = Case(base, base, ["axe"], "an axe", 7, Sampling(2, 3.0))
    inversion(case, Inversion(steps=1, pictures=1))
    unlearndiffatk(case, UnlearnDiffAtk(words=1, points=1, steps=1))


def test_words_are_erased_on_the_card(card, tmp_path, monkeypatch):
    monkeypatch.setenv("SDD_LORA_CACHE", str(tmp_path))
    assert erase(["axe"], vocabulary=100).adapter.is_portable


# the stand-in itself: what torch refuses on a card, it refuses


@pytest.mark.parametrize(
    ("slip", "message"),
    [
        (lambda x: x + torch.ones(3), "same device"),
        (lambda x: torch.cat([x, torch.ones(3)]), "same device"),
        (lambda x: torch.ones(3)[x > 0], "same device"),
        (lambda x: torch.randn(3, device=CARD, generator=torch.Generator()), "generator"),
        (lambda x: x.normal_(generator=torch.Generator()), "generator"),
        (lambda x: x.numpy(), "numpy"),
        (lambda x: torch.nn.LayerNorm(3).cuda()(x.half()), "scalar type"),
        (lambda x: torch.nn.Linear(3, 3).cuda()(x.half()), "dtype"),
    ],
    ids=["sum", "cat", "mask", "factory", "in place", "numpy", "norm", "matmul"],
)
def test_a_slip_fails_on_the_claimed_card(card, slip, message):
    x = torch.ones(3).cuda()
    with pytest.raises((RuntimeError, TypeError), match=message):
        slip(x)


def test_right_code_works_on_the_claimed_card(card):
    x = torch.ones(3, device="cuda", requires_grad=True)
    (2 * x[torch.tensor([0, 2])] + torch.tensor(1.0)).sum().backward()
    assert x.grad.cpu().tolist() == [2, 0, 2] and x.grad.device == CARD
    with torch.autocast("cuda", torch.float16):
        product = x[None] @ x[:, None]
        assert product.dtype == torch.float16
        assert torch.nn.functional.layer_norm(product, (1,)).dtype == torch.float32
    x.data[0] = 5
    assert x.tolist() == [5, 1, 1]


@pytest.mark.gpu
def test_a_step_trains_on_a_real_card():
    trained = trainer(recipe(**_SMALL))
    trained.step()
    assert trained.accelerator.device.type == "cuda" and trained.losses == []
