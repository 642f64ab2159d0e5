"""CLIP against transformers: both towers, the pictures they are given, and the score, on random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from fewstep.errors import CheckpointError
from fewstep.metrics.clip_score import UserClip, clip_scores, load_clip
from fewstep.metrics.features import load_features
from tests import oracles

PROMPTS = ["a red cube", "a blue sphere on top of a red cube", "ugly photo"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder of a tiny CLIP whose weights keep activations near one."""
    oracles.quiet()
    path = tmp_path_factory.mktemp("clip")
    words = oracles.tokenizer(path / "words")
    config = transformers.CLIPConfig(
        text_config={
            "vocab_size": len(words), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": oracles.WINDOW, "bos_token_id": len(words) - 2,
            "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1,
        },
        vision_config={
            "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
            "image_size": 32, "patch_size": 8, "hidden_act": "gelu",
        },
        projection_dim=24,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape) / max(1, parameter[..., 0].numel() if parameter.ndim else 1) ** 0.5
            )
    model.save_pretrained(path)
    words.save_pretrained(path)
    processor(path).save_pretrained(path)
    return path


def processor(folder: Path) -> transformers.CLIPImageProcessor:
    del folder
    return transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    chance = np.random.default_rng(0)
    small = [chance.integers(0, 256, (5, 6, 3), np.uint8) for _ in PROMPTS]
    sizes = ((64, 48), (33, 90), (32, 32))
    return [
        Image.fromarray(array).resize(size, Image.Resampling.BICUBIC) for array, size in zip(small, sizes, strict=True)
    ]


@torch.no_grad()
def test_both_towers_and_the_score_are_those_of_transformers(folder: Path, pictures: list[Image.Image]) -> None:
    theirs = transformers.CLIPModel.from_pretrained(folder)
    words = transformers.CLIPTokenizer.from_pretrained(folder)
    seen = processor(folder)(pictures, return_tensors="pt")
    said = words(PROMPTS, padding="max_length", max_length=oracles.WINDOW, truncation=True, return_tensors="pt")
    wanted = theirs(**seen, **said)

    ours = UserClip(folder)
    images, texts = ours.images(pictures), ours.texts(PROMPTS)
    torch.testing.assert_close(torch.nn.functional.normalize(images), wanted.image_embeds, atol=2e-5, rtol=0)
    torch.testing.assert_close(torch.nn.functional.normalize(texts), wanted.text_embeds, atol=2e-5, rtol=0)
    cosines = wanted.logits_per_image.diagonal() / theirs.logit_scale.exp()
    torch.testing.assert_close(clip_scores(images, texts), 100 * cosines.clamp(min=0), atol=2e-3, rtol=0)
    assert cosines.std() > 0.005, "all pairs alike would prove nothing"


def test_pictures_come_in_as_transformers_gives_them(folder: Path, pictures: list[Image.Image]) -> None:
    wanted = processor(folder)(pictures, return_tensors="pt")["pixel_values"]
    ours = torch.cat([UserClip(folder).preprocess(picture) for picture in pictures])
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)


def test_the_report_can_name_it(folder: Path) -> None:
    network_id = load_clip(folder).network_id
    assert network_id.name == folder.name
    assert len(network_id.digest) == 16
    assert load_features(folder).network_id == network_id


def test_a_folder_that_is_no_clip_is_refused(folder: Path, tmp_path: Path) -> None:
    text = transformers.CLIPTextModel.from_pretrained(folder)
    text.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError):
        load_clip(tmp_path)
