"""Models of the real shapes with random weights: made once, kept as diffusers folders that every peer reads."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from fewstep.models.autoencoder import AutoencoderKL
from fewstep.models.text_encoder import TextEncoder
from fewstep.models.unet import UNet
from fewstep.models.zoo import entry
from fewstep.text.tokenizer import word_tokenizer
from fewstep.weights.parts import Parts
from fewstep.weights.save import save_parts
from fewstep.weights.scheduler import SchedulerConfig

Network = TypeVar("Network", bound=nn.Module)


def random_model(name: str, cache: Path) -> Path:
    """The folder of a model of the catalogue's shape, filled at random; about 5 GB for SD 2."""
    folder = cache / f"random-{name}"
    if not (folder / "model_index.json").is_file():
        save_parts(_random_parts(name), folder)
    return folder


def _random_parts(name: str) -> Parts:
    known = entry(name)
    assert known.unet is not None
    assert known.autoencoder is not None
    assert known.defaults is not None
    torch.manual_seed(0)
    words = word_tokenizer(["a"], 77)
    return Parts(
        name=name,
        family=known.family,
        unet=_perturbed(UNet(known.unet)),
        autoencoder=_perturbed(AutoencoderKL(known.autoencoder)),
        text_encoders=tuple(_perturbed(TextEncoder(config)) for config in known.texts),
        tokenizers=(words,) * len(known.texts),
        scheduler=SchedulerConfig(sampler=known.defaults.sampler, spacing=known.defaults.schedule),
        defaults=known.defaults,
        licence=known.licence,
    )


@torch.no_grad()
def _perturbed(network: Network) -> Network:
    """Norms that do something: PyTorch's own start is 1 and 0."""
    for module in network.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.weight += 0.1 * torch.randn_like(module.weight)
            module.bias += 0.1 * torch.randn_like(module.bias)
    return network.eval().requires_grad_(False)


def inputs(part: str, size: int, batch: int, widths: tuple[int, int]) -> tuple[Tensor, ...]:
    """What a part is called with for pictures of `size` pixels; `widths`: of the text states, and of pooled, or 0."""
    generator, side = torch.Generator().manual_seed(0), size // 8

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    if part == "decode":
        return (normal(4, side, side),)
    if part == "encode":
        return (normal(3, size, size).clamp(-1, 1),)
    context, pooled = widths
    told = (normal(4, side, side), torch.full((batch,), 999.0), normal(77, context))
    sizes = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32).repeat(batch, 1)
    return (*told, normal(pooled), sizes) if pooled else told
