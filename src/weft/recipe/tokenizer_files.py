"""Tokenizers as files: read, changed and written as JSON, without importing a tokenizer library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from weft.checkpoint.open import read_json
from weft.errors import CheckpointError, MissingDependencyError

VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_ADDED_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass
class TokenizerFiles:
    """The tokenizer of a model: the files of a folder, with those in ``written`` on top and without ``dropped``."""

    name: str
    folder: Path | None
    written: Mapping[str, bytes] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()

    @property
    def exists(self) -> bool:
        """Whether there is a vocabulary."""
        return any(self._has(n) for n in VOCABULARY_FILES)

    @property
    def copies(self) -> dict[str, Path]:
        """Files to copy as they are."""
        if self.folder is None:
            return {}
        names = [n for n in TOKENIZER_FILES if n not in self.written and self._has(n)]
        return {n: self.folder / n for n in names}

    def text(self, name: str) -> str | None:
        """Content of a text file; None if there is none."""
        if name in self.written:
            return self.written[name].decode()
        return (self.folder / name).read_text(encoding="utf-8") if self.folder and self._has(name) else None

    def object(self, name: str) -> dict[str, Any]:
        """Content of a JSON file; empty if there is none."""
        if name in self.written:
            return dict(json.loads(self.written[name]))
        return read_json(self.folder / name) if self.folder and self._has(name) else {}

    @cached_property
    def data(self) -> dict[str, Any]:
        """The content of ``tokenizer.json``, with tokens that only the files beside it name."""
        if self._has("tokenizer.json"):
            data = self.object("tokenizer.json")
        else:
            assert self.folder is not None
            data = _converted(self.folder)
        try:
            return self._complete(data)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            raise CheckpointError(
                f"{self.name}: its tokenizer.json, tokenizer_config.json or added_tokens.json does not list tokens "
                "with their ids, so they cannot be matched with those of the other models. Repair the files, or leave "
                "the tokenizer out of the recipe."
            ) from None

    def _complete(self, data: dict[str, Any]) -> dict[str, Any]:
        known = self._ids(data)
        taken = set(known.values())
        listed = self.object("tokenizer_config.json").get("added_tokens_decoder", {})
        more = [{**added_token(t["content"], int(i)), **t} for i, t in listed.items()]
        more += [added_token(t, int(i)) for t, i in self.object("added_tokens.json").items()]
        extra = {t["content"]: t for t in more if t["content"] not in known and t["id"] not in taken}
        return {**data, "added_tokens": [*(data.get("added_tokens") or []), *extra.values()]}

    @cached_property
    def ids(self) -> dict[str, int]:
        """Every token's id."""
        return self._ids(self.data)

    @property
    def added(self) -> list[dict[str, Any]]:
        """Tokens beside the model's own vocabulary, or with special treatment, in order of their ids."""
        return sorted(self.data["added_tokens"], key=lambda t: int(t["id"]))

    def changed(self, keep: Mapping[str, int], new: Sequence[dict[str, Any]]) -> TokenizerFiles:
        """These files with the tokens of ``keep`` only and with ``new`` added tokens."""
        gone = {t for t in self.ids if t not in keep}
        if not gone and not new:
            return self
        contents = {t["content"] for t in new}
        added = [t for t in self.added if t["content"] in keep and t["content"] not in contents]
        added = sorted([*added, *new], key=lambda t: int(t["id"]))
        model = dict(self.data["model"])
        cut = gone & set(_vocabulary(model))
        if cut:
            _cut(model, cut)
        data = {**self.data, "added_tokens": added, "model": model}
        present = {**keep, **{t["content"]: t["id"] for t in new}}
        files: dict[str, Any] = {"tokenizer.json": data}
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if self._has(name):
                files[name] = _without(self.object(name), gone - set(present))
        config = files.get("tokenizer_config.json", {})
        if "added_tokens_decoder" in config:
            config["added_tokens_decoder"] = {str(t["id"]): {k: t[k] for k in _ADDED_FIELDS} for t in added}
        own = set(_vocabulary(model))
        files["added_tokens.json"] = {t["content"]: t["id"] for t in added if t["content"] not in own}
        written = {n: (json.dumps(v, indent=2, ensure_ascii=False) + "\n").encode() for n, v in files.items()}
        slow = frozenset([*VOCABULARY_FILES, "merges.txt"]) if cut else frozenset({"tekken.json"})
        return TokenizerFiles(self.name, self.folder, {**self.written, **written}, self.dropped | slow)

    def _has(self, name: str) -> bool:
        if name in self.written:
            return True
        return name not in self.dropped and self.folder is not None and (self.folder / name).is_file()

    @staticmethod
    def _ids(data: Mapping[str, Any]) -> dict[str, int]:
        return {**_vocabulary(data["model"]), **{t["content"]: int(t["id"]) for t in data.get("added_tokens") or []}}


def added_token(content: str, number: int) -> dict[str, Any]:
    """An ordinary token that is matched before the text is split.

    >>> added_token("<x>", 7)["id"]
    7
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    return {"id": number, "content": content, **flags}


def _vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        return vocabulary
    return {piece[0]: number for number, piece in enumerate(vocabulary)}


def _cut(model: dict[str, Any], gone: set[str]) -> None:
    """Take tokens out of a model's vocabulary, and the merges that make or use them."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        model["vocab"] = [piece for piece in vocabulary if piece[0] not in gone]
        return
    model["vocab"] = {t: i for t, i in vocabulary.items() if t not in gone}
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""

        def stays(merge: str | list[str]) -> bool:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            return not gone & {left, right, left + right.removeprefix(prefix)}

        model["merges"] = [m for m in model["merges"] if stays(m)]


def _without(value: Any, gone: set[str]) -> Any:
    """A config that names none of the tokens that are gone: a special token without an embedding row breaks a model."""

    def named(entry: Any) -> bool:
        return (entry.get("content") if isinstance(entry, dict) else entry) in gone

    result = {}
    for key, entry in value.items():
        if isinstance(entry, list):
            entry = [e for e in entry if isinstance(e, list) or not named(e)]
        elif key.endswith("_token") and named(entry):
            continue
        result[key] = entry
    return result


def _converted(folder: Path) -> dict[str, Any]:
    """The content that ``tokenizer.json`` would have, from the older files that transformers can convert."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingDependencyError(
            f"{folder}: has no tokenizer.json, and converting its older tokenizer files needs transformers: "
            "pip install 'weft[hf]'."
        ) from None
    try:
        backend = AutoTokenizer.from_pretrained(str(folder), local_files_only=True).backend_tokenizer
        data: dict[str, Any] = json.loads(backend.to_str())
    except Exception as error:  # transformers raises a dozen types here, all mean the same to a user
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be converted to tokenizer.json ({reason}). Save it with transformers' "
            "fast tokenizer first, or leave the tokenizer out of the recipe."
        ) from None
    return data
