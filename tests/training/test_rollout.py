"""The stream of training points against a plain loop, as in the paper's pseudo-code."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from support.small import ddim, embeddings, small_unet

from sdd_lora.recipe import PRESETS
from sdd_lora.recipe import RolloutSettings as Settings
from sdd_lora.training.objectives import SDD, SDDReference
from sdd_lora.training.rollout import Rollout, generator_for

EVERY_OPTION = {
    "plain": {},
    "points": {"points": 3},
}


def make(objective=None, samples=3, **settings):
    unet = small_unet()

    @contextlib.contextmanager
    def teacher():
        yield unet

    settings = Settings(**({"steps": 5} | settings))
    objective = objective or SDD(guidance_scale=3.0, t_in_bin=False)
    return Rollout(teacher, ddim(), settings, objective, (4, 8, 8), 0, samples), unet


def without_unet(*arguments, **settings):
    """For what doesn't depend on the estimates."""
    rollout, _ = make(*arguments, **settings)
    nothing = contextlib.nullcontext(lambda z, t, c: SimpleNamespace(sample=torch.zeros_like(z)))
    rollout.teacher = lambda: nothing
    return rollout


def counted(unet):
    calls = []
    unet.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    return calls


def sample(rollout, iteration, samples=range(3)):
    prompts = embeddings()
    return rollout.sample(iteration, list(samples), prompts.empty, prompts.concepts)


@torch.no_grad()
def plain_loop(unet, c_0, c_p, generator, steps=5, s_g=3.0):
    """The pseudo-code, one trajectory."""
    scheduler = ddim()
    scheduler.set_timesteps(steps)
    until = int(torch.randint(0, steps - 1, (), generator=generator))
    z = torch.randn((4, 8, 8), generator=generator).unsqueeze(0)
    for i, t in enumerate(scheduler.timesteps):
        e_0, e_p = unet(z, t, c_0).sample, unet(z, t, c_p).sample
        z = scheduler.step(e_0 + s_g * (e_p - e_0), t, z).prev_sample
        if i == until:
            break
    return z, int(scheduler.timesteps[until + 1])


def test_each_trajectory_of_a_batch_is_the_pseudo_code():
    rollout, unet = make()
    prompts = embeddings()
    batch = sample(rollout, 7)
    for i in range(3):
        z, t = plain_loop(unet, prompts.empty, prompts.concepts[i : i + 1], generator_for(0, 7, i))
        assert batch.t[i] == t
        assert torch.allclose(batch.z_t[i], z[0], atol=1e-5)


def test_unet_passes_are_two_a_guided_step_and_trajectories_stop_at_their_own_depth():
    rollout, unet = make()
    calls = counted(unet)
    batch = sample(rollout, 1)
    timesteps = rollout.scheduler.timesteps.tolist()
    steps = sum(timesteps.index(int(t)) for t in batch.t)
    assert rollout.unet_passes == sum(calls) == 2 * steps


def test_several_points_cost_the_steps_of_one_trajectory():
    """N points an iteration each: the passes of a trajectory to its deepest point, and no more."""
    rollout, unet = make(points=4, steps=9, samples=1)
    calls = counted(unet)
    for iteration in range(8):
        sample(rollout, iteration, [0])
    deepest = [rollout._start(born, 0).stop_steps[-1] for born in (0, 4)]
    assert rollout.unet_passes == sum(calls) == 2 * sum(deepest)
    assert 2 * sum(deepest) < 2 * 2 * 9


@torch.no_grad()
def test_several_points_lie_on_one_trajectory():
    rollout, unet = make(points=3, steps=9, samples=1)
    prompts = embeddings()
    seen = [sample(rollout, iteration, [0]) for iteration in range(3)]
    scheduler = ddim()
    scheduler.set_timesteps(9)
    generator = generator_for(0, 0, 0)
    torch.randint(0, 8, (), generator=generator)
    z = torch.randn((4, 8, 8), generator=generator).unsqueeze(0)
    found = {}
    for i, t in enumerate(scheduler.timesteps[:-1]):
        e_0, e_p = unet(z, t, prompts.empty).sample, unet(z, t, prompts.concepts[:1]).sample
        z = scheduler.step(e_0 + 3 * (e_p - e_0), t, z).prev_sample
        found[int(scheduler.timesteps[i + 1])] = z[0]
    assert len({int(point.t) for point in seen}) == 3
    for point in seen:
        assert torch.allclose(point.z_t[0], found[int(point.t)], atol=1e-5)
    assert [point.trajectories for point in seen] == [[0]] * 3
    assert [point.prompt_index for point in seen] == [[0], [1], [2]]
    assert sample(rollout, 3, [0]).trajectories == [1]


@pytest.mark.parametrize(("preset", "passes"), [("paper", 50), ("fast", 5.4)])
def test_what_the_presets_rollouts_cost_a_point(preset, passes):
    rollout = without_unet(**{"steps": 50} | PRESETS[preset].get("rollout", {}), samples=4)
    for iteration in range(150):
        sample(rollout, iteration, range(4))
    assert rollout.unet_passes / 600 == pytest.approx(passes, rel=0.06)


def timesteps_seen(rollout, iterations, samples=(0,)):
    return [int(t) for i in range(iterations) for t in sample(rollout, i, samples).t]


@pytest.mark.parametrize("points", [1, 3])
def test_t_covers_all_but_the_first_timestep_evenly(points):
    rollout = without_unet(steps=5, points=points)
    seen = timesteps_seen(rollout, 300)
    expected = rollout.scheduler.timesteps[1:].tolist()
    assert set(seen) == set(expected)
    assert all(45 <= seen.count(t) <= 105 for t in expected)


def test_a_batch_with_several_points_is_spread_over_the_trajectory():
    rollout = without_unet(steps=9, points=4, samples=4)
    for iteration in range(5):
        t = sorted(sample(rollout, iteration, range(4)).t.tolist())
        assert t[0] < 333 and t[-1] > 555 and len(set(t)) == 4


def test_every_concept_meets_every_part_of_the_trajectory():
    """With as many concepts as points, counting iterations would tie them together."""
    rollout = without_unet(steps=9, points=3, samples=1)
    met = {(i % 3, sample(rollout, i, [0]).prompt_index[0] % 3) for i in range(9)}
    assert len(met) == 9
    towards = {sample(rollout, i, [0]).trajectories[0] % 3 for i in range(9, 18)}
    assert towards == {0, 1, 2}


def test_the_reference_draws_t_inside_the_bin_of_z():
    rollout = without_unet(SDDReference(guidance_scale=3.0, t_in_bin=True), steps=4)
    seen = timesteps_seen(rollout, 300)
    assert len(set(seen)) > 50
    assert {t // 20 * 20 for t in seen} == {0, 240, 500}  # never the noisiest: their bug at k = 0


def test_a_bin_has_twenty_timesteps_at_most():
    """Of ten steps the last has t = 1: its latents are not trained at t up to 99."""
    rollout = without_unet(SDDReference(guidance_scale=3.0, t_in_bin=True), steps=10)
    seen = timesteps_seen(rollout, 400)
    assert {t // 100 for t in seen} == set(range(9)) and max(t % 100 for t in seen) == 19


@pytest.mark.parametrize("option", EVERY_OPTION)
def test_a_restored_stream_goes_on_to_the_same_bytes(option):
    settings = {"steps": 9} | EVERY_OPTION[option]
    whole, _ = make(**settings)
    for iteration in range(4):
        sample(whole, iteration)
    restored, _ = make(**settings)
    restored.load_state_dict(whole.state_dict())
    assert restored.unet_passes == whole.unet_passes > 0
    for iteration in range(4, 8):
        a, b = sample(whole, iteration), sample(restored, iteration)
        assert torch.equal(a.z_t, b.z_t) and torch.equal(a.t, b.t)
        assert (a.prompt_index, a.trajectories) == (b.prompt_index, b.trajectories)
    assert restored.unet_passes == whole.unet_passes


def test_what_is_in_progress_ends_with_its_trajectory():
    rollout = without_unet(steps=9, points=3, samples=1)
    in_progress = []
    for iteration in range(6):
        sample(rollout, iteration, [0])
        in_progress.append(len(rollout.state_dict()["in_progress"]))
    assert in_progress == [1, 1, 0, 1, 1, 0]
    assert without_unet().state_dict()["in_progress"] == {}


@pytest.mark.parametrize("part", ["seed", "iteration", "sample"])
def test_randomness_depends_on_seed_iteration_and_sample(part):
    base = {"seed": 1, "iteration": 2, "sample": 3}
    same = torch.rand(4, generator=generator_for(**base))
    other = torch.rand(4, generator=generator_for(**(base | {part: 9})))
    assert torch.equal(same, torch.rand(4, generator=generator_for(**base)))
    assert not torch.equal(same, other)
