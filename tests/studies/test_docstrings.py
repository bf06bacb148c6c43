"""What studies on docstrings rest on."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def docstrings(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    return importlib.import_module("studies._docstrings")


def test_texts_do_not_tell_their_package(docstrings: ModuleType) -> None:
    texts, labels = docstrings.corpus()
    assert len({text.lower() for text in texts}) == len(texts) == len(labels)
    assert labels.bincount().min() >= 50
    assert not any(name in text.lower() for name in docstrings.PACKAGES for text in texts)


def test_splits_do_not_overlap(docstrings: ModuleType) -> None:
    data = docstrings.splits(0)
    parts = [data.train, data.validation, data.test]
    assert sum(len(inputs) for inputs, _ in parts) == len(docstrings.corpus()[0])
    assert all(set(labels.tolist()) == set(range(len(docstrings.PACKAGES))) for _, labels in parts)
    # truncated to LENGTH tokens, a few long texts begin alike
    rows = [{tuple(row) for row in inputs.tolist()} for inputs, _ in parts]
    assert all(len(a & b) <= 3 for a in rows for b in rows if a is not b)


def test_frozen_layers_may_be_left_out(docstrings: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, upper = docstrings.Classifier().eval(), docstrings.Classifier(frozen=5).eval()
    with torch.no_grad():
        whole.classifier.weight.normal_()
        upper.classifier.weight.copy_(whole.classifier.weight)
        whole.encoder.encoder.layer[5].output.dense.weight.mul_(1.1)
        upper.encoder.encoder.layer[0].output.dense.weight.mul_(1.1)
    texts = docstrings.corpus()[0][:3]
    with monkeypatch.context() as patch:
        patch.setattr(docstrings, "corpus", lambda: (texts, None))
        docstrings.inputs.cache_clear()
        few, hidden = docstrings.inputs(), docstrings.inputs(5)
    docstrings.inputs.cache_clear()
    torch.testing.assert_close(upper(hidden), whole(few))
