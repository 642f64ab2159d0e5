"""Our ids are transformers' ids, for every layout in which CLIP's tokenizer has been published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from fewstep.text.prompt import tokenize
from fewstep.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

MERGES = [
    ("h", "e"),
    ("l", "l"),
    ("he", "ll"),
    ("hell", "o</w>"),
    ("a", "n</w>"),
    ("!", "!</w>"),
    ("'", "t</w>"),
    ("i", "n"),
    ("in", "g</w>"),
]
CHARACTERS = sorted(ByteLevel.alphabet())  # "!" is the first, as in CLIP
TOKENS = [*CHARACTERS, *(c + "</w>" for c in CHARACTERS), *(a + b for a, b in MERGES)]
TOKENS += ["<|startoftext|>", "<|endoftext|>"]
START, END = len(TOKENS) - 2, len(TOKENS) - 1
NASTY = [
    "hello!! an Hello, hello!",
    "  \t\n  many   blanks \u3000 and\u00a0others \r\n",
    "can't we'll I'M it's they've o'clock ''' don't's",
    "E\u0301 \u00c9 \u00e9 \ufb01 \u00bd \u0661\u0662\u0663 1234 12.5 n\u00ba7",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u65e5\u672c\u8a9e \u0395\u03bb \u05d0\u05d1 \ufe0f\u20e3",
    "&amp; &lt;b&gt; &#39; &amp;amp;",
    "a\x00b\x7f\u200by\ufeff z\x1b[0m",
    "<|startoftext|>x<|endoftext|> <|StartOfText|> <|ENDOFTEXT|>",
    "\u0130stanbul stra\u00dfe \u1e9e \u01c5 \u03a3\u03c3\u03c2",
    "a_b-c \u2026 (word:1.2) [x] {y} \\( ^~`|",
    "<cat> a<cat>b <CAT>",
    "",
    " ",
    "!",
]


def described(token: str, normalized: bool = True, **more: object) -> dict[str, object]:
    return {"content": token, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False} | more


def named(pad: str, **more: object) -> dict[str, object]:
    start, end = described("<|startoftext|>", **more), described("<|endoftext|>", **more)
    return {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}


TYPED = {"__type": "AddedToken"}
ENDS = {
    str(START): described("<|startoftext|>", special=False),
    str(END): described("<|endoftext|>", normalized=False, special=False),
}
DECODER = {"0": described("!", normalized=False, special=True), **ENDS}
PLAIN = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
LAYOUTS = {  # tokenizer_config.json, special_tokens_map.json, added_tokens.json, the id that pads
    "sd1": (named("<|endoftext|>", **TYPED), named("<|endoftext|>"), None, END),
    "sd2, whose map overrides": (named("<|endoftext|>", **TYPED), named("!"), None, 0),
    "sdxl tokenizer_2": ({"added_tokens_decoder": DECODER, **PLAIN, "pad_token": "!"}, None, None, 0),
    "a decoder hides the map": (
        {"added_tokens_decoder": ENDS, **PLAIN, "pad_token": "<|endoftext|>"},
        named("!"),
        None,
        END,
    ),
    "textual inversion": (named("<|endoftext|>", **TYPED), None, {"<cat>": END + 1}, END),
    "no settings": ({}, None, None, END),
}


@pytest.fixture(params=LAYOUTS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config, special, added, _ = LAYOUTS[request.param]
    files: dict[str, object] = {
        "vocab.json": {token: index for index, token in enumerate(TOKENS)},
        "tokenizer_config.json": {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", **config},
        "special_tokens_map.json": special,
        "added_tokens.json": added,
    }
    for name, value in files.items():
        if value is not None:
            (tmp_path / name).write_text(json.dumps(value), encoding="utf-8")
    merges = "".join(f"{a} {b}\n" for a, b in MERGES)
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    request.node.padding = LAYOUTS[request.param][3]
    return tmp_path


def assert_same(ours: Tokenizer, theirs: object, texts: list[str] = NASTY) -> None:
    assert (ours.bos, ours.eos, ours.pad) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert len(ours) == len(theirs)
    for text in texts:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


def test_published_folders(folder, request):
    ours, theirs = Tokenizer.from_folder(folder), transformers.CLIPTokenizer.from_pretrained(folder)
    assert ours.pad == request.node.padding
    assert_same(ours, theirs)


def test_folders_of_transformers_5(folder, tmp_path):
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "vocab.json").exists()
    assert_same(Tokenizer.from_folder(tmp_path / "saved"), theirs)


def test_our_folders_are_read_by_transformers(folder, tmp_path):
    ours = Tokenizer.from_folder(folder)
    ours.save(tmp_path / "saved")
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.model_max_length == 77
    assert_same(ours, theirs)
    (tmp_path / "saved" / "tokenizer.json").unlink()  # older readers take the other files
    assert_same(ours, transformers.CLIPTokenizer.from_pretrained(tmp_path / "saved"))
    assert_same(Tokenizer.from_folder(tmp_path / "saved"), theirs)


def test_windows_are_diffusers_windows(folder):
    """What a pipeline of diffusers feeds to its text tower, for short prompts and for cut ones."""
    ours, theirs = Tokenizer.from_folder(folder), transformers.CLIPTokenizer.from_pretrained(folder)
    texts = [*NASTY, "hello an " * 37, "hello an " * 38, "!! " * 100]
    expected = theirs(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    tokens = tokenize(texts, ours, chunk=False)
    assert tokens.ids[:, 0].equal(expected)


def test_any_text(tmp_path):
    ours = Tokenizer.from_vocabulary({token: index for index, token in enumerate(TOKENS)}, MERGES)
    ours.save(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)

    @settings(max_examples=200)
    @given(st.text())
    def same(text: str) -> None:
        assert_same(ours, theirs, [text])

    same()
