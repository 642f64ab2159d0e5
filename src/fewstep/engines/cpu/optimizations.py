"""Optimizations of the engine for CPUs over the plain one, each of which can be turned off."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Optimizations:
    """Which are used. None changes a picture by more than rounding; `benchmarks.speed` shows what each gives."""

    onednn: bool = True
    """Linear layers and the products of convolutions by oneDNN, where that is the faster library."""
    fewer_products: bool = True
    """3x3 convolutions by minimal filtering (arXiv:1509.09308): 36 products where the definition takes 144."""
    upsampled: bool = True
    """A convolution after nearest-neighbour doubling in 25 products, without the doubled map."""
    fused_norms: bool = True
    """GroupNorm and SiLU on the way into a convolution, additions on the way out."""
    merged_projections: bool = True
    """Queries, keys and values in one product where kernels do not gain by three; those of the text once a prompt."""
    kernels: bool = True
    """Convolutions and attention by the compiled kernels, where they have been built."""
