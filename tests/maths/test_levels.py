"""Noise levels: strictly falling, finite, of the right number, whatever is asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.diffusion.schedule import SCHEDULES, NoiseSchedule, noise_schedule, sigmas_for
from fewstep.errors import InputError

SCHEDULE, ZERO_SNR = noise_schedule(), noise_schedule(zero_terminal_snr=True)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_fall_strictly_at_every_number_of_steps(name: str, final: str) -> None:
    for steps in range(1, 1001):
        schedule = ZERO_SNR if steps % 2 else SCHEDULE
        sigmas = sigmas_for(name, steps, schedule, steps_offset=1, final=final)  # type: ignore[arg-type]
        assert len(sigmas) == steps + 1
        assert (np.diff(sigmas) < 0).all(), steps
        assert np.isfinite(sigmas).all()
        assert set(map(type, sigmas)) == {float}  # on the host: no device waits for them
        assert sigmas[-1] == (0.0 if final == "zero" else schedule.sigmas[0])
        assert sigmas[0] <= schedule.sigmas[-1] * (1 + 1e-12)


@pytest.mark.parametrize("name", set(SCHEDULES) - {"leading", "linspace"})
def test_most_schedules_start_at_the_top(name: str) -> None:
    assert sigmas_for(name, 7, SCHEDULE)[0] == pytest.approx(SCHEDULE.sigmas[-1])


def test_karras_and_exponential_end_at_the_lowest_level() -> None:
    for name in ("karras", "exponential"):
        assert sigmas_for(name, 7, SCHEDULE)[-2] == pytest.approx(SCHEDULE.sigmas[0])
        assert sigmas_for(name, 7, SCHEDULE, final="sigma_min") == pytest.approx(sigmas_for(name, 8, SCHEDULE)[:-1])


def test_simple_and_sgm_uniform_at_four_steps() -> None:
    def times(name: str) -> list[float]:
        return [SCHEDULE.sigma_to_t(sigma) for sigma in sigmas_for(name, 4, SCHEDULE)[:-1]]

    assert times("simple") == [999, 749, 499, 249]
    assert times("sgm_uniform") == pytest.approx([999, 749.25, 499.5, 249.75])


def test_aligned_steps_keep_their_ends_at_other_numbers_of_steps() -> None:
    ten, five = (sigmas_for("align_your_steps", steps, SCHEDULE) for steps in (10, 5))
    assert five[:-1] == pytest.approx(ten[:-1:2])  # every other one: log-linear in the index


def test_stable_diffusions_levels_are_the_well_known_ones() -> None:
    assert SCHEDULE.sigmas[0] == pytest.approx(0.0292, abs=1e-4)
    assert SCHEDULE.sigmas[-1] == pytest.approx(14.6146, abs=1e-4)
    assert len(SCHEDULE) == len(SCHEDULE.alpha_bar) == 1000


def test_time_steps_are_log_linear_between_the_whole_ones() -> None:
    assert SCHEDULE.t_to_sigma(10.5) == pytest.approx((SCHEDULE.sigmas[10] * SCHEDULE.sigmas[11]) ** 0.5)
    for t in (0.25, 10.5, 998.75):
        assert SCHEDULE.sigma_to_t(SCHEDULE.t_to_sigma(t)) == pytest.approx(t)
    assert SCHEDULE.t_to_sigma(-1) == SCHEDULE.sigmas[0]
    assert SCHEDULE.t_to_sigma(2000) == SCHEDULE.sigmas[-1]


def test_a_schedule_is_the_same_on_any_default_device() -> None:
    with torch.device("meta"):
        assert noise_schedule() == SCHEDULE


@pytest.mark.parametrize(
    ("name", "steps", "options", "match"),
    [
        ("karas", 20, {}, "unknown schedule 'karas'; did you mean 'karras'"),
        ("karras", 0, {}, "steps 0 is not in 1 ... 1000; the nearest is 1$"),
        ("karras", 1001, {}, "steps 1001 is not in 1 ... 1000; the nearest is 1000$"),
        ("align_your_steps", 10, {"family": "sd3"}, "unknown family 'sd3'"),
    ],
)
def test_what_is_out_of_range_is_an_error(name: str, steps: int, options: dict[str, str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        sigmas_for(name, steps, SCHEDULE, **options)  # type: ignore[arg-type]


def test_an_unknown_beta_schedule_is_an_error() -> None:
    with pytest.raises(InputError, match="did you mean 'scaled_linear'"):
        noise_schedule("scaled_lineer")  # type: ignore[arg-type]


def test_a_schedule_can_be_any_falling_alpha_bar() -> None:
    schedule = NoiseSchedule(alpha_bar=(0.99, 0.9, 0.5, 0.1))
    assert len(sigmas_for("trailing", 2, schedule)) == 3
    assert schedule.sigma_to_t(1.0) == 2
