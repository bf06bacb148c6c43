"""Score folders with transformers alone: ``python score.py FOLDER …`` prints their accuracy on seed 0's test texts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from data import corpus, split
from model import tokenize
from transformers import AutoModelForSequenceClassification


def main(folders: list[Path]) -> None:
    """Print one line for each folder."""
    texts, labels = corpus(json.loads((folders[0].parent / "settings.json").read_text())["per_package"])
    test = split(labels, 0)[2]
    for folder in folders:
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        tokens = tokenize(folder, [texts[i] for i in test])
        with torch.inference_mode():
            answers = model(**tokens).logits.argmax(1).numpy()
        print(f"{folder.name:16} {(answers == labels[test]).mean():.3f}", flush=True)


if __name__ == "__main__":
    main([Path(name).resolve() for name in sys.argv[1:]])
