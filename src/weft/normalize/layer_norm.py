"""Normalise each sample by its own mean and variance, and recurrent cells that do so at every time step.

Layer Normalization, Ba et al., arXiv:1607.06450 (2016).

    LN(a; g, b) = g ⊙ (a − mean(a)) / sqrt(var(a) + ε) + b       var: biased; g = 1, b = 0 at the start

    LSTM: [i, f, g, o] = LN(W_x x; s₁, b₁) + LN(W_h h; s₂, b₂) + b        each LN over all 4H values
          c ← σ(f) c + σ(i) tanh(g)        h ← σ(o) tanh(LN(c; s₃, b₃))    the c that is kept is not normalised
    GRU:  [r, z] = σ(LN(W x) + LN(U h))    LN over 2H
          n = tanh(LN(W_n x) + r ⊙ LN(U_n h))        h ← z h + (1 − z) n

x: (batch, inputs); h, c: (batch, hidden).

Differences from the paper and its code: gates are ordered as torch orders them, so weights move to and from
``nn.LSTMCell`` and ``nn.GRUCell``; ``per_gate=True`` normalises each gate by itself, as some libraries do. ``unroll``
normalises W_x x for all time steps before the loop: the same values. Layer norm itself is torch's.
Complexity: O(elements); a loop in Python over time steps. Re-implemented from the equations (official code: no licence).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.function.layer import LayerMethod
from weft.method import parameter


@dataclass(frozen=True)
class LayerNormConfig:
    """Each sample normalised over its features.

    >>> LayerNormConfig().build(4)
    LayerNorm((4,), eps=1e-05, elementwise_affine=True, bias=True)
    """

    eps: float = parameter(1e-5, "added to the variance", minimum=0)

    def build(self, features: int) -> nn.Module:
        """The layer, torch's own."""
        return nn.LayerNorm(features, eps=self.eps)


class PartNorm(nn.Module):
    """Layer norm over equal parts of the last axis, each by itself.

    Args:
        features: the last axis.
        parts: how many parts; one is plain layer norm.
        eps: added to the variance.
        bias: learn a shift.

    >>> PartNorm(8, 4)(torch.ones(2, 8)).shape
    torch.Size([2, 8])
    """

    def __init__(self, features: int, parts: int = 1, *, eps: float = 1e-5, bias: bool = True):
        super().__init__()
        self.parts = parts
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(…, features) -> (…, features)."""
        split = x.unflatten(-1, (self.parts, -1))
        normal = functional.layer_norm(split, split.shape[-1:], eps=self.eps).flatten(-2) * self.weight
        return normal if self.bias is None else normal + self.bias


class LayerNormLSTMCell(nn.Module):
    """An LSTM cell with layer norm, called as ``nn.LSTMCell``.

    Args:
        inputs: size of x.
        hidden: size of h and c.
        per_gate: normalise each gate by itself.
        eps: added to variances.

    Source: arXiv:1607.06450, supplementary equations 20 to 22.

    >>> cell = LayerNormLSTMCell(3, 5)
    >>> h, c = cell(torch.ones(2, 3))
    >>> outputs, _ = cell.unroll(torch.ones(4, 2, 3))
    >>> h.shape, outputs.shape
    (torch.Size([2, 5]), torch.Size([4, 2, 5]))
    """

    def __init__(self, inputs: int, hidden: int, *, per_gate: bool = False, eps: float = 1e-5):
        super().__init__()
        self.hidden = hidden
        limit = hidden**-0.5
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden, inputs).uniform_(-limit, limit))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden, hidden).uniform_(-limit, limit))
        self.bias = nn.Parameter(torch.zeros(4 * hidden))
        parts = 4 if per_gate else 1
        self.norm_input = PartNorm(4 * hidden, parts, eps=eps)
        self.norm_hidden = PartNorm(4 * hidden, parts, eps=eps)
        self.norm_cell = PartNorm(hidden, eps=eps)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """x (batch, inputs), (h, c) -> new (h, c), each (batch, hidden); or all without the batch."""
        return self._step(self._project(x), state or self._start(x))

    def unroll(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x (time, batch, inputs) -> all h (time, batch, hidden) and the last (h, c)."""
        state = state or self._start(x[0])
        outputs = []
        for projected in self._project(x).unbind(0):
            state = self._step(projected, state)
            outputs.append(state[0])
        return torch.stack(outputs), state

    def _project(self, x: Tensor) -> Tensor:
        return self.norm_input(functional.linear(x, self.weight_ih)) + self.bias

    def _start(self, x: Tensor) -> tuple[Tensor, Tensor]:
        zeros = x.new_zeros(*x.shape[:-1], self.hidden)
        return zeros, zeros

    def _step(self, projected: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        i, f, g, o = (projected + self.norm_hidden(functional.linear(h, self.weight_hh))).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * self.norm_cell(c).tanh(), c


class LayerNormGRUCell(nn.Module):
    """A GRU cell with layer norm, called as ``nn.GRUCell``.

    Args:
        inputs: size of x.
        hidden: size of h.
        per_gate: normalise the two gates by themselves (the candidate always is).
        eps: added to variances.

    Source: arXiv:1607.06450, supplementary equations 23 to 26.

    >>> cell = LayerNormGRUCell(3, 5)
    >>> cell(torch.ones(2, 3)).shape, cell.unroll(torch.ones(4, 2, 3))[0].shape
    (torch.Size([2, 5]), torch.Size([4, 2, 5]))
    """

    def __init__(self, inputs: int, hidden: int, *, per_gate: bool = False, eps: float = 1e-5):
        super().__init__()
        self.hidden = hidden
        limit = hidden**-0.5
        self.weight_ih = nn.Parameter(torch.empty(3 * hidden, inputs).uniform_(-limit, limit))
        self.weight_hh = nn.Parameter(torch.empty(3 * hidden, hidden).uniform_(-limit, limit))
        parts = 2 if per_gate else 1
        self.norm_input = PartNorm(2 * hidden, parts, eps=eps)
        self.norm_hidden = PartNorm(2 * hidden, parts, eps=eps)
        self.norm_input_candidate = PartNorm(hidden, eps=eps)
        self.norm_hidden_candidate = PartNorm(hidden, eps=eps)

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        """x (batch, inputs), h (batch, hidden) -> new h; or all without the batch."""
        return self._step(self._project(x), x.new_zeros(*x.shape[:-1], self.hidden) if h is None else h)

    def unroll(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (time, batch, inputs) -> all h (time, batch, hidden) and the last one."""
        h = x.new_zeros(x.shape[1], self.hidden) if h is None else h
        outputs = []
        for projected in self._project(x).unbind(0):
            h = self._step(projected, h)
            outputs.append(h)
        return torch.stack(outputs), h

    def _project(self, x: Tensor) -> Tensor:
        gates, candidate = functional.linear(x, self.weight_ih).split((2 * self.hidden, self.hidden), -1)
        return torch.cat([self.norm_input(gates), self.norm_input_candidate(candidate)], -1)

    def _step(self, projected: Tensor, h: Tensor) -> Tensor:
        gates, candidate = functional.linear(h, self.weight_hh).split((2 * self.hidden, self.hidden), -1)
        gates_x, candidate_x = projected.split((2 * self.hidden, self.hidden), -1)
        r, z = (gates_x + self.norm_hidden(gates)).sigmoid().chunk(2, -1)
        n = (candidate_x + r * self.norm_hidden_candidate(candidate)).tanh()
        return z * h + (1 - z) * n


METHODS = (
    LayerMethod(
        name="layer_norm",
        family="normalize",
        config=LayerNormConfig,
        layer=nn.LayerNorm,
        summary="Each sample normalised over its features; with LSTM and GRU cells.",
        goal="train",
        paper="layer-norm",
        checked_by=("closed form", "torch"),
    ),
)
