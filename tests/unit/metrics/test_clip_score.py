"""CLIP score, features and distances: their definitions, and that a report can say what made them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.blockworld import captions, render, scenes
from fewstep.errors import CheckpointError, InputError
from fewstep.evaluate.folders import write_fid
from fewstep.images import to_pil
from fewstep.metrics.clip_score import BlockClip, clip_scores, mean_score
from fewstep.metrics.distances import distances
from fewstep.metrics.features import load_features
from fewstep.metrics.pixels import image_files, is_black, open_image, resized_tensor


@pytest.fixture(scope="module")
def clip() -> BlockClip:
    return BlockClip()


@pytest.fixture(scope="module")
def world():
    """Forty captions and their images."""
    batch = scenes(40, seed=41)
    return captions(batch, seed=0, style="canonical"), to_pil(render(batch, 64))


# CLIP score


def test_the_score_is_100_cosines_and_never_negative():
    images = torch.tensor([[2.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    texts = torch.tensor([[5.0, 0.0], [0.0, 3.0], [-1.0, 0.1]])
    torch.testing.assert_close(clip_scores(images, texts), torch.tensor([100.0, 100 * 0.5**0.5, 0.0]))


def test_pictures_without_their_texts_are_refused():
    with pytest.raises(InputError, match="3 images and 2 texts"):
        clip_scores(torch.zeros(3, 4), torch.zeros(2, 4))


def test_the_error_of_a_mean_falls_with_the_number():
    values = torch.tensor([1.0, 3.0] * 50)
    assert mean_score(values).value == 2
    assert mean_score(values).standard_error == pytest.approx(1.005 / 10, abs=1e-3)
    assert mean_score(values[:1]).standard_error == float("inf")


def test_block_towers_match_pictures_with_their_own_captions(clip, world):
    prompts, images = world
    images, texts = (torch.nn.functional.normalize(x) for x in (clip.images(images), clip.texts(prompts)))
    own = clip_scores(images, texts)
    assert own.mean() > 1.5 * clip_scores(images, texts.roll(1, 0)).mean()
    nearest = (images @ texts.T).argmax(1)
    assert sum(prompts[j] == prompts[i] for i, j in enumerate(nearest.tolist())) >= 0.8 * len(prompts)


def test_block_towers_hear_which_object_is_which(clip):
    batch = scenes(200, seed=42, single=0.0)
    batch = batch[(batch.shape[:, 0] != batch.shape[:, 1])]
    prompts = captions(batch, seed=0, style="canonical")
    words = [prompt.split() for prompt in prompts]
    swapped = [" ".join([*w[:2], w[-1], *w[3:-1], w[2]]) for w in words]
    images = clip.images(to_pil(render(batch, 64)))
    right = clip_scores(images, clip.texts(prompts)) > clip_scores(images, clip.texts(swapped))
    assert right.float().mean() >= 0.85


def test_block_towers_refuse_what_they_cannot_read(clip):
    with pytest.raises(InputError, match="knows no word of 'portrait oil'"):
        clip.texts(["portrait oil"])


# features


def test_features_are_the_same_in_any_batch_and_after_a_file(clip, world, tmp_path):
    _, images = world
    images[0].save(tmp_path / "a.png")
    whole = clip.features(images)
    torch.testing.assert_close(clip.features(images[:1]), whole[:1], atol=1e-4, rtol=1e-4)
    assert torch.equal(clip.features([open_image(tmp_path / "a.png")]), clip.features(images[:1]))


class Inception(torch.nn.Module):
    """As the published one is called: its features are the means of the channels."""

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return img.mean((2, 3)) if return_features else img.sum((1, 2, 3))[:, None]


class Plain(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.amax((2, 3))


@pytest.mark.parametrize("module", [Inception(), Plain()])
def test_torchscript_gets_299_pixels_from_0_to_255(module, tmp_path):
    path = tmp_path / "network.pt"
    torch.jit.script(module).save(path)
    features = load_features(path)
    image = Image.new("RGB", (20, 30), (255, 0, 128))
    torch.testing.assert_close(features.of([image, image]), torch.tensor([[255.0, 0.0, 128.0]] * 2))
    assert features.network_id.name == "network.pt"


def test_another_file_is_refused(tmp_path):
    (tmp_path / "inception.pt").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="not a TorchScript module"):
        load_features(tmp_path / "inception.pt")
    with pytest.raises(InputError, match="no file or folder"):
        load_features(tmp_path / "absent")


def test_shrinking_is_antialiased():
    """Every other column white: without antialiasing all of it would come out white, or black."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = resized_tensor(Image.fromarray(stripes), 16)
    assert 100 < small.min() <= small.max() < 155


# distances


def test_distances_know_like_from_unlike():
    chance = torch.Generator().manual_seed(0)
    real, like = torch.randn(600, 4, generator=chance), torch.randn(300, 4, generator=chance)
    near, again, far = (distances(features, real, "test") for features in (like, like, like + 1))
    assert near.fid.value < 0.2 < 3 < far.fid.low
    assert near.kid.interval.low < 0 < far.kid.interval.low
    assert far.limit == pytest.approx(4, abs=0.7)
    same = pytest.approx((*near.fid, near.limit, near.kid.value))  # but for rounding, which the memory's place decides
    assert (*again.fid, again.limit, again.kid.value) == same


def test_too_few_pictures_say_how_wide_the_interval_is():
    chance = torch.Generator().manual_seed(0)
    warning = distances(torch.randn(12, 4, generator=chance), torch.randn(600, 4, generator=chance), "test").warning()
    assert warning is not None
    assert warning.startswith("12 images are few")
    assert "wide" in warning
    with pytest.raises(InputError, match="9 images"):
        distances(torch.randn(9, 4), torch.randn(60, 4), "test")


# folders


def test_folders_are_compared_and_black_pictures_counted(world, tmp_path):
    _, images = world
    for name, own in (("drawn", images[:19]), ("real", images)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(own):
            image.save(tmp_path / name / f"{i:02d}.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "drawn" / "black.png")
    report = write_fid(tmp_path / "drawn", tmp_path / "real", load_features(), tmp_path / "out")
    text, (head, row) = report.read_text(), (tmp_path / "out" / "fid.csv").read_text().splitlines()
    values = dict(zip(head.split(","), row.split(","), strict=True))
    assert (values["pictures"], values["black"], values["reference"]) == ("20", "1", "40")
    assert float(values["fid_low"]) <= float(values["FID"]) <= float(values["fid_high"])
    assert "block-clip" in text
    assert "20 images are few" in text


def test_a_folder_without_pictures_and_a_broken_one_are_named(tmp_path):
    with pytest.raises(InputError, match="holds no image"):
        image_files(tmp_path)
    (tmp_path / "a.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(InputError, match=r"a\.png cannot be read"):
        open_image(image_files(tmp_path)[0])


def test_black_is_black():
    assert is_black(Image.new("RGB", (8, 8), (2, 0, 1)))
    assert not is_black(Image.new("RGB", (8, 8), (0, 0, 9)))
