"""Carbon dioxide from hours and watts, and watts from the processor's counters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fewstep.cards.emissions import Emissions, PowerMeter, readable_counters
from fewstep.errors import InputError

CARD = Emissions(hours=150_000, watts=250, kg_per_kwh=0.3)
"""What the model card of Stable Diffusion v1-4 states."""
LIMIT = 262_143_328_850


def test_the_card_of_stable_diffusion_v1_4():
    assert CARD.kilograms == pytest.approx(11_250)
    assert CARD.kilowatt_hours == pytest.approx(37_500)
    assert CARD.statement() == ("11,250 kg CO2 equivalent = 150,000 h x 250 W (assumed) x 0.3 kg/kWh x PUE 1")


def test_the_building_s_share_counts():
    assert replace(CARD, pue=1.4).kilograms == pytest.approx(15_750)


def test_small_runs_keep_their_figures():
    assert Emissions(hours=0.5, watts=30, kg_per_kwh=0.4).statement().startswith("0.006 kg CO2 equivalent = 0.5 h")


@pytest.mark.parametrize(
    ("name", "value"),
    [("hours", -1), ("watts", -5), ("kg_per_kwh", float("nan")), ("pue", 0.9), ("hours", float("inf"))],
)
def test_values_that_cannot_be_are_refused(name, value):
    with pytest.raises(InputError, match=f"{name} .* is not a number of at least"):
        replace(CARD, **{name: value})


def zone(root: Path, folder: str, name: str, energy: str = "0") -> Path:
    path = root / folder
    path.mkdir()
    for file, text in {"name": name, "energy_uj": energy, "max_energy_range_uj": str(LIMIT)}.items():
        (path / file).write_text(f"{text}\n", encoding="ascii")
    return path / "energy_uj"


class Clock:
    """Time that stands still until it is moved."""

    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def counters(tmp_path: Path) -> dict[str, Path]:
    return {
        "package": zone(tmp_path, "intel-rapl:0", "package-0", "5000000"),
        "core": zone(tmp_path, "intel-rapl:0:0", "core"),
        "dram": zone(tmp_path, "intel-rapl:0:1", "dram"),
        "platform": zone(tmp_path, "intel-rapl:1", "psys"),
        "again": zone(tmp_path, "intel-rapl-mmio:0", "package-0"),
    }


def test_each_joule_is_counted_once(counters, tmp_path):
    clock = Clock()
    meter = PowerMeter(readable_counters(tmp_path), clock)
    assert meter.names == ("package-0", "dram")
    assert meter.watts() is None  # no time has passed
    for name, energy in {"package": 905_000_000, "core": 800_000_000, "dram": 100_000_000, "platform": 10**9}.items():
        counters[name].write_text(str(energy), encoding="ascii")
    clock.seconds += 10
    assert meter.watts() == pytest.approx(100)
    clock.seconds += 10
    assert meter.watts() == pytest.approx(50)


def test_counters_that_start_again_go_on(counters, tmp_path):
    clock = Clock()
    counters["package"].write_text(str(LIMIT - 30_000_000), encoding="ascii")
    meter = PowerMeter(readable_counters(tmp_path), clock)
    counters["package"].write_text("20000000", encoding="ascii")
    clock.seconds += 5
    assert meter.watts() == pytest.approx(10)


def test_measured_power_takes_the_place_of_the_assumed_and_says_so(counters, tmp_path):
    clock = Clock()
    meter = PowerMeter(readable_counters(tmp_path), clock)
    counters["dram"].write_text("80000000", encoding="ascii")
    clock.seconds += 2
    found = CARD.with_measured_power(meter, rest_watts=300)
    assert (found.watts, found.hours, found.kg_per_kwh) == (340, CARD.hours, CARD.kg_per_kwh)
    assert "340 W (measured by RAPL: package-0, dram; 300 W assumed for the rest)" in found.statement()


def test_what_cannot_be_read_is_left_to_the_assumption(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", "not a number")
    zone(tmp_path, "intel-rapl:1", "package-1").unlink()
    assert readable_counters(tmp_path) == ()
    assert readable_counters(tmp_path / "nowhere") == ()
    assert CARD.with_measured_power(PowerMeter(()), rest_watts=300) is CARD


def test_this_machine_s_counters_are_read_or_absent():
    assert all(counter.read() >= 0 for counter in readable_counters())
