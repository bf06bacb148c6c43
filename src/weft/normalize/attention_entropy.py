"""How spread out attention is, how low its entropy can fall, and a monitor that reads it while a model trains.

Attention entropy collapse, Zhai et al., arXiv:2303.06296 (2023).

    Ent_i = −Σ_j A_ij log A_ij                      A: attention weights, rows sum to 1
    Ent ≥ log(1 + (T−1) b) + B sqrt(T (T−1)) b / (1 + (T−1) b)       b = exp(−B sqrt(T / (T−1)))

for T keys and logits a (with their 1/sqrt(head size)) of |a − mean(a)| ≤ B; equality for one high logit, rest equal.

Differences from the paper and its code: the bound takes the measured B of a row of logits, where the paper bounds B by
norms of weights and inputs. Entropy is in nats; a weight of 0 adds 0 and has gradient 0.
Complexity: O(attention weights). Re-implemented from the equations (official code: a licence that is not open source).
"""

from __future__ import annotations

import inspect
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from weft.errors import RecipeError
from weft.function.where import Selector, matches

_ARGUMENTS = tuple(inspect.signature(nn.MultiheadAttention.forward).parameters)[1:]


def attention_entropy(weights: Tensor) -> Tensor:
    """Entropy of each query's attention, in nats.

    Args:
        weights: (…, queries, keys), rows that sum to 1.

    Returns:
        (…, queries), between 0 and log(keys).

    >>> attention_entropy(torch.full((1, 4), 0.25)).exp()
    tensor([4.])
    """
    positive = weights > 0
    return -(weights * torch.where(positive, weights, 1).log()).sum(-1)


def logit_deviation(logits: Tensor) -> Tensor:
    """The B of each row of logits: the norm of what is left without the mean. Keys at −∞ do not count.

    Args:
        logits: (…, queries, keys).

    Returns:
        (…, queries).

    >>> logit_deviation(torch.tensor([[1.0, -1.0, float("-inf")]]))
    tensor([1.4142])
    """
    seen = torch.isfinite(logits)
    kept = torch.where(seen, logits, 0)
    mean = kept.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp_min(1)
    return torch.where(seen, kept - mean, 0).norm(dim=-1)


def attention_entropy_bound(deviation: Tensor, keys: int | Tensor) -> Tensor:
    """The lowest entropy that logits of this deviation can have.

    Args:
        deviation: B, any shape.
        keys: T, how many keys each query sees; a tensor where that differs (a causal mask).

    Returns:
        The shape of ``deviation``; 0 for one key.

    Source: arXiv:2303.06296, theorem 3.1.

    >>> attention_entropy_bound(torch.tensor(0.0), 8).exp()
    tensor(8.)
    """
    count = torch.as_tensor(keys, device=deviation.device, dtype=deviation.dtype)
    others = (count - 1).clamp_min(0)
    safe = others.clamp_min(1)
    b = torch.exp(-deviation * torch.sqrt((safe + 1) / safe))
    spread = deviation * torch.sqrt((safe + 1) * safe) * b / (1 + safe * b)
    return torch.where(others > 0, torch.log1p(safe * b) + spread, 0)


class EntropyMonitor:
    """Reads the mean attention entropy of each attention layer in every forward pass.

    Use it as a context, or call :meth:`close`. ``nn.MultiheadAttention`` is asked for its weights, whatever the caller
    asked for; other layers must return them second, as transformers' do with ``attn_implementation="eager"``.

    Args:
        model: any module.
        where: which layers are attention, see :mod:`weft.function.where`.

    Raises:
        RecipeError: no layer matched; in a forward pass: a layer returned no weights.

    >>> attention = nn.MultiheadAttention(8, 2, batch_first=True)
    >>> x = torch.randn(1, 5, 8)
    >>> with EntropyMonitor(attention) as monitor:
    ...     _ = attention(x, x, x, need_weights=False)
    >>> list(monitor.entropy), bool(monitor.lowest() <= torch.tensor(5.0).log())
    ([''], True)
    """

    def __init__(self, model: nn.Module, where: Selector = nn.MultiheadAttention):
        self.entropy: dict[str, Tensor] = {}  # layer -> mean over batch, heads and queries in the last forward pass
        self._handles: list[RemovableHandle] = []
        for name, module in model.named_modules():
            if matches(where, name, module):
                self._watch(name, module)
        if not self._handles:
            raise RecipeError(
                f"No layer matched {where!r}; say which layers are attention, for example where='*.attn'."
            )

    def lowest(self) -> Tensor:
        """The lowest layer's entropy in the last forward pass."""
        if not self.entropy:
            raise RecipeError("No forward pass has been seen yet.")
        return torch.stack(list(self.entropy.values())).min()

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> EntropyMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _watch(self, name: str, module: nn.Module) -> None:
        asked: list[tuple[bool, bool]] = []  # what the caller wanted, from before to after the layer

        def before(_: nn.Module, arguments: Any, options: dict[str, Any]) -> Any:
            options = dict(zip(_ARGUMENTS, arguments)) | options
            asked.append((options.get("need_weights", True), options.get("average_attn_weights", True)))
            return (), {**options, "need_weights": True, "average_attn_weights": False}

        def after(_: nn.Module, arguments: Any, output: Any) -> Any:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if not isinstance(weights, Tensor):
                raise RecipeError(
                    f"{name}: this attention layer returned no weights; choose an implementation that does "
                    '(attn_implementation="eager").'
                )
            self.entropy[name] = attention_entropy(weights.detach().float()).mean()
            if not asked:
                return output
            wanted, averaged = asked.pop()
            return output[0], (weights.mean(-3) if averaged else weights) if wanted else None

        if isinstance(module, nn.MultiheadAttention):
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(after))
