"""DINOv2 against transformers, on random weights: states of all layers at the trained size and at others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fewstep.distill.pixel_features import MEAN, STD, DinoNetwork
from fewstep.errors import CheckpointError
from fewstep.weights.auxiliary import load_dinov2
from tests import oracles

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 30, "patch_size": 6,
}  # fmt: skip


def saved(folder: Path, **changes: Any) -> transformers.Dinov2Model:
    """A tiny network, also in `folder`, whose weights keep activations near one and are all unlike."""
    oracles.quiet()
    torch.manual_seed(0)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**SHAPE, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) / max(1, parameter[0].numel()) ** 0.5)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("size", [(30, 30), (48, 48), (18, 42), (32, 35)])
def test_the_states_of_all_layers_are_those_of_transformers(gated: bool, size: tuple[int, int], tmp_path: Path) -> None:
    theirs, ours = saved(tmp_path, use_swiglu_ffn=gated), load_dinov2(tmp_path)
    pictures = torch.randn(2, 3, *size)
    wanted = theirs(pictures, output_hidden_states=True)
    states = ours(pictures)
    assert len(states) == len(wanted.hidden_states) == 5
    for ours_k, theirs_k in zip(states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(ours_k, theirs_k, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(ours.layernorm(states[-1])[:, 0], wanted.pooler_output, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_maps_have_each_patch_in_its_place(tmp_path: Path) -> None:
    theirs, ours = saved(tmp_path, out_indices=[0, 1, 2, 3, 4]), DinoNetwork(tmp_path, CPU)
    backbone = transformers.Dinov2Backbone.from_pretrained(tmp_path, apply_layernorm=False)
    pictures = torch.rand(2, 3, 30, 30) * 2 - 1
    normed = ((pictures + 1) / 2 - _planes(MEAN)) / _planes(STD)
    for map_ours, map_theirs in zip(ours.maps(pictures), backbone(normed).feature_maps, strict=True):
        torch.testing.assert_close(map_ours, map_theirs, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(ours.embedded(pictures), theirs(normed).pooler_output, atol=2e-5, rtol=1e-4)


def test_gradients_reach_the_pictures_and_stop_at_the_network(tmp_path: Path) -> None:
    saved(tmp_path)
    ours, pictures = DinoNetwork(tmp_path, CPU), torch.zeros(2, 3, 30, 30, requires_grad=True)
    torch.stack([each.square().sum() for each in ours.maps(pictures)]).sum().backward()
    assert pictures.grad is not None
    assert (pictures.grad != 0).all()
    assert not any(parameter.requires_grad for parameter in ours.network.parameters())


def _planes(values: tuple[float, float, float]) -> Tensor:
    return torch.tensor(values).view(1, 3, 1, 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "dinov2_with_registers"}, "registers"),
        ({"hidden_act": "relu"}, "relu"),
        ({"num_attention_heads": 5}, "divide"),
        ({"patch_size": 0}, "at least 1"),
        ({"image_size": "large"}, "image_size|setting"),
        ({"num_hidden_layers": 3}, "not known"),
        ({"num_hidden_layers": 5}, "missing"),
        ({"image_size": 36}, "another shape"),
    ],
)
def test_a_folder_that_is_not_that_network_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=said):
        load_dinov2(tmp_path)
