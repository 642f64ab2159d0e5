"""Vocabularies that are broken or foreign, word lists, and windows of tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fewstep.errors import CheckpointError, InputError
from fewstep.text.prompt import tokenize
from fewstep.text.tokenizer import Tokenizer, word_tokenizer

COLOURS = ["a", "red", "blue", "cube", "on", ","]


@pytest.fixture
def words() -> Tokenizer:
    vocabulary = ["<pad>", "<bos>", "<eos>", "<unk>", *COLOURS]  # the comma too, as CLIP's has
    return Tokenizer.from_vocabulary({word: index for index, word in enumerate(vocabulary)}, window=12)


# --- word lists ---


def test_word_list_has_fixed_ids():
    tokenizer = word_tokenizer(["red", "cube", "red"], window=16)
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.unk) == (0, 1, 2, 3)
    assert tokenizer.encode("Red cube, RED") == [4, 5, 3, 4]
    assert tokenizer.window == 16
    assert len(tokenizer) == 6
    assert tokenizer.decode([1, 4, 5, 2, 0, 0]) == "red cube"


def test_unknown_words_are_named_once_in_the_user_s_spelling():
    tokenizer = word_tokenizer(["a", "red", "cube"], window=16)
    assert tokenizer.unknown("a Zebra-red cube, \U0001f600 Zebra") == ("Zebra", "-", ",", "\U0001f600")
    assert tokenizer.unknown("a red CUBE") == ()


@pytest.mark.parametrize("word", ["Red", "two words", "left-of", "", " red"])
def test_words_that_would_never_be_found_are_refused(word):
    with pytest.raises(InputError, match="lower-case word"):
        word_tokenizer(["cube", word], window=16)


def test_word_list_survives_its_folder(tmp_path):
    tokenizer = word_tokenizer(["red", "cube"], window=16)
    tokenizer.save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    again = Tokenizer.from_folder(tmp_path)
    text = "a red <eos> cube!"
    assert again.encode(text) == tokenizer.encode(text)
    assert (again.pad, again.bos, again.eos, again.unk, again.window) == (0, 1, 2, 3, 16)


def test_transformers_reads_a_word_list(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = word_tokenizer(["red", "cube"], window=8)
    tokenizer.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ids = theirs("a red cube", padding="max_length", max_length=8).input_ids
    assert tokenize(["a red cube"], tokenizer).ids.flatten().tolist() == ids


# --- files that are not what they should be ---


def clip_folder(folder: Path, **files: object) -> Path:
    """A small CLIP folder in which `files` replaces whole files, by name with `_` for `.`."""
    tokens = ["!", "a", "b", "a</w>", "b</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>"]
    contents: dict[str, object] = {
        "vocab_json": {token: index for index, token in enumerate(tokens)},
        "merges_txt": "#version: 0.2\na b</w>\n",
        "tokenizer_config_json": {"model_max_length": 77},
    }
    for name, value in (contents | files).items():
        text = value if isinstance(value, str) else json.dumps(value)
        folder.joinpath(".".join(name.rsplit("_", 1))).write_text(text, encoding="utf-8")
    return folder


def test_small_folder_loads(tmp_path):
    tokenizer = Tokenizer.from_folder(clip_folder(tmp_path))
    assert tokenizer.encode("AB a b") == [5, 3, 4]
    assert tokenizer.unknown("zebra <|endoftext|>") == ()
    assert (tokenizer.window, tokenizer.unk) == (77, None)


BROKEN = {
    "a git-lfs pointer": ({"vocab_json": "version https://git-lfs.github.com/spec/v1"}, "it starts 'version https"),
    "a web page": ({"vocab_json": "<!DOCTYPE html>"}, "it starts '<!DOCTYPE"),
    "a list": ({"vocab_json": []}, "not a JSON object"),
    "deeply nested": ({"vocab_json": "[" * 100_000}, "not a JSON object"),
    "an id that is text": ({"vocab_json": {"a": "0"}}, "'0' stands where"),
    "an id twice": ({"vocab_json": {"a": 0, "b": 0}}, "share an id"),
    "no specials": ({"vocab_json": {"a": 0, "b</w>": 1, "ab</w>": 2}}, "not in the vocabulary"),
    "a merge of three": ({"merges_txt": "a b a\n"}, ""),
    "a merge of nothing": ({"merges_txt": "a \n"}, ""),
    "a merge of unknown tokens": ({"merges_txt": "x y\n"}, "out of vocabulary"),
    "settings in a list": ({"tokenizer_config_json": []}, "tokenizer_config.json is not"),
    "a window of text": ({"tokenizer_config_json": {"model_max_length": "77"}}, "model_max_length '77'"),
    "a window too small": ({"tokenizer_config_json": {"model_max_length": 2}}, "3 or more"),
    "a padding token elsewhere": ({"tokenizer_config_json": {"pad_token": "zebra"}}, "'zebra' is not in"),
    "a special token of numbers": ({"tokenizer_config_json": {"bos_token": 7}}, "'7' stands where"),
    "flags of text": ({"tokenizer_config_json": {"bos_token": {"content": "a", "lstrip": "no"}}}, ""),
    "an added id elsewhere": ({"added_tokens_json": {"<cat>": 999}}, "cannot have the id 999"),
    "added tokens in a list": ({"tokenizer_config_json": {"added_tokens_decoder": [1]}}, "stands where"),
    "another kind of model": (
        {"tokenizer_json": {"model": {"type": "Unigram", "vocab": {}}, "pre_tokenizer": {}}},
        "neither CLIP's",
    ),
    "GPT-2's byte pairs": (
        {"tokenizer_json": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": {}}},
        "neither CLIP's",
    ),
    "a foreign word list": (
        {
            "tokenizer_json": {
                "model": {"type": "WordLevel", "vocab": {"a": 0}},
                "pre_tokenizer": {"type": "Whitespace"},
            }
        },
        "neither CLIP's",
    ),
    "a vocabulary that names a file": (
        {
            "tokenizer_json": {
                "model": {"type": "BPE", "vocab": "/etc/passwd", "end_of_word_suffix": "</w>", "merges": []}
            }
        },
        "'/etc/passwd' stands where",
    ),
}


@pytest.mark.parametrize(("files", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_named(tmp_path, files, message):
    with pytest.raises(CheckpointError, match="no tokenizer can be read from") as error:
        Tokenizer.from_folder(clip_folder(tmp_path, **files))
    assert message in str(error.value)


def test_empty_and_missing_folders_say_what_is_missing(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match=r"no tokenizer\.json, nor vocab\.json"):
            Tokenizer.from_folder(folder)


@pytest.mark.parametrize("length", [10**30, 1e30, float("nan"), 5000])
def test_unknown_window_is_clip_s(tmp_path, length):
    folder = clip_folder(tmp_path, tokenizer_config_json={"model_max_length": length})
    assert Tokenizer.from_folder(folder).window == 77


# --- windows ---


def test_short_prompts_fill_one_window(words):
    tokens = tokenize(["a red cube", ""], words)
    assert tokens.ids.tolist() == [[[1, 4, 5, 7, 2, 0, 0, 0, 0, 0, 0, 0]], [[1, 2, *[0] * 10]]]
    assert tokens.ids.dtype == torch.int64
    assert (tokens.used, tokens.dropped, tokens.ids.shape[1]) == ((3, 0), (0, 0), 1)


def test_long_prompts_are_split_and_all_get_as_many_windows(words):
    tokens = tokenize(["red " * 23, "blue"], words)
    assert tokens.ids.shape == (2, 3, 12)
    assert tokens.ids[0, :2].tolist() == [[1, *[5] * 10, 2]] * 2
    assert tokens.ids[0, 2].tolist() == [1, 5, 5, 5, 2, *[0] * 7]
    assert tokens.ids[1].tolist() == [[1, 6, 2, *[0] * 9], [1, 2, *[0] * 10], [1, 2, *[0] * 10]]
    assert (tokens.used, tokens.dropped) == ((23, 1), (0, 0))


@pytest.mark.parametrize("count", [9, 10, 11, 20, 21])
def test_windows_are_used_to_the_brim(words, count):
    assert tokenize(["red " * count], words).ids.shape[1] == -(-count // 10)


def test_split_prefers_the_last_comma_near_the_end(words):
    tokens = tokenize(["a, red red red, red red red red blue"], words)  # 11 tokens, the second comma is the 6th
    assert tokens.ids[0, 0].tolist() == [1, 4, 9, 5, 5, 5, 9, 2, 0, 0, 0, 0]
    assert tokens.ids[0, 1].tolist()[:7] == [1, 5, 5, 5, 5, 6, 2]
    early = tokenize(["a, " + "red " * 12], words)  # too early: the window would be left empty
    assert early.ids[0, 0].tolist() == [1, 4, 9, *[5] * 8, 2]


def test_unknown_words_are_not_taken_for_commas():
    tokenizer = word_tokenizer(["red"], window=12)
    tokens = tokenize(["red red red red red red zebra red red red red"], tokenizer)
    assert tokens.ids[0, 0].tolist() == [1, 4, 4, 4, 4, 4, 4, 3, 4, 4, 4, 2]


def test_cutting_counts_what_it_drops(words):
    tokens = tokenize(["red " * 23, "blue"], words, chunk=False)
    assert tokens.ids.shape == (2, 1, 12)
    assert (tokens.used, tokens.dropped) == ((10, 1), (13, 0))


def test_caller_sets_the_least_number_of_windows(words):
    tokens = tokenize(["red"], words, chunks=2)
    assert tokens.ids.tolist() == [[[1, 5, 2, *[0] * 9], [1, 2, *[0] * 10]]]


def test_brackets_are_text(words):
    tokens = tokenize(["(red:1.5)"], words)
    assert tokens.ids[0, 0].tolist()[:3] == [1, words.unk, 5]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("red " * 2049, "8196 characters"),
        ("red " * 101, "11 windows of 10"),
        (7, "not text"),
        ("a \ud83d", "lone surrogate"),
    ],
)
def test_prompts_out_of_limits(words, prompt, message):
    with pytest.raises(InputError, match=message):
        tokenize([prompt], words)
