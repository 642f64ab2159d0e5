"""The small student: its shape, what it has from its teacher, and how it is taught."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.distill import pruning as small
from fewstep.distill.pruning import (
    BlockFeatures,
    WeightCopyReport,
    block_features,
    distillation_loss,
    pruned_config,
    pruned_student,
)
from fewstep.models.config import Stage, UNetConfig
from fewstep.models.unet import UNet
from fewstep.models.zoo import entry

FULL_SIZE = {  # the published numbers of parameters, and those of the students
    "sd-v1-4": (859_520_964, 579_384_964),
    "sd-v2-1": (865_910_724, None),
    "sdxl-base": (2_567_463_684, None),
    "sdxl-refiner": (2_259_526_660, None),
}


@torch.no_grad()  # not inference_mode: the loss keeps these tensors for the student's backward pass
def teacher_signals(teacher: UNet, *inputs: Tensor | None) -> tuple[Tensor, BlockFeatures]:
    with block_features(teacher) as features:
        return teacher(*inputs), features


def config(*levels: tuple[int, int, int], resnets: int = 2, **options: Any) -> UNetConfig:
    stages = tuple(Stage(channels=c, depth=d, heads=h, resnets=resnets) for c, d, h in levels)
    return UNetConfig(stages=stages, context=8, groups=4, **options)


SD1 = config((8, 1, 2), (16, 1, 2), (24, 1, 2), (24, 0, 2))
XL: dict[str, Any] = {"linear_projection": True, "size_features": 8}
UNEVEN = (Stage(channels=8, resnets=3, heads=2), Stage(channels=16, resnets=1, depth=2, heads=2))
FAMILY = {
    "sd1": SD1,
    "inpaint": replace(SD1, in_channels=9),
    "sd2": config((8, 1, 1), (16, 1, 2), (24, 1, 3), (24, 0, 3), linear_projection=True),
    "sdxl": config((8, 0, 1), (16, 2, 2), (24, 10, 3), mid_depth=10, addition=12 + 6 * 8, **XL),
    "refiner": config((8, 0, 1), (16, 4, 2), (24, 4, 3), (24, 0, 3), mid_depth=4, addition=8 + 5 * 8, **XL),
    "blocks": config((8, 1, 4), (16, 1, 4)),
    "uneven": UNetConfig(stages=UNEVEN, context=8, groups=4),
    "small": config((8, 1, 2), (16, 0, 2), resnets=1),
}
KINDS = pytest.mark.parametrize("kind", FAMILY)


def network(kind: str) -> UNet:
    """A UNet no two tensors of which are alike, unlike fresh norms."""
    unet = UNet(FAMILY[kind])
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.normal_(0, 0.2)
    return unet.requires_grad_(False).eval()  # as loaded models are


def inputs(kind: str) -> tuple[Tensor | None, ...]:
    shape = FAMILY[kind]
    more = (torch.randn(2, shape.pooled), torch.rand(2, shape.size_numbers)) if shape.addition else (None, None)
    return torch.randn(2, shape.in_channels, 16, 16), torch.tensor([10.0, 900.0]), torch.randn(2, 5, 8), *more


def size(unet: nn.Module) -> int:
    return sum(parameter.numel() for parameter in unet.parameters())


def hooks(unet: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in unet.modules())


def pairs(student: Any, teacher: Any) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Each layer of a student and the one it must be a copy of."""
    for ours, theirs in zip(student.down_blocks, teacher.down_blocks, strict=True):
        yield ours.resnets[0], theirs.resnets[0]
        yield ours.downsamplers, theirs.downsamplers
        if ours.attentions:
            yield ours.attentions[0], theirs.attentions[0]
    for ours, theirs in zip(student.up_blocks, teacher.up_blocks, strict=True):
        for kind in ("resnets", "attentions")[: 1 + bool(len(ours.attentions))]:
            first, second = getattr(ours, kind)
            yield first, getattr(theirs, kind)[0]
            yield second, getattr(theirs, kind)[-1]
        yield ours.upsamplers, theirs.upsamplers
    for name in ("time_embedding", "add_embedding", "conv_in", "mid_block", "conv_norm_out", "conv_out"):
        if getattr(teacher, name) is not None:
            yield getattr(student, name), getattr(teacher, name)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_students_have_the_published_shapes(name: str) -> None:
    shape, (before, after) = entry(name).unet, FULL_SIZE[name]
    assert shape is not None
    with torch.device("meta"):
        teacher = UNet(shape)
    student, report = pruned_student(teacher)
    assert size(teacher) == before == report.copied_parameters + report.dropped_parameters
    assert size(student) == report.copied_parameters == (after or size(student)) < before
    assert len(report.copied) + len(report.dropped) == len(teacher.state_dict())


def test_the_student_of_sd_v1_4_has_the_shape_of_small_sd() -> None:
    teacher, published = entry("sd-v1-4").unet, entry("small-sd").unet
    assert teacher is not None
    assert pruned_config(teacher) == published
    assert pruned_config(pruned_config(teacher)) == published


@KINDS
def test_every_tensor_of_the_student_is_its_teacher_s(kind: str) -> None:
    """Shapes alone do not say it: on the innermost level all residual blocks of the way up have one shape."""
    teacher = network(kind)
    student, _ = pruned_student(teacher)
    inputs = 0
    for ours, theirs in pairs(student, teacher):
        expected = theirs.state_dict()
        assert ours.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())
        inputs += size(ours)
    assert inputs == size(student)


@KINDS
def test_a_student_trains_and_leaves_its_teacher_s_memory_alone(kind: str) -> None:
    teacher = network(kind).to(torch.float64)
    before = copy.deepcopy(teacher.state_dict())
    student, _ = pruned_student(teacher)
    assert student.config == pruned_config(teacher.config)
    assert all(p.requires_grad and p.dtype == torch.float64 and not p.is_meta for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def layers(kind: str) -> list[str]:
    _, report = pruned_student(network(kind))
    return list(dict.fromkeys(".".join(name.split(".")[:4]) for name in report.dropped))


def test_the_middle_layers_are_dropped() -> None:
    assert sorted(layers("sd1")) == sorted(
        [f"down_blocks.{i}.resnets.1" for i in range(4)]
        + [f"down_blocks.{i}.attentions.1" for i in (0, 1, 2)]
        + [f"up_blocks.{i}.resnets.1" for i in range(4)]
        + [f"up_blocks.{i}.attentions.1" for i in (1, 2, 3)]
    )
    assert layers("uneven") == [
        *("down_blocks.0.resnets.1", "down_blocks.0.resnets.2"),
        *("up_blocks.1.resnets.1", "up_blocks.1.resnets.2"),
    ]
    assert layers("small") == []


def test_the_report_is_readable() -> None:
    teacher = network("uneven")
    student, report = pruned_student(teacher)
    lost = size(teacher) - size(student)
    assert str(report) == (
        f"{len(student.state_dict())} tensors ({size(student):,} parameters) copied, {len(report.dropped)} ({lost:,}) "
        "dropped: down_blocks.0.resnets.1, down_blocks.0.resnets.2, up_blocks.1.resnets.1, up_blocks.1.resnets.2"
    )
    whole = WeightCopyReport(copied={"a": "a"}, dropped=(), copied_parameters=1, dropped_parameters=0)
    assert str(whole) == "1 tensors (1 parameters) copied, none dropped"


def test_copying_the_way_up_by_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "teacher_tensor", lambda name, config: name)
    with pytest.raises(AssertionError, match=r"up_blocks\.\d\.resnets\.1\.\S+ is \(.*\), but the teacher's"):
        pruned_student(network("sd1"))


def test_a_student_of_a_small_teacher_draws_the_same() -> None:
    teacher = network("small")
    student, _ = pruned_student(teacher)
    given = inputs("small")
    torch.testing.assert_close(student(*given), teacher(*given))


def test_the_embedded_model_has_a_student(embedded: Any) -> None:
    teacher = embedded.engine.networks.unet
    student, report = pruned_student(teacher)
    assert size(teacher) == size(student) + report.dropped_parameters
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), torch.randn(1, 6, teacher.config.context)
    with torch.no_grad():
        assert student(x, t, context).isfinite().all()


@KINDS
def test_features_of_student_and_teacher_fit(kind: str) -> None:
    teacher, given = network(kind), inputs(kind)
    student, _ = pruned_student(teacher)
    _, theirs = teacher_signals(teacher, *given)
    with block_features(student) as ours:
        student(*given)
    levels = range(len(teacher.config.stages))
    names = [*(f"down_blocks.{i}" for i in levels), "mid_block", *(f"up_blocks.{i}" for i in levels)]
    assert [*ours] == [*theirs] == names
    assert [f.shape for f in ours.values()] == [f.shape for f in theirs.values()]
    assert all(f.requires_grad for f in ours.values())


def test_features_are_the_blocks_outputs_of_the_last_pass() -> None:
    unet = network("blocks")
    expected: list[Tensor] = []
    handle = unet.mid_block.register_forward_hook(lambda module, given, out: expected.append(out))
    with block_features(unet) as features:
        for _ in range(2):
            unet(*inputs("blocks"))
            assert features["mid_block"] is expected[-1]
            assert len(features) == 5
    handle.remove()


class Wrapper(nn.Module):
    """Renames all modules, as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *given: Tensor | None) -> Tensor:
        out: Tensor = self.module(*given)
        return out


def test_features_are_recorded_through_a_wrapper() -> None:
    unet, given = network("sd1"), inputs("sd1")
    wrapped = Wrapper(Wrapper(unet))
    out, expected = teacher_signals(unet, *given)
    with block_features(unet) as features:
        assert torch.equal(wrapped(*given), out)
    assert features.keys() == expected.keys()
    assert all(torch.equal(features[name], expected[name]) for name in expected)


def test_features_are_recorded_when_compiled_within() -> None:
    unet, given = network("blocks"), inputs("blocks")
    with block_features(unet) as features:
        torch.compile(unet, backend="eager")(*given)
        assert len(features) == 5


def test_hooks_go_when_the_context_ends() -> None:
    unet = network("sd1")
    with block_features(unet) as features:
        assert hooks(unet) == 9
    unet(*inputs("sd1"))
    assert hooks(unet) == 0
    assert not features


def test_hooks_go_after_an_exception() -> None:
    unet = network("sd1")
    with pytest.raises(KeyError), block_features(unet):
        raise KeyError
    with pytest.raises(RuntimeError):
        teacher_signals(unet, torch.randn(2, 3, 16, 16), *inputs("sd1")[1:])  # three channels
    assert hooks(unet) == 0


@KINDS
def test_the_loss_of_identical_networks_is_zero(kind: str) -> None:
    teacher, given = network(kind), inputs(kind)
    with block_features(twin := copy.deepcopy(teacher)) as features:
        out = twin(*given)
    teacher_out, expected = teacher_signals(teacher, *given)
    terms = distillation_loss(out, teacher_out, features, expected)
    assert {name: term.item() for name, term in terms.items()} == {"loss": 0, "output": 0, "features": 0}


def test_the_terms_are_weighted_sums_of_mean_squares() -> None:
    ours = {"a": torch.full((2, 4), 2.0), "b": torch.full((3, 1), 5.0)}
    theirs = {"a": torch.zeros(2, 4), "b": torch.full((3, 1), 2.0)}
    terms = distillation_loss(torch.ones(2, 2), torch.zeros(2, 2), ours, theirs, output_weight=0.5, feature_weight=0.1)
    assert {name: pytest.approx(term.item()) for name, term in terms.items()} == {
        "output": 1.0,
        "features": 4.0 + 9.0,  # a sum over the blocks, however many values each has
        "loss": 0.5 * 1.0 + 0.1 * 13.0,
    }


def test_half_precision_is_compared_in_float32() -> None:
    ours, theirs = (torch.full((4,), value, dtype=torch.bfloat16) for value in (1.0625, 0.0))
    terms = distillation_loss(ours, theirs, {"a": ours}, {"a": theirs})
    assert terms["output"].item() == terms["features"].item() == 1.0625**2  # in bfloat16 1.125
    assert all(term.dtype == torch.float32 and term.shape == () for term in terms.values())


def test_outputs_alone_need_no_features() -> None:
    terms = distillation_loss(torch.ones(2), torch.zeros(2), {}, {}, output_weight=3.0, feature_weight=0.0)
    assert (terms["loss"].item(), terms["features"].item()) == (3.0, 0.0)


def test_features_that_do_not_fit_are_refused() -> None:
    out, one, two = torch.ones(1), {"a": torch.ones(2, 1)}, {"a": torch.ones(2, 2)}
    with pytest.raises(AssertionError, match="no features were recorded"):
        distillation_loss(out, out, {}, {})
    with pytest.raises(AssertionError, match=r"student \['a'\], of the teacher \[\]"):
        distillation_loss(out, out, one, {})
    with pytest.raises(AssertionError, match=r"student \(2, 1\), teacher \(2, 2\)"):  # would broadcast
        distillation_loss(out, out, one, two)


@pytest.mark.parametrize("signals", ["teacher_signals", "a plain call with gradients"])
def test_gradients_reach_the_student_only(signals: str) -> None:
    teacher, given = network("sdxl").requires_grad_(True).train(), inputs("sdxl")
    before = copy.deepcopy(teacher.state_dict())
    student, _ = pruned_student(teacher)
    with block_features(student) as ours, block_features(teacher) as theirs:
        out = student(*given)
        if signals == "teacher_signals":
            teacher_out, theirs = teacher_signals(teacher, *given)
            assert not any(tensor.requires_grad for tensor in (teacher_out, *theirs.values()))
        else:
            teacher_out = teacher(*given)
        torch.autograd.backward(distillation_loss(out, teacher_out, ours, theirs)["loss"])
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert teacher.training
    assert hooks(teacher) == 0


def test_the_feature_term_alone_teaches_the_first_blocks() -> None:
    """Block outputs have gradients of their own, not those through the output."""
    teacher, given = network("blocks"), inputs("blocks")
    student, _ = pruned_student(teacher)
    with block_features(student) as ours:
        out = student(*given)
    teacher_out, theirs = teacher_signals(teacher, *given)
    torch.autograd.backward(distillation_loss(out, teacher_out, ours, theirs)["features"])
    trained = {name for name, p in student.named_parameters() if p.grad is not None}
    assert "down_blocks.0.resnets.0.conv1.weight" in trained
    assert "conv_out.weight" not in trained  # after the last block


def test_a_student_learns_its_teacher() -> None:
    teacher, given = network("blocks"), inputs("blocks")
    student, _ = pruned_student(teacher)
    teacher_out, theirs = teacher_signals(teacher, *given)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    losses = []
    with block_features(student) as ours:
        for _ in range(30):
            terms = distillation_loss(student(*given), teacher_out, ours, theirs)
            optimizer.zero_grad()
            torch.autograd.backward(terms["loss"])
            optimizer.step()
            losses.append(terms["loss"].item())
    assert losses[-1] < 0.5 * losses[0]
