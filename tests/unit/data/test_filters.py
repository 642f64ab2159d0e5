"""What a collection says, whatever its columns are called, and which pictures a filter keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewstep.data.buckets import Size, bucket_sizes, nearest_bucket
from fewstep.data.columns import Record, completed, record_from
from fewstep.data.filters import Filter, Reason, read_blocklist
from fewstep.errors import InputError

GOOD = Record(caption="a cube", width=512, height=900, aesthetic=5.5, watermark=0.1, unsafe=0.0)
SHOUTED = {"TEXT": "a cube", "URL": "u", "WIDTH": 512, "HEIGHT": 900, "AESTHETIC_SCORE": 5.5, "pwatermark": 0.1}
PLAIN = {"caption": "a cube", "url": "u", "original_width": 512, "original_height": "900", "aesthetic": "5.5"}


@pytest.mark.parametrize("columns", [SHOUTED, PLAIN | {"watermark": 0.1}], ids=["LAION", "img2dataset"])
def test_columns_are_known_by_all_their_names(columns):
    assert record_from({**columns, "punsafe": 0}) == replace(GOOD, url="u")


@pytest.mark.parametrize("nothing", [None, float("nan"), "", "n/a", [], float("inf"), 10**400])
def test_what_is_no_number_is_missing(nothing):
    record = record_from({"pwatermark": nothing, "WIDTH": nothing, "aesthetic": nothing})
    assert (record.watermark, record.width, record.aesthetic) == (None, None, None)


def test_zero_is_a_probability_and_not_missing():
    assert record_from({"pwatermark": 0.0, "watermark": 0.9, "punsafe": "0"}).watermark == 0.0
    assert record_from({"punsafe": "0"}).unsafe == 0.0


def test_the_stored_size_goes_before_the_original():
    assert record_from({"WIDTH": 2000, "width": 256, "original_width": 2000}).width == 256


@pytest.mark.parametrize("caption", [None, "", "  \n", 7, "\ud800"])
def test_a_caption_is_text_that_says_something(caption):
    assert record_from({"caption": caption}).caption is None


def test_captions_are_one_line_that_can_be_stored():
    caption = record_from({"text": "a\n red\tcube\0 \udc80" + "x" * 9000}).caption
    assert caption.startswith("a red cube xxx")
    assert len(caption) == 8192
    caption.encode()


def test_a_table_fills_the_gaps_and_adds_its_hashes():
    both = completed(Record(caption="mine", hashes=("a",)), Record(caption="theirs", aesthetic=6.0, hashes=("a", "b")))
    assert both == Record(caption="mine", aesthetic=6.0, hashes=("a", "b"))


EDGES = [
    ({"width": 511}, Reason.TOO_SMALL),
    ({"height": 511}, Reason.TOO_SMALL),
    ({"width": None, "height": None}, None),  # the picture itself will tell
    ({"aesthetic": 5.0}, Reason.LOW_AESTHETIC),
    ({"aesthetic": 5.0000001}, None),
    ({"watermark": 0.5}, Reason.WATERMARK),
    ({"watermark": 0.4999999}, None),
    ({"unsafe": 0.5}, Reason.UNSAFE),
    ({"unsafe": 0.4999999}, None),
    ({"caption": None}, Reason.NO_CAPTION),
    ({"hashes": ("bad",)}, Reason.BLOCKED),
    ({"aesthetic": None}, Reason.MISSING_AESTHETIC),
    ({"watermark": None}, Reason.MISSING_WATERMARK),
    ({"unsafe": None}, Reason.MISSING_UNSAFE),
]


@pytest.mark.parametrize(("change", "reason"), EDGES)
def test_the_limits_of_stable_diffusion_v1(change, reason):
    assert Filter(blocked=frozenset({"bad"})).rejection(replace(GOOD, **change)) is reason


@pytest.mark.parametrize("name", ["aesthetic", "watermark", "unsafe", "caption"])
def test_missing_values_can_be_kept(name):
    assert Filter(missing="keep").rejection(replace(GOOD, **{name: None})) is None


def test_a_limit_that_is_off_looks_at_nothing():
    off = Filter(min_size=None, min_aesthetic=None, max_watermark=None, max_unsafe=None)
    assert off.rejection(Record(caption="a", width=1, aesthetic=-1.0, watermark=1.0)) is None


@given(
    st.builds(
        Record,
        caption=st.just("a"),
        width=st.integers(1, 2000),
        height=st.integers(1, 2000),
        aesthetic=st.none() | st.floats(0, 10),
        watermark=st.none() | st.floats(0, 1),
        unsafe=st.none() | st.floats(0, 1),
    )
)
def test_what_is_kept_without_missing_values_is_kept_with_them(record):
    if Filter().rejection(record) is None:
        assert Filter(missing="keep").rejection(record) is None
        assert min(record.width, record.height) >= 512
        assert record.aesthetic > 5 > 0.5 > max(record.watermark, record.unsafe)


def test_unknown_policies_and_sizes_are_refused():
    with pytest.raises(InputError, match="did you mean 'reject'"):
        Filter(missing="rejct")
    with pytest.raises(InputError, match="min_size is 0"):
        Filter(min_size=0)


def test_a_blocklist_is_read_with_remarks_and_in_any_case(tmp_path):
    (tmp_path / "list.txt").write_text("# withdrawn\nABC123  # why\n\n def456\n")
    assert read_blocklist(tmp_path / "list.txt") == {"abc123", "def456"}
    with pytest.raises(InputError, match=r"none\.txt cannot be read"):
        read_blocklist(tmp_path / "none.txt")


def test_the_buckets_of_1024_are_those_of_sdxl():
    wide = {(2048, 512), (1984, 512), (1920, 512), (1856, 512), (1792, 576), (1728, 576), (1664, 576), (1600, 640)}
    wide |= {(1536, 640), (1472, 704), (1408, 704), (1344, 704), (1344, 768), (1280, 768), (1216, 832), (1152, 832)}
    wide |= {(1152, 896), (1088, 896), (1088, 960), (1024, 960), (1024, 1024)}
    assert set(bucket_sizes(1024)) == wide | {(height, width) for width, height in wide}


@given(st.sampled_from([256, 512, 768, 1024]), st.integers(1, 5000), st.integers(1, 5000))
def test_no_bucket_is_nearer_in_shape_than_the_chosen(side, width, height):
    def stretched(size: Size) -> float:
        across, along = size.width * height, width * size.height
        return max(across, along) / min(across, along)

    sizes = bucket_sizes(side)
    assert stretched(sizes[nearest_bucket(width, height, sizes)]) <= min(map(stretched, sizes)) * (1 + 1e-9)


def test_sides_that_no_step_divides_are_refused():
    with pytest.raises(InputError, match="side 500 is not a multiple of the step 64; take 512"):
        bucket_sizes(500)
    with pytest.raises(InputError, match="multiple of 8"):
        bucket_sizes(512, 12)
    assert bucket_sizes(64) == (Size(64, 64),)
