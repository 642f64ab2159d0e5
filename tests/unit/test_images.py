"""Pictures in and out: the same numbers as diffusers, bad files refused, and PNG files that remember."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from fewstep import images
from fewstep.errors import InputError, NotFiniteError
from fewstep.images import contact_sheet, mask_to_tensor, read_metadata, save_png, to_numpy, to_pil, to_tensor


def picture(width: int = 40, height: int = 24, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise).convert(mode)


@pytest.fixture(scope="module")
def processors():
    module = pytest.importorskip("diffusers.image_processor")
    mask = module.VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    return module.VaeImageProcessor(do_convert_rgb=True), mask


# --- in ---


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    ("size", "asked"),
    [((40, 24), {}), ((45, 31), {}), ((45, 31), {"width": 64, "height": 16}), ((9, 8), {"height": 20})],
)
def test_pictures_are_diffusers_pictures(processors, mode, size, asked):
    image = picture(*size, mode)
    ours = to_tensor(image, **asked)
    assert ours.dtype == torch.float32
    assert ours.equal(processors[0].preprocess(image, **asked))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "RGBA"])
@pytest.mark.parametrize("size", [(40, 24), (33, 57)])
def test_masks_are_diffusers_masks(processors, mode, size):
    image = picture(*size, mode)
    ours = mask_to_tensor(image, 40, 24)
    assert ours.shape == (1, 1, 24, 40)
    assert ours.unique().tolist() == [0, 1]
    assert ours.equal(processors[1].preprocess(image, height=24, width=40))


def test_arrays_and_tensors_hold_the_same_picture():
    image = picture()
    expected = to_tensor(image)
    assert to_tensor(np.asarray(image)).equal(expected)
    torch.testing.assert_close(to_tensor(np.asarray(image) / 255.0), expected)
    torch.testing.assert_close(to_tensor(np.asarray(image)[:, ::-1] / 255.0), expected.flip(3))
    assert to_tensor(expected).equal(expected)
    assert to_tensor(expected[0]).equal(expected)
    assert to_tensor(torch.cat([expected] * 2)).shape == (2, 3, 24, 40)
    assert to_tensor(expected, width=16, height=9).shape == (1, 3, 8, 16)


@pytest.mark.parametrize("kind", [bool, np.float32, np.float64, np.uint8])
def test_masks_from_arrays(kind):
    half = np.zeros((16, 24))
    half[:, 12:] = 1
    array = (half * 255).astype(kind) if kind is np.uint8 else half.astype(kind)
    expected = torch.from_numpy(half).float()[None, None]
    assert mask_to_tensor(array, 24, 16).equal(expected)
    assert mask_to_tensor(expected[0, 0], 24, 16).equal(expected)
    assert mask_to_tensor(expected, 48, 32)[0, 0, 5].tolist() == [0] * 24 + [1] * 24


ONES = {
    "an array of uint8": lambda half: half.astype(np.uint8),
    "an array with a channel": lambda half: half.astype(np.uint8)[:, :, None],
    "an array of whole numbers": lambda half: half.astype(np.int64),
    "a grey picture": lambda half: Image.fromarray(half.astype(np.uint8)),
    "a coloured picture": lambda half: Image.fromarray(np.stack([half.astype(np.uint8)] * 3, 2)),
    "a picture of whole numbers": lambda half: Image.fromarray(half.astype(np.int32)),
    "a picture of floats": lambda half: Image.fromarray(half.astype(np.float32)),
}


@pytest.mark.parametrize("kind", ONES)
def test_where_no_number_of_a_mask_is_above_1_it_is_white(kind):
    half = np.zeros((16, 24))
    half[:, 12:] = 1
    assert mask_to_tensor(ONES[kind](half), 24, 16).equal(mask_to_tensor(half.astype(bool), 24, 16))


@pytest.mark.parametrize("mask", [np.zeros((16, 24), bool), np.zeros((16, 24), np.uint8), Image.new("L", (24, 16), 9)])
def test_a_mask_that_is_white_nowhere_is_refused(mask):
    with pytest.raises(InputError, match="white nowhere"):
        mask_to_tensor(mask, 24, 16)


def test_a_batch_of_pictures_as_results_hold_it():
    batch = to_tensor(picture())
    batch = torch.cat([batch, batch.flip(2), batch.flip(3)])
    torch.testing.assert_close(to_tensor(to_numpy(batch)), batch)
    bytes_ = (to_numpy(batch) * 255).round().astype(np.uint8)
    torch.testing.assert_close(to_tensor(bytes_), batch)


@pytest.mark.parametrize(
    ("values", "grey"),
    [
        (np.full((8, 8), 200, np.int32), 200),
        (np.array([[0, 65535]] * 8, np.int32).repeat(4, 1), None),
        (np.full((8, 8), 0.5, np.float32), 127),
        (np.full((8, 8), 200.0, np.float32), 200),
    ],
)
def test_whole_numbers_and_floats_are_scaled_not_clipped(values, grey):
    read = ((to_tensor(Image.fromarray(values)) + 1) * 127.5).round()
    assert read.unique().tolist() == ([0.0, 255.0] if grey is None else [grey])


@pytest.mark.parametrize(
    "values", [np.full((8, 8), -1, np.int32), np.full((8, 8), 70000, np.int32), np.full((8, 8), np.nan, np.float32)]
)
def test_whole_numbers_and_floats_outside_are_refused(values):
    with pytest.raises(InputError, match="expected 0 to"):
        to_tensor(Image.fromarray(values))


def test_transparent_parts_are_white():
    image = picture(16, 16, "RGBA")
    image.putalpha(255)
    opaque = to_tensor(image)
    image.paste((9, 9, 9, 0), (0, 0, 8, 16))
    mixed = to_tensor(image)
    assert opaque.equal(to_tensor(picture(16, 16)))
    assert mixed[..., :8].eq(1).all()
    assert mixed[..., 8:].equal(opaque[..., 8:])
    palette = Image.new("P", (8, 8))
    palette.info["transparency"] = 0
    assert to_tensor(palette).eq(1).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "CMYK", "YCbCr", "HSV", "RGBX", "I", "F", "I;16", "I;16B"])
def test_every_mode_is_read(mode):
    assert to_tensor(Image.new(mode, (16, 8))).shape == (1, 3, 8, 16)


def test_16_bits_are_scaled_not_clipped():
    image = Image.fromarray(np.full((8, 8), 0x8080, np.uint16))
    torch.testing.assert_close(to_tensor(image), torch.full((1, 3, 8, 8), 0x80 / 255 * 2 - 1))


@pytest.mark.parametrize(("name", "exact"), [("a.png", True), ("a.webp", True), ("a.jpg", False)])
def test_files_are_read(tmp_path, name, exact):
    picture().save(tmp_path / name, lossless=True)
    read = to_tensor(tmp_path / name)
    assert read.shape == (1, 3, 24, 40)
    assert to_tensor(str(tmp_path / name)).equal(read)
    assert read.equal(to_tensor(picture())) == exact


def test_photographs_stand_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    picture().save(tmp_path / "a.png", exif=exif)
    assert to_tensor(tmp_path / "a.png").equal(to_tensor(picture().transpose(Image.Transpose.ROTATE_270)))
    assert mask_to_tensor(tmp_path / "a.png", 24, 40).shape == (1, 1, 40, 24)


def bomb(width: int, height: int) -> bytes:
    """A PNG file whose header promises far more pixels than it has bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def bad_files(folder: Path) -> dict[str, bytes]:
    picture().save(folder / "good.png")
    picture().save(folder / "good.gif")
    good = (folder / "good.png").read_bytes()
    return {
        "truncated": good[: len(good) // 2],
        "only a header": good[:30],
        "empty": b"",
        "a web page": b"<!DOCTYPE html>",
        "a format we do not open": (folder / "good.gif").read_bytes(),
        "a bomb": bomb(60_000, 60_000),
        "a small bomb": bomb(9_000, 9_000),
        "an illegal size": bomb(0, 8),
    }


@pytest.mark.parametrize(
    "name",
    [
        "truncated",
        "only a header",
        "empty",
        "a web page",
        "a format we do not open",
        "a bomb",
        "a small bomb",
        "an illegal size",
    ],
)
def test_bad_files_are_refused(tmp_path, name, monkeypatch):
    path = tmp_path / "bad.png"
    path.write_bytes(bad_files(tmp_path)[name])
    if "bomb" in name:
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(InputError, match=r"bad\.png cannot be read|over the limit of 64,000,000"):
        to_tensor(path)
    with pytest.raises(InputError):
        mask_to_tensor(path, 8, 8)


BAD_VALUES = {
    "a missing file": ("nothing.png", "nothing.png cannot be read"),
    "a number": (3, "int is not a picture"),
    "too small": (Image.new("RGB", (7, 16)), "7 x 16 pixels is too small"),
    "LAB": (Image.new("La", (8, 8)), "cannot be read"),
    "too large": (Image.new("1", (8_001, 8_000)), "over the limit"),
    "a flat array": (np.zeros(8), "has not 3 flat channels"),
    "a grey float array": (np.zeros((8, 8)), "has not 3 flat channels"),
    "channels first": (np.zeros((3, 8, 8)), "has not 3 flat channels"),
    "floats to 255": (np.full((8, 8, 3), 255.0), "not all within 0 to 1"),
    "a uint8 tensor": (torch.full((3, 8, 8), 255, dtype=torch.uint8), "not all within -1 to 1"),
    "NaN": (torch.full((3, 8, 8), float("nan")), "not all within -1 to 1"),
    "five dimensions": (torch.zeros(1, 1, 3, 8, 8), "has not 3 flat channels"),
    "objects": (np.full((8, 8, 3), None), "cannot be read"),
}


@pytest.mark.parametrize(("value", "message"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_bad_values_are_refused(value, message):
    with pytest.raises(InputError, match=message):
        to_tensor(value)


@pytest.mark.parametrize("asked", [{"width": 0}, {"height": -8}, {"width": 7}])
def test_sizes_of_nothing_are_refused(asked):
    with pytest.raises(InputError, match="too small"):
        to_tensor(picture(), **asked)


# --- out ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_is_diffusers_output(processors, dtype):
    tensor = (torch.randn(2, 3, 16, 24) * 0.8).to(dtype).requires_grad_()
    theirs = processors[0].postprocess(tensor.detach(), "np")
    assert np.array_equal(to_numpy(tensor), theirs)
    for ours, expected in zip(to_pil(tensor), processors[0].postprocess(tensor.detach(), "pil"), strict=True):
        assert ours.tobytes() == expected.tobytes()
        assert (ours.mode, ours.size) == ("RGB", (24, 16))


def test_every_byte_survives_the_round_trip():
    image = Image.fromarray(np.arange(768, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3))
    assert to_pil(to_tensor(image))[0].tobytes() == image.tobytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_pictures_never_become_black_ones(value):
    tensor = torch.zeros(1, 3, 8, 8)
    tensor[0, 0, 0, 0] = value
    with pytest.raises(NotFiniteError):
        to_pil(tensor)


def test_contact_sheet_places_pictures_in_rows():
    sheet = contact_sheet([Image.new("RGB", size, "red") for size in [(8, 8), (4, 6), (8, 8)]], columns=2)
    assert sheet.size == (16, 16)
    assert [sheet.getpixel(at) for at in [(0, 0), (9, 5), (13, 7), (0, 15), (8, 8)]] == [
        (255, 0, 0),
        (255, 0, 0),
        (255, 255, 255),
        (255, 0, 0),
        (255, 255, 255),
    ]
    assert contact_sheet([Image.new("RGB", (8, 8))], columns=5).size == (8, 8)
    with pytest.raises(InputError, match="needs a picture"):
        contact_sheet([], columns=2)


# --- metadata ---

MADE = {
    "prompt": "a red cube,\nSteps: 3 \U0001f600",
    "negative_prompt": 'grey "fog"',
    "steps": 20,
    "sampler": "dpmpp_2m",
    "guidance_scale": 7.5,
    "seed": 2**63 - 1,
    "width": 64,
    "height": 32,
    "model": "blocks-base",
    "schedule": None,
    "versions": {"fewstep": "0.1.0"},
}


def test_metadata_come_back_whole(tmp_path):
    save_png(picture(), tmp_path / "a.png", MADE)
    assert read_metadata(tmp_path / "a.png") == MADE
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert Image.open(tmp_path / "a.png").tobytes() == picture().tobytes()


def test_other_programs_read_the_parameters(tmp_path):
    save_png(picture(), tmp_path / "a.png", {**MADE, "prompt": "a red cube"})
    assert Image.open(tmp_path / "a.png").text["parameters"] == (
        'a red cube\nNegative prompt: grey "fog"\nSteps: 20, Sampler: dpmpp_2m, CFG scale: 7.5, '
        "Seed: 9223372036854775807, Size: 64x32, Model: blocks-base"
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(metadata=st.dictionaries(st.text() | st.sampled_from(sorted(MADE)), JSON, max_size=6))
def test_any_metadata_come_back(tmp_path_factory, metadata):
    path = tmp_path_factory.mktemp("any") / "a.png"
    save_png(Image.new("RGB", (1, 1)), path, metadata)
    assert read_metadata(path) == metadata


@given(text=st.text(), settings=st.text(alphabet="Steps: 12,Size:0x3CFG cal.d"))
def test_any_foreign_parameters_are_read(text, settings):
    found = images._foreign(f"{text}\nSteps: {settings}")
    assert isinstance(found["prompt"], str)


FOREIGN = """a castle, (night:1.2)
second line
Negative prompt: blurry,
ugly
Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 123456, Size: 512x768, \
Model hash: cc6cb27103, Model: v1-5-pruned, Clip skip: 2, TI hashes: "a: 1, b: 2", Version: v1.10.1"""
READ = {
    "steps": 28,
    "sampler": "DPM++ 2M",
    "guidance_scale": 6.5,
    "seed": 123456,
    "width": 512,
    "height": 768,
    "model": "v1-5-pruned",
}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (FOREIGN, {"prompt": "a castle, (night:1.2)\nsecond line", "negative_prompt": "blurry,\nugly", **READ}),
        ("a castle\nSteps: 5, Seed: 1", {"prompt": "a castle", "negative_prompt": "", "steps": 5, "seed": 1}),
        ("Negative prompt: fog\nSteps: 5", {"prompt": "", "negative_prompt": "fog", "steps": 5}),
        ("Steps: 5, Size: 8x", {"prompt": "", "negative_prompt": "", "steps": 5}),
        ("only a prompt", {"prompt": "only a prompt", "negative_prompt": ""}),
    ],
)
def test_foreign_parameters(tmp_path, text, found):
    assert png_with(tmp_path, parameters=text) == found


def png_with(folder: Path, **chunks: str) -> object:
    info = PngImagePlugin.PngInfo()
    for name, text in chunks.items():
        info.add_itxt(name, text, zip=len(text) > 1000)
    Image.new("RGB", (8, 8)).save(folder / "a.png", pnginfo=info)
    return read_metadata(folder / "a.png")


def test_pictures_without_metadata(tmp_path):
    assert png_with(tmp_path) is None
    picture().save(tmp_path / "a.jpg")
    assert read_metadata(tmp_path / "a.jpg") is None


@pytest.mark.parametrize("text", ["not json", "[1]", json.dumps("x" * 70_000), "[" * 60_000, "x" * 2**21])
def test_hostile_metadata_are_refused(tmp_path, text):
    with pytest.raises(InputError, match=r"a\.png"):
        png_with(tmp_path, fewstep=text)


def test_reading_metadata_of_no_picture(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    for name in ("a.txt", "nothing.png"):
        with pytest.raises(InputError, match=f"{name} cannot be read"):
            read_metadata(tmp_path / name)


def test_metadata_too_long_to_read_are_not_written(tmp_path):
    with pytest.raises(InputError, match="the limit is 65536"):
        save_png(picture(), tmp_path / "a.png", {"prompt": "x" * 70_000})
    save_png(picture(), tmp_path / "a.png", {"prompt": "\U0001f600" * 8192, "negative_prompt": "\U0001f600" * 8192})
    assert not list(tmp_path.glob(".*"))


def test_interrupted_saving_leaves_the_old_picture_and_no_part(tmp_path, monkeypatch):
    save_png(picture(), tmp_path / "a.png", {"seed": 1})

    def interrupted(self: Image.Image, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"half a pict")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_png(picture(), tmp_path / "a.png", {"seed": 2})
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert read_metadata(tmp_path / "a.png") == {"seed": 1}


def test_saving_into_no_folder(tmp_path):
    with pytest.raises(InputError, match="there is no folder"):
        save_png(picture(), tmp_path / "nothing" / "a.png", {})
