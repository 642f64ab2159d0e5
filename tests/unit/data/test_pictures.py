"""Files from the web as pictures: whatever can be read becomes upright RGB, and the rest is told by reason."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from fewstep.data.buckets import Size
from fewstep.data.duplicates import Deduplicator
from fewstep.data.filters import Reason
from fewstep.data.pictures import PictureError, decoded, encoded, fitted, perceptual_hash
from fewstep.errors import InputError


def file(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    data = BytesIO()
    picture.save(data, kind, **options)
    return data.getvalue()


def scene(seed: int, width: int = 200, height: int = 160) -> Image.Image:
    """A smooth picture of a few random colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


def bomb() -> bytes:
    """A tiny PNG whose header promises 50,000 x 50,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


BROKEN = {
    "nothing": (b"", Reason.NOT_A_PICTURE),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", Reason.NOT_A_PICTURE),
    "web page": (b"<!doctype html><html>Not found</html>", Reason.NOT_A_PICTURE),
    "GIF": (file(scene(1), "GIF"), Reason.NOT_A_PICTURE),
    "half a JPEG": (file(scene(1), "JPEG")[:900], Reason.DAMAGED_PICTURE),
    "half a PNG": (file(scene(1))[:900], Reason.DAMAGED_PICTURE),
    "half a WebP": (file(scene(1), "WEBP")[:400], Reason.DAMAGED_PICTURE),
    "bomb": (bomb(), Reason.TOO_LARGE),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_have_a_reason(name):
    data, reason = BROKEN[name]
    with pytest.raises(PictureError) as error:
        decoded(data)
    assert error.value.reason is reason


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    picture = decoded(file(scene(2).convert(mode), kind))
    assert (picture.mode, picture.size) == ("RGB", (200, 160))


def test_sixteen_bits_keep_their_brightness():
    deep = np.full((40, 40), 257 * 100, np.uint16)
    assert np.array(decoded(file(Image.fromarray(deep)))).tolist() == np.full((40, 40, 3), 100).tolist()


def test_transparency_lies_on_white():
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert decoded(file(clear)).getpixel((3, 3)) == (255, 255, 255)


def test_pictures_stand_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert decoded(file(scene(3, 120, 80), "JPEG", exif=exif)).size == (80, 120)


@pytest.mark.parametrize("size", [(300, 100), (100, 300), (100, 100), (33, 50), (401, 200), (1, 1)], ids=str)
@pytest.mark.parametrize("bucket", [Size(64, 96), Size(96, 64), Size(64, 64)], ids=str)
def test_pictures_cover_their_bucket_whatever_their_shape(size, bucket):
    cut, (top, left) = fitted(scene(4, *size), bucket)
    assert cut.size == bucket
    assert min(top, left) == 0, "only the longer side is cut"


def test_a_crop_takes_the_middle_and_says_where():
    wide = Image.new("RGB", (400, 100), "black")
    wide.paste("white", (150, 0, 250, 100))
    cut, where = fitted(wide, Size(100, 100))
    assert where == (0, 150)
    assert cut.getextrema() == ((255, 255),) * 3


def test_shrinking_smooths():
    """Stripes of one pixel become grey and not a moiré of black and white."""
    stripes = Image.fromarray(np.tile(np.array([[0, 255]], np.uint8), (256, 128)).repeat(3).reshape(256, 256, 3))
    cut, _ = fitted(stripes, Size(64, 64))
    assert all(low > 100 and high < 155 for low, high in cut.getextrema())


@pytest.mark.parametrize("again", [{"quality": 60}, {"quality": 90}], ids=str)
def test_looks_survive_compression_and_resizing(again):
    apart = []
    for picture in map(scene, range(20)):
        copy = decoded(file(picture.resize((320, 256)), "JPEG", **again))
        apart.append((perceptual_hash(picture) ^ perceptual_hash(copy)).bit_count())
    assert sorted(apart)[15] <= 3, "most copies are found by the default"
    assert max(apart) <= 8


def test_different_pictures_look_different():
    looks = [perceptual_hash(scene(seed)) for seed in range(60)]
    assert min((a ^ b).bit_count() for i, a in enumerate(looks) for b in looks[:i]) > 15


def test_colours_count_in_looks():
    red, green = (Image.new("RGB", (64, 64), "white") for _ in range(2))
    red.paste((220, 40, 40), (16, 16, 48, 48))
    green.paste((40, 128, 40), (16, 16, 48, 48))
    assert (perceptual_hash(red) ^ perceptual_hash(green)).bit_count() > 3


@pytest.mark.parametrize("encoding", ["jpeg", "png"])
def test_stored_pictures_come_back(encoding):
    picture = scene(5)
    apart = np.abs(np.array(decoded(encoded(picture, encoding))).astype(int) - np.array(picture))
    assert apart.max() == 0 if encoding == "png" else apart.mean() < 1.5


@pytest.mark.parametrize("near", [0, 3, 15])
def test_lookalikes_are_found_up_to_the_last_bit_and_not_beyond(near):
    looks = perceptual_hash(scene(6))
    for flipped in ([], range(near), range(0, near * 8, 8), range(127, 127 - near, -1)):
        seen = Deduplicator(near)
        assert seen.rejection("a", looks) is None
        assert seen.rejection("b", looks ^ sum(1 << bit for bit in flipped)) is Reason.NEAR_DUPLICATE
    assert seen.rejection("c", looks ^ sum(1 << bit for bit in range(near + 1))) is None


def test_equal_files_are_found_even_if_looks_do_not_count():
    seen = Deduplicator(None)
    assert [seen.rejection("a", 1), seen.rejection("b", 1), seen.rejection("a", 2)] == [None, None, Reason.DUPLICATE]
    with pytest.raises(InputError, match=r"max_hamming \(--near\) is 16"):
        Deduplicator(16)
