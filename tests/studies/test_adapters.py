"""The comparison of adapters: equal numbers of parameters, and nothing else trains."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("name", "parameters"), [("bone", 13_824), ("svfit", 2_304), ("mixture_of_shards", 55_296)])
def test_methods_have_as_many_numbers(name: str, parameters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    study, adapters = importlib.import_module(f"studies.{name}"), importlib.import_module("studies._adapters")
    texts = torch.randn(16, 4, 384, generator=torch.Generator().manual_seed(0))
    parts = SimpleNamespace(train=(texts, torch.arange(16) % 10), validation=None, test=None)
    monkeypatch.setattr(adapters, "splits", lambda *_, **__: parts)
    starts = []
    for trial in study.TRIALS.values():
        model, optimizer, _, count = adapters.prepare(trial, 0.1, 0, study.FROZEN)
        assert count == (parameters if trial.config is not None else 0)
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        given = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(given) == sorted(trained)
        assert len(model.encoder.encoder.layer) == (0 if trial.config is None else 6 - study.FROZEN)
        starts.append(len(trial.rates))
    assert len(set(starts)) == 1  # as many settings each
