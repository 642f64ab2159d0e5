"""Carbon emissions of a run, from measured power where it can be read and from stated assumptions elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from fewstep.errors import InputError, MissingExtraError

POWERCAP = Path("/sys/class/powercap")
"""Where Linux shows the energy counters (RAPL) of Intel and AMD processors, often to the administrator alone."""


@dataclass(frozen=True, kw_only=True)
class Emissions:
    """What a run emits: hours x power x carbon intensity x PUE, as in arXiv:1910.09700.

    `watts` is the mean power of all the hardware, `kg_per_kwh` the kg of CO2 equivalent for each kWh of the grid,
    `pue` the power that the building draws for each watt of the hardware (power usage effectiveness, at least 1).
    `power_source` says where `watts` is from. Raises InputError for values that cannot be.
    """

    hours: float
    watts: float
    kg_per_kwh: float
    pue: float = 1.0
    power_source: str = "assumed"

    def __post_init__(self) -> None:
        for name, least in (("hours", 0), ("watts", 0), ("kg_per_kwh", 0), ("pue", 1)):
            value = getattr(self, name)
            if not (isfinite(value) and value >= least):
                raise InputError(f"{name} {value} is not a number of at least {least}")

    @property
    def kilowatt_hours(self) -> float:
        """Energy in kWh, PUE included."""
        return self.hours * self.watts / 1000 * self.pue

    @property
    def kilograms(self) -> float:
        """kg of CO2 equivalent."""
        return self.kilowatt_hours * self.kg_per_kwh

    def statement(self) -> str:
        """One line with the result and all that it rests on, for model cards and logs."""
        return (
            f"{_format_quantity(self.kilograms)} kg CO2 equivalent = {_format_quantity(self.hours)} h x "
            f"{_format_quantity(self.watts)} W ({self.power_source}) x {self.kg_per_kwh:g} kg/kWh x PUE {self.pue:g}"
        )

    def with_measured_power(self, meter: PowerMeter, *, rest_watts: float) -> Emissions:
        """The same with the mean power that `meter` measured; unchanged where it can read nothing.

        `rest_watts` is the assumed power of what the meter does not measure: graphics cards, disks, fans.
        """
        watts = meter.watts()
        if watts is None:
            return self
        source = f"measured by RAPL: {', '.join(meter.names)}; {_format_quantity(rest_watts)} W assumed for the rest"
        return replace(self, watts=watts + rest_watts, power_source=source)


def _format_quantity(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


class EnergyCounter(NamedTuple):
    """An energy counter of the processor: `path` holds microjoules, and starts again from 0 at `limit`."""

    name: str
    path: Path
    limit: int

    def read(self) -> int:
        """The counter in microjoules."""
        return int(self.path.read_text(encoding="ascii"))


def readable_counters(root: Path = POWERCAP) -> tuple[EnergyCounter, ...]:
    """The counters of whole processors and of memory under `root` that may be read; empty where there are none.

    Left out: what counts the same energy again, the cores within a processor and the platform around it.
    """
    zones = sorted(root.glob("intel-rapl:*"))
    counters = [counter for zone in zones if (counter := _energy_counter(zone)) is not None]
    return tuple(counter for counter in counters if counter.name.startswith(("package", "dram")))


def _energy_counter(zone: Path) -> EnergyCounter | None:
    try:
        name = (zone / "name").read_text(encoding="ascii").strip()
        limit = int((zone / "max_energy_range_uj").read_text(encoding="ascii"))
        counter = EnergyCounter(name, zone / "energy_uj", limit)
        counter.read()
    except (OSError, ValueError):
        return None
    return counter


class PowerMeter:
    """Measures the mean power of processors and memory from when it is made; of no graphics card.

    Counters start again after a few minutes of heavy load at the earliest, and a second round is not data: call
    `watts` at least once a minute.
    """

    def __init__(
        self, counters: tuple[EnergyCounter, ...] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.counters = readable_counters() if counters is None else counters
        self.clock = clock
        self.started = clock()
        self.microjoules = 0
        self._last = [counter.read() for counter in self.counters]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the counters."""
        return tuple(counter.name for counter in self.counters)

    def watts(self) -> float | None:
        """Mean power since the meter was made; None where nothing can be read, or no time has passed."""
        seconds = self.clock() - self.started
        now = [counter.read() for counter in self.counters]
        for counter, before, after in zip(self.counters, self._last, now, strict=True):
            self.microjoules += after - before if after >= before else after - before + counter.limit
        self._last = now
        return self.microjoules / 1e6 / seconds if self.counters and seconds > 0 else None


class CarbonTracker:
    """The emissions that codecarbon measured; None until the run has ended."""

    emissions: Emissions | None = None


@contextmanager
def track_carbon(country: str) -> Iterator[CarbonTracker]:
    """Track a run with codecarbon, offline, on the grid of `country` by its three letters, as "DEU".

    It measures graphics cards too, and assumes what it cannot read. Raises InputError for a country that it does not
    know, for which it would take the mean of the world, and MissingExtraError where it is not installed.
    """
    try:
        from codecarbon import OfflineEmissionsTracker
        from codecarbon.input import DataSource
    except ImportError as error:
        raise MissingExtraError('codecarbon is not installed; install it by: pip install "fewstep[train]"') from error
    if country not in DataSource().get_global_energy_mix_data():  # type: ignore[no-untyped-call]
        raise InputError(f"codecarbon knows no grid of {country!r}; give three letters as in ISO 3166, such as DEU")
    tracker = OfflineEmissionsTracker(
        country_iso_code=country, save_to_file=False, log_level="error", allow_multiple_runs=True
    )
    tracked = CarbonTracker()
    tracker.start()
    try:
        yield tracked
    finally:
        tracker.stop()
        tracked.emissions = _codecarbon_emissions(tracker.final_emissions_data)


def _codecarbon_emissions(data: Any) -> Emissions:
    hours, energy = data.duration / 3600, data.energy_consumed / data.pue  # kWh of the hardware alone
    return Emissions(
        hours=hours,
        watts=1000 * energy / hours,
        kg_per_kwh=data.emissions / data.energy_consumed,
        pue=data.pue,
        power_source=f"codecarbon {data.codecarbon_version}: {data.gpu_model or 'no GPU'}, {data.cpu_model}, memory",
    )
