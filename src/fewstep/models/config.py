"""The shapes of the networks as frozen records, read from and written to diffusers' and transformers' configs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from fewstep.errors import CheckpointError, quoted

Config = Mapping[str, Any]
T = TypeVar("T")

LARGEST_NUMBER = 1_000_000
"""Of channels, layers, tokens: far above any model's, and small enough to be multiplied."""


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
        channels = _channels(config, (320, 640, 1280, 1280))
        count, downs = len(channels), _block_types(config, len(channels))
        named = "num_attention_heads" if config.get("num_attention_heads") else "attention_head_dim"
        heads = _per_level(config, named, 8, count)
        depths = _per_level(config, "transformer_layers_per_block", 1, count)
        resnets = _per_level(config, "layers_per_block", 2, count)
        stages = tuple(
            Stage(channels=c, resnets=r, depth=d if kind == "CrossAttnDownBlock2D" else 0, heads=h)
            for c, r, d, h, kind in zip(channels, resnets, depths, heads, downs, strict=True)
        )
        sdxl = config.get("addition_embed_type") == "text_time"
        return _checked(
            cls,
            "UNet",
            stages=stages,
            context=config.get("cross_attention_dim", 1280),
            in_channels=config.get("in_channels", 4),
            out_channels=config.get("out_channels", 4),
            mid_depth=depths[-1],
            linear_projection=config.get("use_linear_projection", False),
            addition=(config["projection_class_embeddings_input_dim"] or 0) if sdxl else None,
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
        channels = _channels(config, (64,))
        kinds = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
        fixed = {name: [kind] * len(channels) for name, kind in kinds.items()}
        _check(config, "autoencoder", {**_AUTOENCODER_FIXED, **fixed})
        return _checked(
            cls,
            "autoencoder",
            channels=tuple(channels),
            resnets=config.get("layers_per_block", 1),
            latent_channels=config.get("latent_channels", 4),
            groups=config.get("norm_num_groups", 32),
            scaling_factor=config.get("scaling_factor", 0.18215),
            force_upcast=config.get("force_upcast", True),
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
        _check(config, "text encoder", _TEXT_FIXED)
        shape = {ours: config.get(theirs, usual) for ours, (theirs, usual) in _TEXT.items()}
        if (activation := shape["activation"]) not in ("quick_gelu", "gelu"):
            raise CheckpointError(
                f"text encoder: hidden_act is {quoted(activation)}; known are 'quick_gelu' and 'gelu'"
            )
        if shape["eos"] == 2 and shape["vocabulary"] >= 49408:
            shape["eos"] = 49407  # published configs say 2, wrongly; added tokens come after it
        projected = "CLIPTextModelWithProjection" in str(config.get("architectures"))
        projection = (config.get("projection_dim", 512) or 0) if projected else None
        return _checked(cls, "text encoder", **shape, projection=projection)

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

# Settings that hold one value in the whole family: another one means another network.
_UNET_FIXED: Config = {
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
_AUTOENCODER_FIXED: Config = {
    "act_fn": ("silu", "swish"),
    "in_channels": 3,
    "out_channels": 3,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    "shift_factor": (None, 0),
    "latents_mean": None,
    "latents_std": None,
}
_TEXT_FIXED: Config = {"layer_norm_eps": 1e-5, "model_type": ("clip_text_model", "clip")}
_TINY_FIXED: Config = {
    "act_fn": "relu",
    "in_channels": 3,
    "latent_channels": 4,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "num_decoder_blocks": [3, 3, 3, 1],
    "num_encoder_blocks": [1, 3, 3, 3],
    "out_channels": 3,
    "scaling_factor": 1.0,
    "shift_factor": (0.0, None),
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
}
_KEYS = {  # the names in a config of what the records name otherwise
    "addition": "projection_class_embeddings_input_dim",
    "channels": "block_out_channels",
    "context": "cross_attention_dim",
    "depth": "transformer_layers_per_block",
    "groups": "norm_num_groups",
    "heads": "attention_head_dim",
    "linear_projection": "use_linear_projection",
    "mid_depth": "transformer_layers_per_block",
    "projection": "projection_dim",
    "resnets": "layers_per_block",
    "size_features": "addition_time_embed_dim",
}


def tiny_width(config: Config) -> int:
    """Channels of the tiny autoencoder that an `AutoencoderTiny` config.json describes; raises CheckpointError."""
    width = config.get("decoder_block_out_channels", (64,))[0]
    widths = {f"{side}_block_out_channels": [width] * 4 for side in ("encoder", "decoder")}
    _check(config, "tiny autoencoder", {**_TINY_FIXED, **widths})
    shape: dict[str, int] = _checked(dict, "tiny autoencoder", width=width)
    return shape["width"]


def _check(config: Config, what: str, fixed: Config) -> None:
    for key, values in fixed.items():
        values = values if isinstance(values, tuple) else (values,)
        given = config.get(key, values[0])
        if isinstance(given, list) and given and not isinstance(values[0], list) and given == given[:1] * len(given):
            given = given[0]  # the same at every level
        if given not in values:
            raise CheckpointError(
                f"{what}: {key} is {quoted(given)}; this family of models has only {quoted(values[0])}"
            )


def _block_types(config: Config, count: int) -> list[str]:
    """The kinds of a UNet's levels on the way down, which those on the way up must mirror."""
    downs = _per_level(config, "down_block_types", _DOWN_TYPES, count)
    if not all(kind in _DOWN_TYPES for kind in downs):
        raise CheckpointError(f"UNet: down_block_types is {quoted(downs)}; known are {' and '.join(_DOWN_TYPES[2:])}")
    mirrored = [kind.replace("Down", "Up") for kind in reversed(downs)]
    if (ups := config.get("up_block_types", mirrored)) not in (mirrored, tuple(mirrored)):
        raise CheckpointError(f"UNet: up_block_types is {quoted(ups)}; to these down_block_types belongs {mirrored}")
    return downs


def _checked(kind: Callable[..., T], what: str, **shape: Any) -> T:
    """The config of these values; CheckpointError for one that no network can have, by its key in the file."""
    for name, value in _values(shape):
        wanted = f"a whole number from {(low := int(name not in ('depth', 'eos')))} to {LARGEST_NUMBER}"
        fits = type(value) is int and low <= value <= LARGEST_NUMBER
        if name in ("linear_projection", "force_upcast"):
            wanted, fits = "true or false", isinstance(value, bool)
        elif name == "scaling_factor":
            wanted, fits = "a number from 0.001 to 1000", type(value) in (int, float) and 0.001 <= value <= 1000
        if not fits:
            key = _TEXT.get(name, (name,))[0] if kind is TextConfig else _KEYS.get(name, name)
            raise CheckpointError(f"{what}: {key} is {quoted(value)}; expected {wanted}")
    return kind(**shape)


def _values(shape: Config) -> Iterator[tuple[str, Any]]:
    """Each value of a config that may be wrong, with its name."""
    for name, value in shape.items():
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, Stage):
                yield from _values(vars(each))
            elif name != "activation" and not (each is None and name in ("addition", "projection")):
                yield name, each


def _channels(config: Config, usual: tuple[int, ...]) -> list[Any]:
    """The channels of each level."""
    value = config.get("block_out_channels", usual)
    return _per_level(config, "block_out_channels", usual, len(value) if isinstance(value, list | tuple) else 0)


def _per_level(config: Config, key: str, usual: Any, count: int) -> list[Any]:
    """The values of `key`, which names one for each of `count` levels or one for all."""
    value = config.get(key, usual)
    values = list(value) if isinstance(value, list | tuple) else [value] * count
    if not count or len(values) != count:
        raise CheckpointError(f"{key} is {quoted(value)}; expected a value for each of the network's levels")
    return values


def _one(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values
