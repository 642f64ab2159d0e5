"""Tiny models of the real architectures, built and saved by diffusers, with random weights: the oracle's side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WINDOW = 16
WORDS = ["a", "red", "cube", "on", "top", "of", "blue", "sphere", "photo", "ugly"]
KINDS = ("sd1", "sd2", "turbo", "sdxl", "sdxl-turbo", "refiner", "inpaint")


def tokenizer(folder: Path, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """A byte-level CLIP tokenizer whose merges are the prefixes of a few words."""
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    vocab = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left = word[0]
        for i, letter in enumerate(word[1:], 2):
            right = letter + ("</w>" if i == len(word) else "")
            if (left, right) not in merges:
                merges.append((left, right))
                vocab.append(left + right)
            left += right
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return CLIPTokenizer(
        vocab_file=str(folder / "vocab.json"),
        merges_file=str(folder / "merges.txt"),
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        pad_token=pad,
        model_max_length=WINDOW,
    )


def text_encoder(vocabulary: int, width: int, *, act: str = "quick_gelu", projection: int = 0) -> Any:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=WINDOW,
        hidden_act=act,
        projection_dim=projection or width,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()
    with torch.no_grad():  # the default initialisation makes all prompts nearly alike
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


def unet(**changes: Any) -> diffusers.UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
    }
    return diffusers.UNet2DConditionModel(**(settings | changes)).eval()


def vae(scaling: float = 0.18215) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=scaling,
    ).eval()


SD_NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SDXL_UNET = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 4, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "cross_attention_dim": 32 + 24,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}


def pipeline(kind: str, folder: Path) -> Any:
    """The diffusers pipeline of one kind of model, with random weights."""
    torch.manual_seed(KINDS.index(kind))
    if kind in ("sdxl", "sdxl-turbo", "refiner"):
        return _xl(kind, folder)
    words = tokenizer(folder / "t", pad="!" if kind in ("sd2", "turbo") else "<|endoftext|>")
    second = kind in ("sd2", "turbo")
    pndm = diffusers.PNDMScheduler(**SD_NOISE, skip_prk_steps=True, steps_offset=1)
    scheduler: Any = {
        "sd2": diffusers.DDIMScheduler(
            **SD_NOISE, prediction_type="v_prediction", steps_offset=1, clip_sample=False, set_alpha_to_one=False
        ),
        "turbo": diffusers.EulerDiscreteScheduler(**SD_NOISE, timestep_spacing="trailing", steps_offset=1),
    }.get(kind, pndm)
    changes = {"attention_head_dim": (2, 4, 4), "use_linear_projection": True} if second else {}
    changes |= {"in_channels": 9} if kind == "inpaint" else {}
    cls = diffusers.StableDiffusionInpaintPipeline if kind == "inpaint" else diffusers.StableDiffusionPipeline
    return cls(
        vae=vae(),
        text_encoder=text_encoder(len(words), 32, act="gelu" if second else "quick_gelu"),
        tokenizer=words,
        unet=unet(**changes),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _xl(kind: str, folder: Path) -> Any:
    first, second = tokenizer(folder / "t1"), tokenizer(folder / "t2", pad="!")
    spacing = "trailing" if kind == "sdxl-turbo" else "leading"
    cls = diffusers.EulerAncestralDiscreteScheduler if kind == "sdxl-turbo" else diffusers.EulerDiscreteScheduler
    scheduler = cls(**SD_NOISE, timestep_spacing=spacing, steps_offset=1)
    towers = {"text_encoder": text_encoder(len(first), 32), "tokenizer": first}
    changes: dict[str, Any] = dict(SDXL_UNET)
    if kind == "refiner":
        towers = {"text_encoder": None, "tokenizer": None}
        changes |= {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": 2,
            "cross_attention_dim": 24,
            "projection_class_embeddings_input_dim": 24 + 5 * 8,
        }
    refiner = kind == "refiner"
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline if refiner else diffusers.StableDiffusionXLPipeline
    return pipe(
        vae=vae(0.13025),
        **towers,
        text_encoder_2=text_encoder(len(second), 24, act="gelu", projection=24),
        tokenizer_2=second,
        unet=unet(**changes),
        scheduler=scheduler,
        force_zeros_for_empty_prompt=not refiner,
        add_watermarker=False,
        **({"requires_aesthetics_score": True} if refiner else {}),
    )


def quiet() -> None:
    """Oracles print less."""
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
