"""No more threads than cores, and a lack of memory that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewstep.engines.cpu import limits
from fewstep.errors import InputError


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(limits, "_CGROUP", tmp_path)
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    return tmp_path


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 16), ("250000 100000", 2), ("50000 100000", 1)])
def test_a_container_with_the_time_of_fewer_cores(cgroup: Path, quota: str, cores: int) -> None:
    (cgroup / "cpu.max").write_text(quota)
    assert limits.usable_cores() == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 16), ("400000", 4)])
def test_a_container_of_the_older_kind(cgroup: Path, quota: str, cores: int) -> None:
    (cgroup / "cpu").mkdir()
    (cgroup / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (cgroup / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert limits.usable_cores() == cores


def test_threads_are_those_of_the_container_unless_the_user_chose(
    cgroup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cgroup / "cpu.max").write_text("100000 100000")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        limits.spare_threads()
        assert torch.get_num_threads() == 2
        monkeypatch.delenv("OMP_NUM_THREADS")
        limits.spare_threads()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_lack_of_memory_names_the_bytes() -> None:
    said = "4,503,599,627,370,496 more bytes of memory are needed at once and .* are free; draw fewer"
    with pytest.raises(InputError, match=said), limits.memory_errors():
        torch.empty(1 << 50)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shape"), limits.memory_errors():
        torch.empty(2).view(3)
