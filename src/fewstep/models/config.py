"""The shapes of the networks as frozen records, read from and written to diffusers' and transformers' configs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fewstep.errors import CheckpointError

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One level of a UNet: `resnets` on the way down (one more on the way up), `depth` transformer blocks each."""

    channels: int
    resnets: int = 2
    depth: int = 0
    heads: int = 8


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The shape of a UNet.

    `context`: width of the text states. `addition`: features of SDXL's second embedding (pooled text and
    `size_features` for each size number), None without. `in_channels` is 9 for inpainting.
    """

    stages: tuple[Stage, ...]
    context: int
    in_channels: int = 4
    out_channels: int = 4
    mid_depth: int = 1
    linear_projection: bool = False
    addition: int | None = None
    size_features: int = 256
    groups: int = 32

    @property
    def emb(self) -> int:
        """Width of the time embedding: four times the first level's channels."""
        return 4 * self.stages[0].channels

    @property
    def size_numbers(self) -> int:
        """How many size numbers SDXL is told: 6 for the base, 5 (with the aesthetic score) for the refiner."""
        if self.addition is None:
            return 0
        alone = self.addition == self.context + 5 * self.size_features  # one text tower gives states and pooled
        return 5 if alone else 6

    @property
    def pooled(self) -> int:
        """Width of the pooled text embedding, 0 without one."""
        return self.addition - self.size_numbers * self.size_features if self.addition else 0

    @classmethod
    def from_diffusers(cls, config: Config) -> UNetConfig:
        """From a `UNet2DConditionModel` config.json; CheckpointError names a setting this family has not."""
        _check(config, "UNet", _UNET_FIXED)
        channels = config["block_out_channels"]
        count = len(channels)
        downs = config.get("down_block_types", _DOWN_TYPES)
        heads = _per_level(config.get("num_attention_heads") or config.get("attention_head_dim", 8), count)
        depths = _per_level(config.get("transformer_layers_per_block", 1), count)
        resnets = _per_level(config.get("layers_per_block", 2), count)
        stages = tuple(
            Stage(channels=c, resnets=r, depth=d if kind == "CrossAttnDownBlock2D" else 0, heads=h)
            for c, r, d, h, kind in zip(channels, resnets, depths, heads, downs, strict=True)
        )
        sdxl = config.get("addition_embed_type") == "text_time"
        return cls(
            stages=stages,
            context=config.get("cross_attention_dim", 1280),
            in_channels=config.get("in_channels", 4),
            out_channels=config.get("out_channels", 4),
            mid_depth=depths[-1],
            linear_projection=bool(config.get("use_linear_projection")),
            addition=config["projection_class_embeddings_input_dim"] if sdxl else None,
            size_features=(config.get("addition_time_embed_dim") or 256),
            groups=config.get("norm_num_groups", 32),
        )

    def to_diffusers(self, sample_size: int) -> dict[str, Any]:
        """A config.json from which diffusers builds this UNet; `sample_size` is the native latent side."""
        stages = self.stages
        cross = [stage.depth > 0 for stage in stages]
        depths = [stage.depth or 1 for stage in stages[:-1]] + [self.mid_depth]
        config: dict[str, Any] = {
            "_class_name": "UNet2DConditionModel",
            "sample_size": sample_size,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "down_block_types": [_DOWN_TYPES[0] if c else "DownBlock2D" for c in cross],
            "up_block_types": ["CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(cross)],
            "block_out_channels": [stage.channels for stage in stages],
            "layers_per_block": _one([stage.resnets for stage in stages]),
            "attention_head_dim": _one([stage.heads for stage in stages]),
            "transformer_layers_per_block": _one(depths),
            "cross_attention_dim": self.context,
            "use_linear_projection": self.linear_projection,
            "norm_num_groups": self.groups,
        }
        if self.addition:
            config |= {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": self.size_features,
                "projection_class_embeddings_input_dim": self.addition,
            }
        return config


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The shape of a KL autoencoder. `scaling_factor` makes the latents' variance about one."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    resnets: int = 2
    latent_channels: int = 4
    groups: int = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = False

    @property
    def factor(self) -> int:
        """Pixels a latent pixel stands for, along one side."""
        return int(2 ** (len(self.channels) - 1))

    @classmethod
    def from_diffusers(cls, config: Config) -> AutoencoderConfig:
        """From an `AutoencoderKL` config.json; CheckpointError names a setting this family has not."""
        _check(config, "autoencoder", _AUTOENCODER_FIXED)
        return cls(
            channels=tuple(config.get("block_out_channels", (128, 256, 512, 512))),
            resnets=config.get("layers_per_block", 2),
            latent_channels=config.get("latent_channels", 4),
            groups=config.get("norm_num_groups", 32),
            scaling_factor=config.get("scaling_factor") or 0.18215,
            force_upcast=bool(config.get("force_upcast", True)),
        )

    def to_diffusers(self, sample_size: int) -> dict[str, Any]:
        """A config.json from which diffusers builds this autoencoder; `sample_size` is the native picture side."""
        count = len(self.channels)
        return {
            "_class_name": "AutoencoderKL",
            "sample_size": sample_size,
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ["DownEncoderBlock2D"] * count,
            "up_block_types": ["UpDecoderBlock2D"] * count,
            "block_out_channels": list(self.channels),
            "layers_per_block": self.resnets,
            "latent_channels": self.latent_channels,
            "norm_num_groups": self.groups,
            "scaling_factor": self.scaling_factor,
            "force_upcast": self.force_upcast,
        }


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The shape of a CLIP text tower. `projection`: width of the pooled embedding, None without that layer."""

    vocabulary: int = 49408
    window: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    inner: int = 3072
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    projection: int | None = None
    eos: int = 49407

    @classmethod
    def from_transformers(cls, config: Config) -> TextConfig:
        """From a `CLIPTextModel` or `CLIPTextModelWithProjection` config.json."""
        shape = {ours: config.get(theirs, usual) for ours, (theirs, usual) in _TEXT.items()}
        if (activation := shape["activation"]) not in ("quick_gelu", "gelu"):
            raise CheckpointError(f"text encoder: hidden_act is {activation!r}; known are 'quick_gelu' and 'gelu'")
        if shape["eos"] == 2 and shape["vocabulary"] == 49408:
            shape["eos"] = 49407  # published configs say 2, wrongly
        projected = "CLIPTextModelWithProjection" in (config.get("architectures") or ())
        return cls(**shape, projection=config.get("projection_dim", 512) if projected else None)

    def to_transformers(self) -> dict[str, Any]:
        """A config.json from which transformers builds this text tower."""
        return {
            "architectures": ["CLIPTextModelWithProjection" if self.projection else "CLIPTextModel"],
            "model_type": "clip_text_model",
            "projection_dim": self.projection or self.width,
            "bos_token_id": self.eos - 1,
            **{theirs: getattr(self, ours) for ours, (theirs, _) in _TEXT.items()},
        }


_DOWN_TYPES = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")

_TEXT: Mapping[str, tuple[str, Any]] = {  # our name, theirs, and what its absence means
    "vocabulary": ("vocab_size", 49408),
    "window": ("max_position_embeddings", 77),
    "width": ("hidden_size", 512),
    "layers": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 8),
    "inner": ("intermediate_size", 2048),
    "activation": ("hidden_act", "quick_gelu"),
    "eos": ("eos_token_id", 49407),
}

# settings that hold one value in the whole family: another one means another network
_UNET_FIXED: Config = {
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "act_fn": "silu",
    "class_embed_type": None,
    "time_cond_proj_dim": None,
    "time_embedding_type": "positional",
    "resnet_time_scale_shift": "default",
    "encoder_hid_dim_type": None,
    "only_cross_attention": False,
    "dual_cross_attention": False,
    "conv_in_kernel": 3,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}
_AUTOENCODER_FIXED: Config = {
    "act_fn": "silu",
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}


def _check(config: Config, what: str, fixed: Config) -> None:
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise CheckpointError(f"{what}: {key} is {config[key]!r}; this family of models has only {value!r}")


def _per_level(value: int | list[int], count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else list(value)


def _one(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values
