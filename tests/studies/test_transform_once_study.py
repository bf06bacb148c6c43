"""The equation that a study solves for its data."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest
import torch


def test_burgers_against_cole_and_hopf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    study = importlib.import_module("studies.transform_once")
    x = torch.arange(study.FINE, dtype=torch.float64) / study.FINE
    # u = −2ν φ_x / φ, where φ obeys the heat equation
    phi = torch.fft.rfft(torch.exp(torch.cos(2 * math.pi * x) / (4 * math.pi * study.VISCOSITY)))
    phi = phi * torch.exp(-study.VISCOSITY * study.WAVE.square() * study.END)
    exact = -2 * study.VISCOSITY * torch.fft.irfft(1j * study.WAVE * phi) / torch.fft.irfft(phi)
    u = study.evolve(torch.sin(2 * math.pi * x).unsqueeze(0))[0]
    assert (u - exact).abs().max() < 1e-4
    assert (exact - torch.sin(2 * math.pi * x)).abs().max() > 0.5
