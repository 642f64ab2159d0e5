"""Training on a card: what a step reads of the host, where its tensors are, and that a recorded step is the same.

Most of it needs no card. Tensors on the meta device stand for those on one: they hold no numbers, so that whatever
waits for a number fails, and a dispatch mode sees each tensor that is left on the CPU.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fewstep.blockworld import render, scenes
from fewstep.blockworld.scene import Scenes
from fewstep.distill.add import AddSettings
from fewstep.distill.pruning import PrunedStudentTask
from fewstep.distill.trajectories import RegressionTask, TrajectoryDataset, TrajectorySettings
from fewstep.distill.turbo import TurboTask
from fewstep.train.datasets import Blockworld, CaptionedBatch, TrajectoryBatch
from fewstep.train.diffusion import DiffusionTask
from fewstep.train.plan import CPU, MicroBatch, Plan
from fewstep.train.replay import MOST, Replay, Tape
from fewstep.train.stages import StageSetup
from fewstep.train.trainer import Objective, Trainer, TrainState
from fewstep.weights.fetch import ASSETS
from fewstep.weights.load import load_model
from fewstep.weights.save import save_model

META = torch.device("meta")
RECIPES = Path(__file__).resolve().parents[3] / "recipes"
on_a_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class OnTheHost(TorchDispatchMode):
    """Notes each operation that a tensor of the CPU goes into or comes out of."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = (leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor))
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.inputs.append(str(func))
        return result


class Latents:
    """A source of random latents, with what a teacher made of them."""

    def batch(self, micro_batch: MicroBatch) -> CaptionedBatch:
        assert micro_batch.device == CPU
        assert micro_batch.tape is None
        trajectories = TrajectoryBatch(
            points=micro_batch.randn("points", 4, 4, 8, 8), end=micro_batch.randn("end", 4, 8, 8)
        )
        captions = ["a red cube", "a small blue sphere"] * micro_batch.count
        return CaptionedBatch(
            captions=captions[: micro_batch.count], latents=micro_batch.randn("x0", 4, 8, 8), trajectories=trajectories
        )


def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the meta device compute in float32 as a card does: it knows no autocast."""
    real = torch.autocast
    monkeypatch.setattr(
        torch,
        "autocast",
        lambda kind, *rest, **options: nullcontext() if kind == "meta" else real(kind, *rest, **options),
    )


def losses(setup: StageSetup, plan: Plan) -> None:
    """The turns of two steps, the second from what the tape holds: nothing else of it may be on the CPU."""
    states = {name: TrainState(objective, plan) for name, objective in setup.objectives.items()}
    assert {state.device for state in states.values()} == {META}
    tapes = {name: Tape(META) for name in states}
    micro_batch = plan.micro_batches(0, 0, 1)[0]
    for first in (True, False):
        host = OnTheHost()
        for name, state in states.items():
            tapes[name].place = 0
            assert state.objective.kind is not None
            with nullcontext() if first else host:
                terms = state.objective.loss(replace(micro_batch, device=META, tape=tapes[name]))
                terms["loss"].backward()
            assert all(term.device == META for term in terms.values())
            assert state.gradients()
        assert host.inputs == []


def settings(folder: Path, **options: object) -> Plan:
    return Plan(folder=folder, steps=5, batch_size=4, warmup_steps=1, log_steps=1, **options)  # type: ignore[arg-type]


TASKS: dict[str, Callable[[Path], Any]] = {
    "diffusion": lambda folder: DiffusionTask(model="blocks-base", data=Latents(), weighting="min_snr", device="meta"),
    "lora": lambda folder: DiffusionTask(model="blocks-base", data=Latents(), lora_rank=2, device="meta"),
    "text": lambda folder: DiffusionTask(model="blocks-base", data=Latents(), train_text=True, device="meta"),
    "pictures": lambda folder: DiffusionTask(model="blocks-base", data=Blockworld(size=64), device="meta"),
    "small": lambda folder: PrunedStudentTask(model="blocks-base", data=Latents(), feature_weight=0.1, device="meta"),
    "walks": lambda folder: RegressionTask(
        model="blocks-base", data=Latents(), trajectories=folder, settings=TrajectorySettings(count=4), device="meta"
    ),
    "turbo": lambda folder: TurboTask(
        model="blocks-base",
        data=Latents(),
        settings=AddSettings(guidance_scale=2.0, mismatched_caption_weight=0.5, regression_weight=1.0),
        device="meta",
    ),
    "turbo from walks": lambda folder: TurboTask(
        model="blocks-base",
        data=Latents(),
        settings=AddSettings(regression_weight=1.0, from_trajectories=True),
        device="meta",
    ),
}


@pytest.mark.parametrize("what", TASKS)
def test_a_step_leaves_nothing_on_the_cpu_and_waits_for_nothing(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_meta(monkeypatch)
    if what == "walks":
        monkeypatch.setattr(TrajectoryDataset, "batch", lambda self, micro_batch: Latents().batch(micro_batch))
    plan = settings(tmp_path)
    losses(TASKS[what](tmp_path).prepare(plan), plan)


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The recipes of the blocks models, which import each other."""
    monkeypatch.syspath_prepend(str(RECIPES))
    import blocks_base
    import blocks_data

    cached = blocks_data.LatentCache(
        latents=torch.zeros(8, 4, 16, 16),
        ids=torch.zeros(8, 6, 24, dtype=torch.uint8),
        slots=torch.zeros(8, 7, dtype=torch.int64),
    )
    monkeypatch.setattr(blocks_base, "write_latents", lambda *rest: None)
    monkeypatch.setattr(blocks_base, "read_once", lambda folder: cached)
    monkeypatch.setattr(blocks_data, "read_once", lambda folder: cached)
    yield blocks_base
    for name in [name for name in sys.modules if name.startswith("blocks_")]:
        del sys.modules[name]


@pytest.mark.parametrize("what", ["autoencoder", "decoder", "diffusion", "sizes", "tiny"])
def test_the_recipes_steps_leave_nothing_on_the_cpu(
    what: str, recipes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import blocks_tiny
    from blocks_data import Cached

    on_meta(monkeypatch)
    base, device = "blocks-base", "meta"
    task = {
        "autoencoder": recipes.Autoencoder(start=base, sizes=(64,), device=device),
        "decoder": recipes.Autoencoder(start=base, sizes=(64,), decoder=True, device=device),
        "diffusion": recipes.Diffusion(
            start=base, autoencoder=base, size_cycle=(128,), varied=0.7, blank=0.2, device=device
        ),
        "sizes": recipes.Diffusion(start=base, autoencoder=base, sizes={128: 0.5, 64: 0.5}, device=device),
        "tiny": blocks_tiny.Tiny(data=Cached(folder=tmp_path), start="blocks-tiny", device=device),
    }[what]
    plan = settings(tmp_path)
    losses(task.prepare(plan), plan)


def test_what_a_card_trained_is_packed_and_shipped(recipes: Any, tmp_path: Path) -> None:
    import blocks_card

    base, out, assets = load_model("blocks-base", dtype=torch.float32), tmp_path / "out", tmp_path / "assets"
    shutil.copytree(ASSETS, assets)
    (out / "decoder").mkdir(parents=True)
    recipes.save_weights(base.networks.autoencoder, out / "decoder")
    for name in ("blocks-base", "blocks-turbo"):
        save_model(base, out / name / "model", torch.float16)
    save_model(load_model("blocks-small", dtype=torch.float32), out / "blocks-small" / "model", torch.float16)
    shutil.copytree(ASSETS / "blocks-tiny", out / "blocks-tiny" / "tiny")
    blocks_card.pack(out, tmp_path / "packed")
    assert {path.stem for path in (tmp_path / "packed").iterdir()} == {"vae", "base", "small", "turbo", "tiny"}
    blocks_card.ship(tmp_path / "packed", assets)
    for path in ASSETS.rglob("*.safetensors"):
        shipped = load_file(assets / path.relative_to(ASSETS))
        same = "blocks-turbo" not in path.parts  # what was packed as turbo here is the base
        assert not same or all(torch.equal(shipped[name], value) for name, value in load_file(path).items())
    own = base.networks.unet.state_dict()
    vectors = load_file(assets / "blocks-turbo" / "vectors.safetensors")
    assert vectors
    assert all(torch.equal(value, own[name].half()) for name, value in vectors.items())
    for path in ASSETS.rglob("training.json"):
        assert (assets / path.relative_to(ASSETS)).read_bytes() == path.read_bytes()


def test_what_is_left_on_the_cpu_is_seen() -> None:
    with OnTheHost() as host:
        torch.zeros(3, device=META) + torch.ones(3).to(META)
    assert len(host.inputs) == 2
    with pytest.raises(RuntimeError):
        bool(torch.zeros((), device=META))


def noisy_line(seed: int, loud: bool = False) -> tuple[nn.Module, Callable[[MicroBatch], Mapping[str, Tensor]]]:
    """A regression whose loss draws of its part, and reads of the host."""
    torch.manual_seed(seed)
    model = nn.Linear(3, 1)

    def read(micro_batch: MicroBatch) -> Mapping[str, Tensor]:
        assert (micro_batch.device, micro_batch.tape) == (CPU, None)
        return {"factor": torch.tensor([float(micro_batch.step + 1)])}

    def loss(micro_batch: MicroBatch) -> Mapping[str, Tensor]:
        x = micro_batch.on(CPU).randn("x", 3)
        error = (model(x) - micro_batch.inputs(read)["factor"] * x.sum(1, keepdim=True)).square().mean()
        return {"loss": error, "mean": x.mean()}

    return model, loss


def stepped(folder: Path, *, replayed: bool, **options: object) -> Trainer:
    """A trainer after six steps, each network's recorded ones replayed if so told, without a card."""
    model, loss = noisy_line(3)
    objective = Objective(network=model, loss=loss, kind=lambda micro_batch: micro_batch.step % 2)
    plan = Plan(folder=folder, steps=6, batch_size=8, warmup_steps=1, learning_rate=0.1, log_steps=1, **options)  # type: ignore[arg-type]
    trainer = Trainer({"model": objective}, plan)
    if replayed:
        state = trainer.states["model"]
        state.replay = Replay(lambda micro_batch: trainer._backward(state, micro_batch), objective.kind, CPU)  # type: ignore[arg-type]
    trainer.run()
    return trainer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_recorded_steps_are_the_computed_ones(accumulate: int, tmp_path: Path) -> None:
    plain = stepped(tmp_path / "plain", replayed=False, gradient_accumulation=accumulate)
    again = stepped(tmp_path / "again", replayed=True, gradient_accumulation=accumulate)
    for ours, theirs in zip(plain.states["model"].parameters, again.states["model"].parameters, strict=True):
        assert torch.equal(ours, theirs)
    assert (tmp_path / "plain" / "log.jsonl").read_text().count("\n") == 6
    assert len(again.states["model"].replay.recorded) == 2 * accumulate  # type: ignore[union-attr]


def test_steps_of_too_many_shapes_are_computed() -> None:
    model, _ = noisy_line(0)
    computed = list[int]()

    def read(micro_batch: MicroBatch) -> Mapping[str, Tensor]:
        return {"x": torch.ones(micro_batch.step + 1, 3)}

    def backward(micro_batch: MicroBatch) -> Mapping[str, Tensor]:
        computed.append(micro_batch.step)
        loss = model(micro_batch.inputs(read)["x"]).sum()
        loss.backward()
        return {"loss": loss.detach()}

    replay = Replay(backward, lambda micro_batch: None, CPU)
    for step in range(MOST + 2):
        model.zero_grad()
        micro_batch = MicroBatch(seed=0, step=step, whole=1, first=0, count=1)
        replay(micro_batch, lambda: [p.grad for p in model.parameters() if p.grad is not None])
        assert float(model.bias.grad) == step + 1
    assert len(replay.recorded) == MOST


def test_a_part_draws_the_same_wherever_it_is() -> None:
    micro_batch = MicroBatch(seed=1, step=2, whole=8, first=4, count=4)
    tape = Tape(CPU)
    first = replace(micro_batch, tape=tape).randn("noise", 3)
    assert torch.equal(first, micro_batch.randn("noise", 3))
    tape.fill(tape.made(5))
    assert torch.equal(first, replace(micro_batch, step=5).randn("noise", 3))
    assert micro_batch.on(META).rand("noise", 3).device == META
    assert micro_batch.on(CPU) is micro_batch


def test_scenes_are_drawn_where_they_are() -> None:
    drawn = scenes(4, seed=0)
    to_device = Scenes(**{name: value.to(META) for name, value in drawn.tensors().items()})
    with OnTheHost() as host:
        assert render(to_device, 32).shape == (4, 3, 32, 32)
    host.inputs.clear()
    with host:
        assert render(to_device, 32).device == META
    assert host.inputs == []


def card_plan(folder: Path, steps: int, precision: str) -> Plan:
    return Plan(folder=folder, steps=steps, batch_size=8, warmup_steps=1, log_steps=1, precision=precision)  # type: ignore[arg-type]


@pytest.mark.gpu
@on_a_card
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("what", ["diffusion", "lora", "small", "turbo"])
def test_five_steps_on_a_card_and_on_again(what: str, precision: str, tmp_path: Path) -> None:
    task = replace(TASKS[what](tmp_path), device="cuda")
    for steps in (3, 5):
        plan = card_plan(tmp_path, steps, precision)
        trainer = Trainer(task.prepare(plan).objectives, plan)
        trainer.run()
        assert trainer.step == steps
        state = next(iter(trainer.states.values()))
        assert state.device.type == "cuda"
        assert state.replay is not None
        assert len(state.replay.recorded) == 1
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 5


@pytest.mark.gpu
@on_a_card
def test_a_recorded_step_on_a_card_is_the_computed_one(tmp_path: Path) -> None:
    def trained(replayed: bool) -> list[Tensor]:
        task = replace(TASKS["diffusion"](tmp_path), device="cuda")
        plan = replace(card_plan(tmp_path / str(replayed), 5, "fp32"), cuda_graphs=replayed)
        trainer = Trainer(task.prepare(plan).objectives, plan)
        trainer.run()
        return trainer.states["model"].parameters

    for ours, theirs in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=2e-4)  # cuDNN may choose other kernels
