"""What holds for every sampler, whatever the levels: ends, sums, gradients, and who owns what."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep.diffusion.samplers import SAMPLERS, sampler
from fewstep.diffusion.schedule import SCHEDULES, noise_schedule, sigmas_for
from fewstep.diffusion.step import Step
from fewstep.errors import InputError

SCHEDULE = noise_schedule()


def gaussian(x: Tensor, sigma: float) -> Tensor:
    """The exact denoiser of data ~ N(0.7, 0.5^2)."""
    return (0.25 * x + 0.7 * sigma**2) / (0.25 + sigma**2)


every_sampler = pytest.mark.parametrize("name", SAMPLERS)


def noise_like(x: Tensor, seed: int = 0) -> object:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def started(sigma: float) -> Tensor:
    return sigma * torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(1))


def run(name: str, x: Tensor, sigmas: tuple[float, ...], denoise: object = gaussian) -> list[Step]:
    return list(SAMPLERS[name](denoise, x, sigmas, noise=noise_like(x)))  # type: ignore[arg-type]


@every_sampler
@pytest.mark.parametrize("sigmas", [(14.6, 0.0), (14.6, 0.03), (14.6, 1.0, 0.0), (14.6, 1.0, 0.03), (0.03, 0.0)])
def test_one_and_two_steps_work(name: str, sigmas: tuple[float, ...]) -> None:
    steps = run(name, started(sigmas[0]), sigmas)
    assert [step.sigma for step in steps] == list(sigmas[1:])
    assert all(torch.isfinite(step.x).all() and torch.isfinite(step.x0).all() for step in steps)


@every_sampler
def test_one_step_to_zero_is_the_denoisers_answer(name: str) -> None:
    x = started(14.6)
    (step,) = run(name, x, (14.6, 0.0))
    torch.testing.assert_close(step.x, gaussian(x, 14.6), atol=1e-5, rtol=1e-5)


@settings(max_examples=150)
@given(
    name=st.sampled_from(sorted(SAMPLERS)),
    schedule=st.sampled_from(SCHEDULES),
    steps=st.one_of(st.integers(1, 30), st.integers(1, 1000)),
    final=st.sampled_from(["zero", "sigma_min"]),
    zero_snr=st.booleans(),
)
def test_every_sampler_at_every_number_of_steps_on_every_schedule_stays_finite(
    name: str, schedule: str, steps: int, final: str, zero_snr: bool
) -> None:
    noise_levels = noise_schedule(zero_terminal_snr=zero_snr)
    sigmas = sigmas_for(schedule, steps, noise_levels, steps_offset=1, final=final)  # type: ignore[arg-type]
    taken = run(name, started(sigmas[0]), sigmas)
    assert len(taken) == steps
    assert torch.isfinite(taken[-1].x).all()


@every_sampler
def test_model_calls_are_as_many_as_the_table_says(name: str) -> None:
    calls: list[float] = []

    def counted(x: Tensor, sigma: float) -> Tensor:
        assert isinstance(sigma, float)
        calls.append(sigma)
        return gaussian(x, sigma)

    run(name, started(14.6), sigmas_for("karras", 10, SCHEDULE), counted)
    spec = SAMPLERS[name]
    assert len(calls) == {1: 10, 2: 19}[spec.evaluations] + (name == "plms")


def test_ddim_without_noise_is_euler_and_ddpm_is_ddim_with_all_of_it() -> None:
    sigmas = sigmas_for("karras", 12, SCHEDULE)
    x = started(sigmas[0])
    torch.testing.assert_close(run("ddim", x, sigmas)[-1].x, run("euler", x, sigmas)[-1].x)
    full = list(SAMPLERS["ddim"](gaussian, x, sigmas, noise=noise_like(x), eta=1.0))  # type: ignore[arg-type]
    torch.testing.assert_close(full[-1].x, run("ddpm", x, sigmas)[-1].x)


@every_sampler
@pytest.mark.parametrize("sigmas", [(14.6, 0.0), (14.6, 3.0, 1.0, 0.2, 0.0)])
def test_gradients_pass_through_a_whole_run(name: str, sigmas: tuple[float, ...]) -> None:
    x = started(14.6).requires_grad_()
    weight = torch.ones((), requires_grad=True)
    last = run(name, x, sigmas, lambda x, sigma: weight * gaussian(x, sigma))[-1]
    gradients = torch.autograd.grad(last.x.square().sum(), [x, weight])
    assert all(torch.isfinite(gradient).all() and gradient.abs().max() > 0 for gradient in gradients)


@every_sampler
def test_a_run_leaves_the_callers_tensor_alone_and_repeats(name: str) -> None:
    sigmas = sigmas_for("karras", 6, SCHEDULE)
    x = started(sigmas[0])
    before = x.clone()
    first, second = run(name, x, sigmas)[-1].x, run(name, x, sigmas)[-1].x
    assert torch.equal(x, before)
    assert torch.equal(first, second)


@every_sampler
def test_a_picture_does_not_depend_on_its_batch(name: str) -> None:
    sigmas = sigmas_for("karras", 6, SCHEDULE)
    x = started(sigmas[0])
    draws = [noise_like(x)() for _ in range(20)]  # type: ignore[operator]
    both = list(SAMPLERS[name](gaussian, x, sigmas, noise=iter(draws).__next__))[-1].x
    alone = iter([draw[1:] for draw in draws])
    one = list(SAMPLERS[name](gaussian, x[1:], sigmas, noise=alone.__next__))[-1].x
    assert torch.equal(one, both[1:])


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"unipc"}))  # it redoes the step it is called back from
def test_writing_into_a_steps_x_steers_the_run(name: str) -> None:
    sigmas = (14.6, 1.0, 0.0)
    x = started(14.6)
    seen: list[Tensor] = []

    def watched(x: Tensor, sigma: float) -> Tensor:
        seen.append(x.clone())
        return gaussian(x, sigma)

    for step in SAMPLERS[name](watched, x, sigmas, noise=noise_like(x)):  # type: ignore[arg-type]
        step.x[:, :, 0] = 123.0
    assert (seen[-1][:, :, 0] == 123.0).all()


def test_an_unknown_sampler_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="unknown sampler 'dpm\\+\\+_2m'; did you mean 'dpmpp_2m'"):
        sampler("dpm++_2m")
    assert sampler("heun") is SAMPLERS["heun"]


@pytest.mark.parametrize(("name", "eta", "match"), [("euler", 0.5, "means nothing"), ("ddim", 1.5, "nearest is 1.0")])
def test_an_eta_out_of_place_is_an_error(name: str, eta: float, match: str) -> None:
    with pytest.raises(InputError, match=match):
        SAMPLERS[name](gaussian, started(1.0), (1.0, 0.0), noise=torch.zeros, eta=eta)
