"""The stream of training points against a plain loop, as in the paper's pseudo-code."""

import contextlib

import pytest
import torch

from sdd_lora.recipe import Objective
from sdd_lora.recipe import Rollout as Settings
from sdd_lora.training.rollout import Rollout, generator_for
from tests.small import ddim, embeddings, small_unet


def make(objective=None, steps=5, calls=None):
    unet = small_unet()

    @contextlib.contextmanager
    def teacher():
        if calls is not None:
            calls.append(1)
        yield unet

    settings, objective = Settings(steps=steps), objective or Objective()
    return Rollout(teacher, ddim(), settings, objective, (4, 8, 8)), unet


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
    generators = [generator_for(0, 7, i) for i in range(3)]
    points = rollout.sample(prompts.empty, prompts.concepts, generators)
    for i in range(3):
        z, t = plain_loop(unet, prompts.empty, prompts.concepts[i : i + 1], generator_for(0, 7, i))
        assert points.t[i] == t
        assert torch.allclose(points.z_t[i], z[0], atol=1e-5)


def test_unet_passes_are_two_a_guided_step_and_trajectories_stop_at_their_own_depth():
    rollout, unet = make()
    counted = []
    unet.register_forward_pre_hook(lambda module, inputs: counted.append(len(inputs[0])))
    prompts = embeddings()
    generators = [generator_for(0, 1, i) for i in range(3)]
    points = rollout.sample(prompts.empty, prompts.concepts, generators)
    timesteps = rollout.scheduler.timesteps.tolist()
    steps = sum(timesteps.index(int(t)) for t in points.t)
    assert rollout.unet_passes == sum(counted) == 2 * steps


def test_t_covers_all_but_the_first_timestep_evenly():
    rollout, _ = make(steps=4)
    rollout._guided = lambda z, t, c_0, c_p: z  # the depth doesn't depend on the estimate
    prompts = embeddings()
    seen = [
        int(rollout.sample(prompts.empty, prompts.concepts[:1], [generator_for(0, i, 0)]).t)
        for i in range(300)
    ]
    expected = rollout.scheduler.timesteps[1:].tolist()
    assert set(seen) == set(expected)
    assert all(60 <= seen.count(t) <= 140 for t in expected)


def test_the_reference_draws_t_inside_the_bin_of_z():
    rollout, _ = make(Objective(variant="reference"), steps=4)
    rollout._guided = lambda z, t, c_0, c_p: z
    prompts = embeddings()
    seen = [
        int(rollout.sample(prompts.empty, prompts.concepts[:1], [generator_for(0, i, 0)]).t)
        for i in range(300)
    ]
    assert len(set(seen)) > 100
    assert min(seen) >= 0 and max(seen) < 750  # never the noisiest bin: their bug at k = 0


@pytest.mark.parametrize("part", ["seed", "iteration", "sample"])
def test_randomness_depends_on_seed_iteration_and_sample(part):
    base = {"seed": 1, "iteration": 2, "sample": 3}
    same = torch.rand(4, generator=generator_for(**base))
    other = torch.rand(4, generator=generator_for(**(base | {part: 9})))
    assert torch.equal(same, torch.rand(4, generator=generator_for(**base)))
    assert not torch.equal(same, other)
