"""Choose layers by name, pattern, type or predicate.

A selector is one of

- ``"model.layers.*.q_proj"``: a glob over whole module names (``*`` crosses dots); ``"q_proj"`` alone is a suffix, as
  in PEFT's ``target_modules``;
- ``"re:layers\\.[0-3]\\..*"``: a regular expression for the whole name;
- ``"all-linear"``: every linear layer but the output head, as in PEFT;
- a type, such as ``nn.Conv2d``;
- a predicate ``(name, module) -> bool``;
- a list of these.

When several patterns with configurations match a layer, the most specific wins: an exact name before a longer glob
before a shorter one, text before types before predicates before ``"all-linear"`` before ``"*"``; of equally specific
ones the first given.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence

from torch import nn

from weft.errors import RecipeError, did_you_mean

Selector = str | type | Callable[[str, nn.Module], bool] | Sequence["Selector"]
HEADS = ("lm_head", "embed_out", "output_layer", "score", "classifier", "qa_outputs")
_LINEAR_NAMES = ("Linear", "Conv1D")


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by one matrix: ``nn.Linear`` and transformers' Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, which stores its matrix transposed (no import needed to know)."""
    return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers") for c in type(module).__mro__)


def matches(selector: Selector, name: str, module: nn.Module) -> bool:
    """Whether a selector chooses a module.

    >>> matches("q_proj", "layers.0.q_proj", nn.Linear(1, 1)), matches("re:.*[kv]_proj", "layers.0.q_proj", nn.Linear(1, 1))
    (True, False)
    """
    if isinstance(selector, str):
        if selector == "all-linear":
            return is_linear(module) and name.rpartition(".")[2] not in HEADS
        if selector.startswith("re:"):
            return re.fullmatch(_pattern(selector), name) is not None
        return name == selector or name.endswith(f".{selector}") or fnmatch.fnmatchcase(name, selector)
    if isinstance(selector, type):
        return isinstance(module, selector)
    if callable(selector):
        return bool(selector(name, module))
    return any(matches(one, name, module) for one in selector)


def specificity(selector: Selector, name: str) -> tuple[int, int]:
    """How specific a matching selector is for a name; the larger wins.

    >>> specificity("layers.0.q_proj", "layers.0.q_proj") > specificity("*.q_proj", "layers.0.q_proj") > specificity("*", "x")
    True
    """
    if isinstance(selector, str):
        if selector == name:
            return (5, len(selector))
        if selector == "*":
            return (0, 0)
        if selector == "all-linear":
            return (1, 0)
        literal = selector.removeprefix("re:").replace("*", "").replace("?", "")
        return (4, len(literal))
    if isinstance(selector, type):
        return (3, len(selector.__mro__))
    return (2, 0)


def nearest_names(selector: Selector, names: Sequence[str]) -> str:
    """A hint for a selector that chose nothing."""
    if isinstance(selector, str):
        ends = sorted({n.rpartition(".")[2] for n in names})
        return did_you_mean(selector.replace("*", "").strip("."), [*ends, *names[:200]])
    if isinstance(selector, Sequence):
        return "".join(nearest_names(one, names) for one in selector[:3])
    return ""


def _pattern(selector: str) -> str:
    pattern = selector.removeprefix("re:")
    try:
        re.compile(pattern)
    except re.error as error:
        raise RecipeError(f"{selector!r} is not a regular expression: {error}.") from None
    return pattern
