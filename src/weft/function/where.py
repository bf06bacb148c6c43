"""Choose layers by name, pattern, type or predicate.

A selector is one of

- ``"model.layers.*.q_proj"``: a glob over whole module names (``*`` crosses dots); ``"q_proj"`` or
  ``"self_attn.q_proj"`` is a suffix, as in PEFT's ``target_modules``;
- ``"re:layers\\.[0-3]\\..*"``: a regular expression for the whole name;
- ``"all-linear"``: every linear layer but the output head, as in PEFT;
- a type, such as ``nn.Conv2d``;
- a predicate ``(name, module) -> bool``;
- a list of these: any of them.

When several patterns with configurations match a layer, the most specific wins: an exact name before a pattern with
more letters before one with fewer, text before types (a subclass before its base) before predicates before
``"all-linear"`` before ``"*"``; of equally specific ones the first given. A list is as specific as its most specific
match.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from weft.errors import RecipeError, did_you_mean
from weft.function.layout import is_conv1d, is_packed

Selector = str | type | Callable[[str, nn.Module], bool] | Sequence["Selector"]
ALL_LINEAR = "all-linear"
HEADS = ("lm_head", "embed_out", "output_layer", "score", "classifier", "qa_outputs")


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by one matrix: ``nn.Linear``, transformers' Conv1D, and linear layers over packed weights."""
    return isinstance(module, nn.Linear) or is_conv1d(type(module)) or is_packed(module)


def output_heads(model: nn.Module) -> set[int]:
    """Identities of the output embeddings that a transformers model names as such."""
    heads = set()
    for module in model.modules():
        if hasattr(module, "get_output_embeddings"):
            try:
                heads.add(id(module.get_output_embeddings()))
            except (NotImplementedError, AttributeError):  # a model without a head
                continue
    return heads - {id(None)}


def matches(selector: Selector, name: str, module: nn.Module, heads: Collection[int] = ()) -> bool:
    """Whether a selector chooses a module.

    Args:
        selector: see the module's docstring.
        name: full name of the module.
        module: the module.
        heads: identities of modules that ``"all-linear"`` leaves out, beside those with a head's usual name.

    Raises:
        RecipeError: it is no selector, or not a regular expression.

    >>> matches("q_proj", "layers.0.q_proj", nn.Linear(1, 1)), matches("re:.*[kv]_proj", "layers.0.q_proj", nn.Linear(1, 1))
    (True, False)
    """
    return _best(selector, name, module, heads) is not None


def most_specific(
    selectors: Iterable[Selector], name: str, module: nn.Module, heads: Collection[int] = ()
) -> Selector | None:
    """The selector that decides about a module, or None if none chooses it.

    >>> most_specific(["*", "*.q_proj", "layers.0.q_proj", nn.Linear], "layers.0.q_proj", nn.Linear(1, 1))
    'layers.0.q_proj'
    """
    ranked = [(_best(s, name, module, heads), s) for s in selectors]
    found = [(rank, s) for rank, s in ranked if rank is not None]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def texts(selector: Any) -> Iterator[str]:
    """The texts in a selector.

    >>> list(texts(["q_proj", nn.Linear, ("v_proj",)]))
    ['q_proj', 'v_proj']
    """
    if isinstance(selector, str):
        yield selector
    elif isinstance(selector, Iterable) and not isinstance(selector, type):
        for one in selector:
            yield from texts(one)


def nearest_names(selectors: Any, layers: Sequence[tuple[str, nn.Module]]) -> str:
    """A hint for selectors that chose nothing: the nearest names, or the types that there are."""
    names = [name for name, _ in layers]
    ends = sorted({n.rpartition(".")[2] for n in names})
    hint = ""
    for text in list(texts(selectors))[:3]:
        near = did_you_mean(re.sub(r"^re:|[*?\\^$()\[\]]", "", text).strip("."), [*ends, *names[:200]])
        hint += near if "Did" in near else ""
    if hint or not layers:
        return hint
    return (
        f" Names end in {', '.join(ends[:20])}; types are {', '.join(sorted({type(m).__name__ for _, m in layers}))}."
    )


def _best(selector: Any, name: str, module: nn.Module, heads: Collection[int]) -> tuple[int, int] | None:
    """How specifically a selector chooses a module: a larger pair is more specific, None is not at all."""
    if isinstance(selector, str):
        return _text(selector, name, module, heads)
    if isinstance(selector, type):
        return (3, len(selector.__mro__)) if isinstance(module, selector) else None
    if callable(selector):
        return (2, 0) if selector(name, module) else None
    if isinstance(selector, Iterable):
        ranks = [_best(one, name, module, heads) for one in selector]
        return max((r for r in ranks if r is not None), default=None)
    raise RecipeError(
        f"{selector!r} chooses no layers; give a name, a pattern, a type, a predicate or a list of these."
    )


def _text(selector: str, name: str, module: nn.Module, heads: Collection[int]) -> tuple[int, int] | None:
    if selector == "*":
        return (0, 0)
    if selector == ALL_LINEAR:
        head = id(module) in heads or name.rpartition(".")[2] in HEADS
        expert = getattr(module, "of_experts", False)  # packed; dense ones are one parameter, which this leaves out too
        return (1, 0) if is_linear(module) and not head and not expert else None
    if selector == name:
        return (5, 0)
    if selector.startswith("re:"):
        chosen = _compiled(selector).fullmatch(name) is not None
        selector = re.sub(r"\\.", "", selector[3:])
    else:
        chosen = name.endswith(f".{selector}") or fnmatch.fnmatchcase(name, selector)
    return (4, sum(c.isalnum() or c == "_" for c in selector)) if chosen else None


def _compiled(selector: str) -> re.Pattern[str]:
    try:
        return re.compile(selector.removeprefix("re:"))
    except re.error as error:
        raise RecipeError(f"{selector!r} is not a regular expression: {error}.") from None
