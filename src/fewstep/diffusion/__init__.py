"""The mathematics of diffusion: noise levels, denoisers, guidance and samplers. Knows no model or image.

Everything is in sigma coordinates, `x = x0 + sigma * eps`. Three things fit together:

- a `NoiseSchedule` says which `sigma` a model's time step `t` means, `sigmas_for` which levels to visit;
- a `Denoiser` is any callable `(x, sigma) -> x0`: `denoiser` makes one from a network, `guided` one from two;
- a sampler is a generator that walks down the levels with a denoiser, and yields a `Step` at each.

The symbols are listed in docs/notation.md.
"""
