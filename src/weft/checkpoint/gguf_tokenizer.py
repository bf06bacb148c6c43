"""The tokenizer of a transformers folder as metadata of GGUF, as llama.cpp's converter writes it.

Byte-level BPE comes from ``tokenizer.json``: tokens, their types, merges, and the name that llama.cpp gives the rule by
which text is cut before merging, recognised by its regular expression. SentencePiece comes from ``tokenizer.model``, whose
few fields are read here without its library. Special tokens and the chat template come from the files beside them.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.checkpoint.folder import read_json
from weft.checkpoint.gguf_header import value_bytes
from weft.errors import CheckpointError, RecipeError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
NO_TOKENIZER = {"tokenizer.ggml.model": value_bytes("string", "no_vocab")}
PRE_TOKENIZERS = {_CUT % r"\p{N}{1,3}": "llama-bpe", _CUT % r"\p{N}": "qwen2"}  # how text is cut -> llama.cpp's name
_SPECIAL = {  # of transformers -> of GGUF, which spells one of them so
    "bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask",
}  # fmt: skip
_LOOK_SPECIAL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")  # of models that do not mark them as special
_MAX_MODEL_BYTES = 64_000_000


def tokenizer_metadata(
    folder: Path, vocabulary: int, pre_tokenizer: str = ""
) -> tuple[dict[str, tuple[int, bytes]], list[str]]:
    """The metadata of a folder's tokenizer.

    Args:
        folder: with ``tokenizer.json`` or ``tokenizer.model``; of others the metadata says that there is no tokenizer.
        vocabulary: rows of the embedding; tokens that the tokenizer lacks are filled up as unused.
        pre_tokenizer: llama.cpp's name of the rule by which text is cut, where weft does not recognise it.

    Returns:
        Entries by key, and notes for the user.

    Raises:
        RecipeError: the tokenizer is of a kind that is not written, or how it cuts text is not recognised.
        CheckpointError: a file is damaged.
    """
    data = read_json(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else {}
    try:
        if (folder / "tokenizer.model").is_file():
            entries = _sentence_piece(folder, vocabulary)
        elif data:
            entries = _byte_level(data, vocabulary, pre_tokenizer, str(folder))
        else:
            return NO_TOKENIZER, [
                f"{folder.name} has no tokenizer.json or tokenizer.model, so the file has no tokenizer."
            ]
        return {**entries, **_special(folder, data, vocabulary)}, []
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, RecipeError | CheckpointError):
            raise
        raise CheckpointError(f"{folder}: the tokenizer's files are damaged ({error!r}). Replace them.") from None


def _byte_level(
    data: Mapping[str, Any], vocabulary: int, pre_tokenizer: str, where: str
) -> dict[str, tuple[int, bytes]]:
    model = data["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise RecipeError(
            f"{where}: its tokenizer is {model['type']}{' with bytes' if model.get('byte_fallback') else ''}, and weft writes "
            "byte-level BPE, or SentencePiece from tokenizer.model. Put tokenizer.model there, or use llama.cpp's "
            "convert_hf_to_gguf.py."
        )
    added = {int(t["id"]): t for t in data.get("added_tokens") or ()}
    tokens = {int(number): text for text, number in model["vocab"].items()} | {
        n: t["content"] for n, t in added.items()
    }
    if tokens and max(tokens) >= vocabulary:
        raise RecipeError(f"{where}: token {max(tokens)} has no row in the embedding of {vocabulary}.")
    texts, kinds = [], []
    for number in range(vocabulary):
        text, kind = tokens.get(number, f"[PAD{number}]"), NORMAL if number in tokens else UNUSED
        if number in added:
            kind = CONTROL if added[number].get("special") or _looks_special(text) else USER_DEFINED
            text = text if kind == CONTROL else text.replace("\u2581", " ")
        texts.append(text)
        kinds.append(kind)
    merges = [m if isinstance(m, str) else " ".join(p.replace(" ", "\u0120") for p in m) for m in model["merges"]]
    entries = {
        "tokenizer.ggml.model": value_bytes("string", "gpt2"),
        "tokenizer.ggml.pre": value_bytes("string", pre_tokenizer or _cut_of(data.get("pre_tokenizer"), where)),
        "tokenizer.ggml.tokens": value_bytes("string[]", texts),
        "tokenizer.ggml.token_type": value_bytes("int32[]", kinds),
    }
    return {**entries, "tokenizer.ggml.merges": value_bytes("string[]", merges)} if merges else entries


def _looks_special(text: str) -> bool:
    edges = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    return text in _LOOK_SPECIAL or any(text.startswith(a) and text.endswith(b) for a, b in edges)


def _cut_of(rule: Any, where: str) -> str:
    """llama.cpp's name of a pre-tokenizer."""
    steps = rule.get("pretokenizers", [rule]) if isinstance(rule, Mapping) else []
    patterns = [s["pattern"].get("Regex", "") for s in steps if s.get("type") == "Split"]
    last = steps[-1] if steps else {}
    if last.get("type") == "ByteLevel":
        if len(steps) == 1 and last.get("use_regex", True):
            return "gpt-2"
        if len(steps) == 2 and len(patterns) == 1 and not last.get("use_regex", True) and patterns[0] in PRE_TOKENIZERS:
            return PRE_TOKENIZERS[patterns[0]]
    raise RecipeError(
        f"{where}: weft does not recognise how its tokenizer cuts text, and a wrong name would give other tokens. Name it as "
        "llama.cpp does (tokenizer.ggml.pre) with --pre-tokenizer, such as gpt-2, llama-bpe, qwen2 or default."
    )


def _special(folder: Path, data: Mapping[str, Any], vocabulary: int) -> dict[str, tuple[int, bytes]]:
    """Ids of special tokens, whether they are put around texts, and the chat template."""
    own = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    ids = {t["content"]: int(t["id"]) for t in data.get("added_tokens") or ()}
    first, last = _template(data.get("post_processor"))
    entries = {}
    for kind, theirs in _SPECIAL.items():
        token = own.get(f"{kind}_token")
        text = token.get("content") if isinstance(token, Mapping) else token
        number = ids.get(str(text)) if text else None
        if number is None:
            number = config.get(f"{kind}_token_id")
        if isinstance(number, list):  # models with several ends; the first is the main one
            number = number[0] if number else None
        if type(number) is int and 0 <= number < vocabulary:
            entries[f"tokenizer.ggml.{theirs}_token_id"] = value_bytes("uint32", number)
        put = own.get(f"add_{kind}_token")
        if not isinstance(put, bool) and kind in ("bos", "eos"):
            edge = first if kind == "bos" else last
            put = (not text or edge == text) if edge else None
        if isinstance(put, bool) and kind in ("bos", "eos", "sep"):
            entries[f"tokenizer.ggml.add_{kind}_token"] = value_bytes("bool", put)
    if isinstance(own.get("add_prefix_space"), bool):
        entries["tokenizer.ggml.add_space_prefix"] = value_bytes("bool", own["add_prefix_space"])
    template = own.get("chat_template")
    if template is None and (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(template, list):
        named = {re.sub("[^A-Za-z0-9]", "_", str(t["name"])): str(t["template"]) for t in template}
        template = named.get("default")
        others = {n: t for n, t in named.items() if n != "default"}
        if others:
            entries["tokenizer.chat_templates"] = value_bytes("string[]", list(others))
        entries |= {f"tokenizer.chat_template.{n}": value_bytes("string", t) for n, t in others.items()}
    if isinstance(template, str) and template:
        entries["tokenizer.chat_template"] = value_bytes("string", template)
    return entries


def _template(processor: Any) -> tuple[str, str]:
    """The tokens that a template puts before and behind a text; empty where it puts none."""
    steps = processor.get("processors", [processor]) if isinstance(processor, Mapping) else []
    for step in steps:
        single = step.get("single") if isinstance(step, Mapping) else None
        if step.get("type") == "TemplateProcessing" and single:
            ends = [part.get("SpecialToken", {}).get("id", "") for part in (single[0], single[-1])]
            return (ends[0], ends[1]) if len(single) > 1 else ("", "")
    return "", ""


def _sentence_piece(folder: Path, vocabulary: int) -> dict[str, tuple[int, bytes]]:
    pieces = sentence_pieces(folder / "tokenizer.model")
    if len(pieces) > vocabulary:
        raise RecipeError(f"{folder}: tokenizer.model has {len(pieces)} tokens, the embedding {vocabulary} rows.")
    pieces += [(f"[PAD{i}]".encode(), -10000.0, UNUSED) for i in range(len(pieces), vocabulary)]
    added: dict[int, tuple[str, bool]] = {}
    if (folder / "added_tokens.json").is_file():
        added |= {int(n): (text, False) for text, n in read_json(folder / "added_tokens.json").items()}
    if (folder / "tokenizer_config.json").is_file():
        for number, token in (read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}).items():
            added[int(number)] = (token["content"], bool(token.get("special")))
    for number, (text, special) in added.items():
        if not 0 <= number < vocabulary:
            raise RecipeError(
                f"{folder}: the added token {text!r} ({number}) has no row in the embedding of {vocabulary}."
            )
        kind = CONTROL if special or _looks_special(text) else USER_DEFINED
        pieces[number] = (text.replace("\u2581", " " if kind == USER_DEFINED else "\u2581").encode(), -1000.0, kind)
    return {
        "tokenizer.ggml.model": value_bytes("string", "llama"),
        "tokenizer.ggml.pre": value_bytes("string", "default"),
        "tokenizer.ggml.tokens": value_bytes("string[]", [p[0] for p in pieces]),
        "tokenizer.ggml.scores": value_bytes("float32[]", [p[1] for p in pieces]),
        "tokenizer.ggml.token_type": value_bytes("int32[]", [p[2] for p in pieces]),
    }


def sentence_pieces(path: Path) -> list[tuple[bytes, float, int]]:
    """Pieces of a SentencePiece model: text, score, and type, whose numbers GGUF shares.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        if path.stat().st_size > _MAX_MODEL_BYTES:
            raise CheckpointError(f"{path}: larger than {_MAX_MODEL_BYTES:,} bytes, which no real tokenizer is.")
        raw = path.read_bytes()
        made = []
        for number, value in _fields(raw):
            if number == 1 and isinstance(value, bytes):
                fields = dict(_fields(value))
                text, kind = fields.get(1, b""), fields.get(3, NORMAL)
                score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
                if not isinstance(text, bytes) or not isinstance(kind, int) or not 1 <= kind <= 6:
                    raise ValueError("a piece of another form")
                made.append((text, score, kind))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, IndexError, TypeError, struct.error) as error:
        raise CheckpointError(f"{path}: is no SentencePiece model, or damaged ({error}).") from None
    if not made:
        raise CheckpointError(f"{path}: holds no tokens, so it is no SentencePiece model.")
    return made


def _fields(raw: bytes) -> list[tuple[int, Any]]:
    """Fields of a protocol-buffer message: whole numbers, or bytes for the rest."""
    made: list[tuple[int, Any]] = []
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(raw, at)
            made.append((tag >> 3, value))
            continue
        if kind == 2:
            length, at = _varint(raw, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if length > len(raw) - at:
            raise ValueError("a field beyond the end")
        made.append((tag >> 3, raw[at : at + length]))
        at += length
    return made


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        value |= (raw[at] & 127) << shift
        at += 1
        if raw[at - 1] < 128:
            return value, at
    raise ValueError("a number of too many bytes")
