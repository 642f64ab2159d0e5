"""Vocabularies: CLIP's byte pairs and small word lists, read from the folders in which they are published."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from fewstep.errors import CheckpointError, InputError, quoted
from fewstep.files import file_size

END = "<|endoftext|>"
# In the order in which they are added: where two are the same token, the last one's flags count.
CLIP_SPECIALS = {"bos_token": "<|startoftext|>", "eos_token": END, "unk_token": END, "pad_token": END}
WORD_SPECIALS = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
SPLITTERS = ["WhitespaceSplit", "Punctuation"]  # of a word list
CLIP_WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
WORD_END = "</w>"
TOKEN_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
LARGEST_FILE = 6_000_000  # bytes; CLIP's own tokenizer.json has 3.6 million
MOST_WORDS = 100_000  # CLIP has 49,408, and as many merges
MOST_PARTS = 250_000  # values of a JSON file, and brackets; CLIP's tokenizer.json has 150,000
MOST_ADDED = 1_000  # tokens; each is searched for in every text
LONGEST_ADDED = 200  # characters
LARGEST_WINDOW = 4096  # transformers writes 10**30 for "not known"

Merges = Sequence[tuple[str, str]]
T = TypeVar("T")
Many = TypeVar("Many", bound=Sized)


class Tokenizer:
    """Text to ids and back; made by `from_folder`, `from_vocabulary` or `word_tokenizer`.

    `bos`, `eos`, `pad` are ids, `unk` too or None for byte pairs; `window` counts what the text tower takes,
    bos and eos included. SD 1 pads with eos; SD 2 and SDXL's second tower with "!", id 0, and so read that
    id for each "!" of a prompt. The folder says so, and the pictures depend on it.
    """

    def __init__(self, backend: tokenizers.Tokenizer, specials: Mapping[str, str], window: int) -> None:
        self.backend, self.specials, self.window = backend, dict(specials), window
        self.bos, self.eos, unk, self.pad = (_id(backend, specials[name]) for name in CLIP_SPECIALS)
        self.unk = unk if isinstance(backend.model, models.WordLevel) else None

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer in `folder`: `tokenizer.json`, or `vocab.json` with `merges.txt`, and their settings.

        Only vocabulary, merges and added tokens are taken from the files, as transformers does for CLIP: no
        pattern of theirs is run. Raises `CheckpointError`.
        """
        try:
            return _load(Path(folder))
        except Exception as error:  # the tokenizers library raises bare ones
            reason = quoted(str(error), 200)[1:-1]
            raise CheckpointError(f"no tokenizer can be read from {folder}: {reason}") from error

    @classmethod
    def from_vocabulary(
        cls,
        vocabulary: Mapping[str, int],
        merges: Merges | None = None,
        *,
        specials: Mapping[str, AddedToken] | None = None,
        added: Mapping[int, AddedToken] | None = None,
        window: int = 77,
    ) -> Tokenizer:
        """CLIP's byte-pair tokenizer, or with `merges` None one for whole words.

        `specials` replaces entries of `CLIP_SPECIALS` or `WORD_SPECIALS`; `added` tokens, by id, are found
        before the text is split. Raises `CheckpointError` when a token has no id or another one.
        """
        defaults = WORD_SPECIALS if merges is None else CLIP_SPECIALS
        named = {name: _added_token(token) for name, token in defaults.items()} | dict(specials or {})
        names = {name: token.content for name, token in named.items()}
        unk = names["unk_token"]
        backend = _words(vocabulary, unk) if merges is None else _byte_pairs(vocabulary, merges, unk)
        _add_tokens(backend, added or {}, named.values())
        bos, eos = ((names[name], _id(backend, names[name])) for name in ("bos_token", "eos_token"))
        backend.post_processor = processors.RobertaProcessing(eos, bos, trim_offsets=False)
        return cls(backend, names, window)

    def __len__(self) -> int:
        return int(self.backend.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, however many they are, without bos and eos."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text that `ids` stand for, in lower case, without bos, eos and padding."""
        visible = [index for index in ids if index not in (self.bos, self.eos, self.pad)]
        text: str = self.backend.decode(visible, skip_special_tokens=False)
        return text.replace(WORD_END, " ").strip()

    def unknown(self, text: str) -> tuple[str, ...]:
        """The words of `text` that the vocabulary lacks, once each; none for byte pairs."""
        found = self.backend.encode(text, add_special_tokens=False)
        spans = (span for index, span in zip(found.ids, found.offsets, strict=True) if index == self.unk)
        return tuple(dict.fromkeys(text[start:end] for start, end in spans))

    def save(self, folder: str | Path) -> None:
        """Write what `from_folder`, and for byte pairs transformers' CLIPTokenizer, read back as the same."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        model = json.loads(self.backend.to_str())["model"]
        added = self.backend.get_added_tokens_decoder().items()
        flags = {str(index): {name: getattr(token, name) for name in TOKEN_FIELDS} for index, token in sorted(added)}
        config = self.specials | {
            "added_tokens_decoder": flags,
            "model_max_length": self.window,
            "tokenizer_class": "CLIPTokenizer" if self.unk is None else "PreTrainedTokenizerFast",
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        self.backend.save(str(folder / "tokenizer.json"))
        if self.unk is None:
            merges = "\n".join(("#version: 0.2", *(" ".join(pair) for pair in model["merges"])))
            (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
            (folder / "merges.txt").write_text(merges + "\n", encoding="utf-8")


def word_tokenizer(words: Sequence[str], window: int) -> Tokenizer:
    """A tokenizer that knows `words`: id 0 is pad, 1 bos, 2 eos, 3 unknown, then `words` in their order.

    A word that is not lower case, or holds a blank or punctuation, would never be found: `InputError`.
    """
    vocabulary = {word: i for i, word in enumerate(("<pad>", "<bos>", "<eos>", "<unk>", *dict.fromkeys(words)))}
    tokenizer = Tokenizer.from_vocabulary(vocabulary, window=window)
    for word in words:
        if tokenizer.encode(word) != [vocabulary[word]]:
            raise InputError(f"{word!r} is not one lower-case word without punctuation")
    return tokenizer


def _byte_pairs(vocabulary: Mapping[str, int], merges: Merges, unknown: str) -> tokenizers.Tokenizer:
    model = models.BPE(
        dict(vocabulary), list(merges), continuing_subword_prefix="", end_of_word_suffix=WORD_END, unk_token=unknown
    )
    backend = tokenizers.Tokenizer(model)
    one_blank = normalizers.Replace(Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), one_blank, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(CLIP_WORD), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    return backend


def _words(vocabulary: Mapping[str, int], unknown: str) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel(dict(vocabulary), unk_token=unknown))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence([getattr(pre_tokenizers, name)() for name in SPLITTERS])
    return backend


def _add_tokens(backend: tokenizers.Tokenizer, added: Mapping[int, AddedToken], named: Iterable[AddedToken]) -> None:
    backend.add_tokens([token for _, token in sorted(added.items())])
    for index, token in added.items():
        if _id(backend, token.content) != index:
            raise CheckpointError(f"the added token {token.content!r} cannot have the id {index}")
    present = {token.content for token in added.values()}
    for token in named:
        _id(backend, token.content)
        if token.content not in present:
            backend.add_special_tokens([token])


def _id(backend: tokenizers.Tokenizer, token: str) -> int:
    index = backend.token_to_id(token)
    if index is None:
        raise CheckpointError(f"the special token {token!r} is not in the vocabulary")
    return index


def _load(folder: Path) -> Tokenizer:
    whole = _read_json(folder / "tokenizer.json")
    vocabulary, merges = _model(whole) if whole else _slow_model(folder)
    config = _read_json(folder / "tokenizer_config.json")
    listed = config.get("added_tokens_decoder")
    if listed is None:  # older folders, where the map has the last word: SD 2's pads with "!", its config does not
        config |= _read_json(folder / "special_tokens_map.json")
        listed = {index: token for token, index in _read_json(folder / "added_tokens.json").items()}
        listed |= {token["id"]: token for token in whole.get("added_tokens", ())}
    if len(_expect(listed, dict)) > MOST_ADDED:
        raise CheckpointError(f"it adds {len(listed):,} tokens; at most {MOST_ADDED:,} are read")
    return Tokenizer.from_vocabulary(
        vocabulary,
        merges,
        specials={name: _added_token(config[name]) for name in CLIP_SPECIALS if config.get(name)},
        added={int(index): _added_token(token, False) for index, token in listed.items()},
        window=_window(config.get("model_max_length", 77)),
    )


def _model(whole: Mapping[str, Any]) -> tuple[dict[str, int], Merges | None]:
    model = _expect(whole.get("model"), dict)
    kind, vocabulary = model.get("type", "BPE"), _vocabulary(model.get("vocab"))
    if kind == "BPE" and model.get("end_of_word_suffix") == WORD_END:
        return vocabulary, _merges(model.get("merges"))
    splitters = _expect(whole.get("pre_tokenizer"), dict).get("pretokenizers", [])
    if kind == "WordLevel" and [splitter["type"] for splitter in splitters] == SPLITTERS:
        return vocabulary, None
    raise CheckpointError(f"its {kind} model is neither CLIP's byte pairs nor a word list of fewstep's")


def _slow_model(folder: Path) -> tuple[dict[str, int], Merges]:
    if not (folder / "vocab.json").is_file() or not (folder / "merges.txt").is_file():
        raise CheckpointError("there is no tokenizer.json, nor vocab.json with merges.txt")
    lines = (line.rstrip("\r") for line in _read_text(folder / "merges.txt").split("\n", MOST_WORDS + 2))
    merges = [line for line in lines if line and not line.startswith("#version")]
    return _vocabulary(_read_json(folder / "vocab.json")), _merges(merges)


def _vocabulary(value: object) -> dict[str, int]:
    vocabulary: dict[str, int] = _few(_expect(value, dict))  # of a string the library would open the file it names
    if len({_expect(index, int) for index in vocabulary.values()}) < len(vocabulary):
        raise CheckpointError("two tokens of the vocabulary share an id")
    return vocabulary


def _merges(value: object) -> Merges:
    return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in _few(_expect(value, list))]


def _few(words: Many) -> Many:
    if len(words) > MOST_WORDS:
        raise CheckpointError(f"it has {len(words):,} words or merges; at most {MOST_WORDS:,} are read")
    return words


def _added_token(value: object, special: bool = True) -> AddedToken:
    if isinstance(value, str):
        value = {"content": value, "normalized": not special}
    fields = {name: field for name, field in _expect(value, dict).items() if name in TOKEN_FIELDS}
    if len(_expect(fields.get("content"), str)) > LONGEST_ADDED:
        raise CheckpointError(f"an added token has over {LONGEST_ADDED} characters")
    return AddedToken(**{**fields, "special": special or fields.get("special", False)})


def _window(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 3:
        raise CheckpointError(f"model_max_length {value!r} is not a number of tokens, 3 or more")
    return int(value) if value <= LARGEST_WINDOW else 77


def _expect(value: object, kind: type[T]) -> T:
    if type(value) is not kind:
        raise CheckpointError(f"{str(value)[:40]!r} stands where a JSON {kind.__name__} should")
    return value


def _read_text(path: Path) -> str:
    if (size := file_size(path)) > LARGEST_FILE:
        raise CheckpointError(f"{path.name} has {size:,} bytes; the limit is {LARGEST_FILE:,}")
    return path.read_text(encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, empty when there is no such file."""
    text = _read_text(path) if path.exists() else "{}"
    if max(text.count(","), text.count("[") + text.count("{")) > MOST_PARTS:
        raise CheckpointError(f"{path.name} has more than {MOST_PARTS:,} values")
    try:
        return _expect(json.loads(text), dict)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not a JSON object; it starts {text[:40]!r}") from error
