"""Calibration data: files of texts, conversations or token ids as batches that a model takes.

A ``.jsonl`` file has one sample a line: ``{"text": …}``, ``{"messages": [{"role": …, "content": …}, …]}`` (written out
by the model's chat template), or ``{"input_ids": […]}``. A ``.txt`` file is one text. ``"self"`` lets a causal model write
its own samples, from its start token, at temperature 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.engine.progress import Progress
from weft.errors import CheckpointError, MissingDependencyError, RecipeError, did_you_mean

SELF = "self"
_KINDS = ("text", "messages", "input_ids")
IGNORED = -100  # what transformers leaves out of a loss


@dataclass(frozen=True)
class DataOptions:
    """How samples are taken and cut.

    Attributes:
        samples: rows of the batches, at most.
        length: tokens a row, at most.
        batch_size: rows a batch.
        pack: put texts one after another, ended by the end-of-text token, and cut every ``length`` tokens; otherwise a
            row is one text, cut at the end, and rows of a batch are padded.
        assistant_only: labels of conversations hold the assistant's tokens only.
        seed: of which samples are taken, where there are more; their order in the file is kept.
    """

    samples: int = 128
    length: int = 512
    batch_size: int = 8
    pack: bool = False
    assistant_only: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "length", "batch_size"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be a positive whole number, got {getattr(self, name)!r}.")


def read_batches(
    data: str | Path | Iterable[Any], tokenizer: Any = None, options: DataOptions | None = None
) -> list[dict[str, Tensor]]:
    """Batches from a file, or from samples as its lines would hold them.

    Args:
        data: a ``.jsonl`` or ``.txt`` file, or an iterable of texts, of mappings as in a ``.jsonl`` file, or of sequences of
            token ids.
        tokenizer: of transformers, as :func:`load_tokenizer` gives it, or the folder of one; not needed for token ids.
        options: how samples are cut.

    Returns:
        Mappings of ``input_ids``, ``attention_mask`` and ``labels`` (−100 where a token is not to be learned), each (rows,
        tokens), padded on the right.

    Raises:
        CheckpointError: a file cannot be read, or a line is none of the three kinds.
        RecipeError: there are no samples, or a tokenizer is needed.

    >>> batches = read_batches([[5, 6, 7], [8, 9]], options=DataOptions(batch_size=2))
    >>> batches[0]["labels"].tolist()
    [[5, 6, 7], [8, 9, -100]]
    """
    options = options or DataOptions()
    named = str(data) if isinstance(data, str | Path) else "the data"
    lines = _lines(Path(data)) if isinstance(data, str | Path) else enumerate(data, 1)
    missing: CheckpointError | None = None
    if isinstance(tokenizer, str | Path):
        try:
            tokenizer = load_tokenizer(tokenizer)
        except CheckpointError as error:  # token ids do without
            tokenizer, missing = None, error
    try:
        rows = [_row(sample, number, named, tokenizer, options) for number, sample in lines]
    except _NoTokenizerError as error:
        raise (missing or error) from None
    rows = [r for r in rows if r[0]]
    if not rows:
        raise RecipeError(f"{named} holds no tokens; a sample is a text, a conversation, or token ids.")
    if options.pack:
        rows = _packed(rows, tokenizer, options)
    else:
        rows = [(ids[: options.length], labels[: options.length]) for ids, labels in rows]
    if len(rows) > options.samples:
        generator = torch.Generator().manual_seed(options.seed)
        taken = torch.randperm(len(rows), generator=generator)[: options.samples].sort().values.tolist()
        rows = [rows[i] for i in taken]
    padding = getattr(tokenizer, "pad_token_id", None)
    return list(_batches(rows, options.batch_size, 0 if padding is None else padding))


@torch.no_grad()
def own_batches(
    model: nn.Module, tokenizer: Any = None, options: DataOptions | None = None, progress: Progress | None = None
) -> list[dict[str, Tensor]]:
    """Batches that a causal model writes itself: drawn token by token from what it predicts.

    Args:
        model: a causal model of transformers, with weights.
        tokenizer: for the start token; that of the model's configuration if None.
        options: how many rows of which length.
        progress: told of each batch.

    Raises:
        RecipeError: the model does not generate.
    """
    options = options or DataOptions()
    writer: Any = model
    if not getattr(writer, "can_generate", lambda: False)():
        raise RecipeError(
            f"{type(model).__name__} does not write texts, so it cannot make its own calibration data; give a file."
        )
    start = next(
        (t for t in (getattr(tokenizer, "bos_token_id", None), writer.config.bos_token_id, writer.config.eos_token_id) if t is not None),
        0,
    )  # fmt: skip
    start = start[0] if isinstance(start, list) else start
    progress = progress or Progress()
    progress.start("writing samples", options.samples, options.samples, "samples")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        rows: list[tuple[list[int], list[int]]] = []
        while len(rows) < options.samples:
            count = min(options.batch_size, options.samples - len(rows))
            first = torch.full((count, 1), start, device=writer.device)
            written = writer.generate(
                first, attention_mask=torch.ones_like(first), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                min_new_tokens=options.length - 1, max_new_tokens=options.length - 1, pad_token_id=start,
                use_cache=True,
            )  # fmt: skip
            rows += [(ids, ids) for ids in written.tolist()]
            for number in range(len(rows) - count, len(rows)):
                progress.advance(f"sample {number + 1}", 1)
    return list(_batches(rows, options.batch_size, start))


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a model's folder; code in the folder is not run.

    Raises:
        CheckpointError: there is none that transformers can read.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingDependencyError(
            "Reading texts needs a tokenizer of transformers: pip install 'weft[hf]'."
        ) from None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: no tokenizer that transformers can read ({str(error).splitlines()[0]}). Give samples as token ids: "
            'lines of {"input_ids": [...]}.'
        ) from None


class _NoTokenizerError(RecipeError):
    """A text is to be read, and nothing reads it."""


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    if path.suffix not in (".jsonl", ".json", ".txt"):
        raise CheckpointError(f"{path}: calibration data is a .jsonl file of samples or a .txt file of text.")
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix == ".txt":
                yield 1, {"text": file.read()}
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except ValueError as error:
                        raise CheckpointError(
                            f"{path}, line {number}: is not JSON ({error}). One sample a line is needed."
                        ) from None
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path}: cannot be read as text ({why}).") from None


def _row(sample: Any, number: int, named: str, tokenizer: Any, options: DataOptions) -> tuple[list[int], list[int]]:
    """Token ids and labels of one sample."""
    where = f"{named}, sample {number}"
    if isinstance(sample, str):
        sample = {"text": sample}
    elif not isinstance(sample, Mapping):
        sample = {"input_ids": sample.tolist() if isinstance(sample, Tensor) else sample}
    kind = next((k for k in _KINDS if k in sample), None)
    if kind is None:
        raise CheckpointError(
            f"{where}: has {sorted(map(str, sample))[:5]} and none of {', '.join(_KINDS)}.{did_you_mean(str(next(iter(sample), '')), _KINDS)}"
        )
    if kind == "input_ids":
        ids = sample["input_ids"]
        if isinstance(ids, Sequence) and any(isinstance(i, Mapping) for i in ids):
            raise CheckpointError(f"{where}: is a list of samples; write each on a line of its own, without the list.")
        if not isinstance(ids, Sequence) or not all(type(i) is int and 0 <= i < 1 << 31 for i in ids):
            raise CheckpointError(
                f"{where}: input_ids must be a list of whole numbers that are not negative, below 2³¹."
            )
        labels = sample.get("labels", ids)
        if not isinstance(labels, Sequence) or not all(type(i) is int for i in labels):
            raise CheckpointError(f"{where}: labels must be a list of whole numbers, {IGNORED} where there is none.")
        if len(labels) != len(ids):
            raise CheckpointError(f"{where}: has {len(ids)} input_ids and {len(labels)} labels.")
        return list(ids), list(labels)
    if tokenizer is None:
        raise _NoTokenizerError(
            f"{where}: is a text, and there is no tokenizer to read it; give the model's folder, or token ids."
        )
    if kind == "text":
        if not isinstance(sample["text"], str):
            raise CheckpointError(f"{where}: text must be text, found {type(sample['text']).__name__}.")
        ids = tokenizer(sample["text"], verbose=False)["input_ids"]
        return list(ids), list(ids)
    return _conversation(sample["messages"], where, tokenizer, options)


def _conversation(messages: Any, where: str, tokenizer: Any, options: DataOptions) -> tuple[list[int], list[int]]:
    if not getattr(tokenizer, "chat_template", None):
        raise CheckpointError(
            f"{where}: is a conversation, and the model's tokenizer has no chat template; give texts."
        )
    good = isinstance(messages, list) and all(
        isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in messages
    )
    if not good:
        raise CheckpointError(f"{where}: messages must be a list of objects with role and content.")
    made = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=options.assistant_only
    )
    ids = list(made["input_ids"])
    if not options.assistant_only:
        return ids, ids
    mask = made.get("assistant_masks") or []
    if not any(mask):
        raise CheckpointError(
            f"{where}: the chat template does not mark the assistant's tokens ({{% generation %}}), or there are none; leave "
            "assistant_only out."
        )
    return ids, [i if m else IGNORED for i, m in zip(ids, mask)]


def _packed(
    rows: list[tuple[list[int], list[int]]], tokenizer: Any, options: DataOptions
) -> list[tuple[list[int], list[int]]]:
    """Rows of exactly ``length`` tokens; what does not fill the last is left out, unless it is all there is."""
    end = getattr(tokenizer, "eos_token_id", None)
    ids: list[int] = []
    labels: list[int] = []
    for row_ids, row_labels in rows:
        ids += row_ids
        labels += row_labels
        if end is not None and row_ids[-1] != end:
            ids.append(end)
            labels.append(end)
    starts = range(0, max(len(ids) - options.length + 1, 1), options.length)
    return [(ids[s : s + options.length], labels[s : s + options.length]) for s in starts]


def _batches(rows: list[tuple[list[int], list[int]]], size: int, padding: int) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        width = max(len(ids) for ids, _ in part)
        yield {
            "input_ids": torch.tensor([ids + [padding] * (width - len(ids)) for ids, _ in part]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in part]),
            "labels": torch.tensor([labels + [IGNORED] * (width - len(ids)) for ids, labels in part]),
        }
