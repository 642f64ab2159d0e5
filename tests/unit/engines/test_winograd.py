"""Convolutions with fewer products are the same convolutions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fewstep.engines.cpu import winograd
from fewstep.engines.cpu.convolution import affine_of, sums_of
from fewstep.engines.cpu.winograd import (
    STRICT,
    UPSAMPLED,
    WINOGRAD,
    Scheme,
    conv3x3,
    products_by_onednn,
    products_by_torch,
    transformed_weight,
)

SHAPES = [(1, 8, 16, 9, 13), (2, 16, 8, 70, 33), (1, 5, 3, 1, 1), (3, 32, 32, 4, 6)]
SCHEMES = pytest.mark.parametrize("scheme", [WINOGRAD, STRICT, UPSAMPLED], ids=["4x4", "2x2", "upsampled"])


def inputs(batch: int, channels: int, out: int, height: int, width: int) -> tuple[torch.Tensor, ...]:
    x = torch.randn(batch, channels, height, width).contiguous(memory_format=torch.channels_last)
    return x, torch.randn(out, channels, 3, 3) / (3 * channels**0.5), torch.randn(out)


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    x = F.interpolate(x.double(), scale_factor=2.0) if scheme is UPSAMPLED else x.double()
    return F.conv2d(x, weight.double(), bias.double(), padding=1)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@SCHEMES
@pytest.mark.parametrize("shape", SHAPES)
def test_the_convolution_is_exact_up_to_rounding(scheme: Scheme, shape: tuple[int, ...]) -> None:
    x, weight, bias = inputs(*shape)
    for products in (products_by_torch, products_by_onednn):
        found = conv3x3(x, transformed_weight(weight, scheme), bias, scheme, products=products)
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert error(found, exact(x, weight, bias, scheme)) < 3e-6


@SCHEMES
def test_chunks_of_any_size_give_the_same(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = inputs(2, 16, 8, 30, 18)
    for size in (1, 100_000, 1 << 30):
        monkeypatch.setattr(winograd, "CHUNK_BYTES", size)
        found = conv3x3(x, transformed_weight(weight, scheme), bias, scheme)
        assert error(found, exact(x, weight, bias, scheme)) < 3e-6


def test_it_runs_in_inference_mode_and_out_of_it_again() -> None:
    x, weight, bias = inputs(1, 64, 64, 40, 40)
    with torch.inference_mode():
        conv3x3(x, transformed_weight(weight, WINOGRAD), bias, WINOGRAD)
    found = conv3x3(x, transformed_weight(weight, WINOGRAD), bias, WINOGRAD)
    assert error(found, exact(x, weight, bias, WINOGRAD)) < 3e-6


@SCHEMES
def test_the_strict_scheme_rounds_least(scheme: Scheme) -> None:
    x, weight, bias = inputs(1, 256, 64, 16, 16)
    wanted = exact(x, weight, bias, scheme)
    found = error(conv3x3(x, transformed_weight(weight, scheme), bias, scheme), wanted)
    plain = F.interpolate(x, scale_factor=2.0) if scheme is UPSAMPLED else x
    direct = error(F.conv2d(plain, weight, bias, padding=1), wanted)
    assert found < (8 if scheme is WINOGRAD else 2) * direct


@pytest.mark.parametrize("chunk", [1, 1 << 30])
def test_activation_and_residual_happen_inside_and_the_border_stays_zero(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "CHUNK_BYTES", chunk)
    x, weight, bias = inputs(2, 16, 8, 10, 7)
    added = torch.tensor([5.0, -3.0])[:, None, None, None]
    residual = torch.randn(2, 8, 10, 7).contiguous(memory_format=torch.channels_last)
    found = conv3x3(
        x,
        transformed_weight(weight, WINOGRAD),
        bias,
        WINOGRAD,
        activate=lambda pictures, rows, out: torch.add(rows, added[pictures], out=out),
        residual=residual,
    )
    assert error(found, exact(x + added, weight, bias, WINOGRAD) + residual) < 3e-6


@torch.no_grad()
def test_a_norm_is_its_scale_and_shift_where_values_lie_far_from_zero() -> None:
    norm = nn.GroupNorm(4, 32)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (torch.randn(3, 32, 20, 12) + 10).contiguous(memory_format=torch.channels_last)
    scale, shift = affine_of(sums_of(x), x.shape[2] * x.shape[3], norm)
    found = x.permute(0, 2, 3, 1) * scale + shift
    wanted = F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double())
    assert error(found.permute(0, 3, 1, 2), wanted) < 1e-5
