"""No more threads than cores, and a lack of memory that says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

import fewstep
from fewstep import memory
from fewstep.engines.cpu import limits
from fewstep.errors import InputError
from fewstep.pipeline import pipeline, run


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
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


LARGE = 800_000_000  # parameters, as of Stable Diffusion's UNet


@pytest.fixture
def threads(cgroup: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A machine where PyTorch takes 8 threads by itself, and two cores in the container."""
    (cgroup / "cpu.max").write_text("200000 100000")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setattr(limits, "DEFAULT", 8)
    before = torch.get_num_threads()
    mkl = limits._set_threads(8, 0)
    yield 8
    torch.set_num_threads(before)
    limits._set_threads(before, mkl)


@pytest.mark.usefixtures("threads")
def test_large_networks_take_the_cores_of_the_container_and_small_ones_one() -> None:
    assert (limits.threads_for(LARGE), limits.threads_for(6_000_000)) == (2, 1)


def test_a_number_of_threads_that_the_user_chose_stays(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(3)
    assert (limits.threads_for(LARGE), limits.threads_for(6_000_000)) == (3, 3)
    limits._set_threads(threads, 0)
    assert limits.threads_for(6_000_000) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert limits.threads_for(6_000_000) == 8


CHOOSE = """
import torch
usual = torch.get_num_threads()
torch.set_num_threads({})
from fewstep.engines.cpu.limits import DEFAULT, threads_for
print(torch.get_num_threads(), threads_for(6_000_000), threads_for(800_000_000), DEFAULT == usual)
"""


@pytest.mark.parametrize("number", ["usual + 1", "usual"])
def test_a_number_chosen_before_fewstep_is_imported_stays(number: str) -> None:
    """Even PyTorch's own, where it says that somebody chose it: MKL remembers."""
    if number == "usual" and not limits._has_mkl:
        pytest.skip("without MKL, PyTorch's own number is not seen to be chosen")
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    command = [sys.executable, "-c", CHOOSE.format(number)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert found == [found[0]] * 3 + ["True"]


def test_a_limit_in_one_thread_is_none_in_another(threads: int) -> None:
    """Neither what a new thread computes with nor what a model loaded in it takes."""
    if limits._openmp is None:
        pytest.skip("PyTorch's OpenMP cannot be reached")

    def fresh() -> tuple[int, int, int]:
        return torch.get_num_threads(), limits.threads_for(LARGE), limits.threads_for(6_000_000)

    with ThreadPoolExecutor(1) as thread:
        free = thread.submit(fresh).result()
    with limits.cap_threads(threads + 1), ThreadPoolExecutor(1) as thread:
        assert thread.submit(fresh).result() == free


def test_the_callers_number_of_threads_comes_back(threads: int) -> None:
    with limits.cap_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("threads")
def test_a_small_model_is_drawn_by_one_thread_from_python_as_from_the_command_line() -> None:
    """In a thread of the caller's too, which PyTorch gives a number of its own."""
    pipe = fewstep.load("blocks-base", device="cpu")
    seen: list[int] = []
    text, run = pipe.engine.encode_text, pipe.engine._fast.encode_text
    pipe.engine._fast.encode_text = lambda ids: (seen.append(torch.get_num_threads()), run(ids))[1]
    ids = [pipe.tokenizers[0].eos * torch.ones(1, 1, 24, dtype=torch.int64)]
    text(ids)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(text, [ids[0] * 0]).result()
    assert (pipe.engine.threads, seen) == (1, [1, 1])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("output", ["pil", "numpy"])
def test_what_is_done_beside_the_engine_takes_as_many_threads(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine one operation of two threads on the finished picture takes longer than a step."""
    pipe = fewstep.load("blocks-base", device="cpu")
    seen: list[int] = []
    for home, name in ((run, "to_uint8"), (run, "to_numpy"), (pipeline, "to_pil"), (pipeline, "read_init_image")):
        plain = getattr(home, name)
        recording = lambda *given, plain=plain: (seen.append(torch.get_num_threads()), plain(*given))[1]  # noqa: E731
        monkeypatch.setattr(home, name, recording)
    pipe.image_to_image("a red cube", Image.new("RGB", (64, 64)), steps=1, strength=1.0, output=output)
    pipe.decode(torch.zeros(1, 4, 8, 8))
    assert seen == [1, 1, 1]
    assert torch.get_num_threads() == 8


def test_a_lack_of_memory_names_the_bytes() -> None:
    said = "4,503,599,627,370,496 more bytes of memory are needed at once and .* are free; draw fewer"
    with pytest.raises(InputError, match=said), limits.memory_errors():
        torch.empty(1 << 50)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shape"), limits.memory_errors():
        torch.empty(2).view(3)
