"""Look at weights without changing them. Start at :func:`weft.measure.inspection.model_statistics`.

``model_statistics`` reads one model once and describes every tensor, ``model_difference`` compares two models; both
stream chunks through compiled loops, so memory does not grow with the model. ``places`` sorts tensor names into layers
and kinds. Results are dataclasses with ``to_dict()``; ``weft.view`` prints and draws them.

``laziness`` compares a live model before and after training, and ``effective_rank`` looks at one weight: they load torch,
so they are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from weft.measure.difference import ModelDifference, TensorDifference, model_difference
from weft.measure.inspection import ModelStatistics, model_statistics
from weft.measure.places import Place, places
from weft.measure.statistics import TensorStatistics

if TYPE_CHECKING:
    from weft.measure.ranks import effective_rank as effective_rank
    from weft.measure.rich_lazy import Laziness as Laziness
    from weft.measure.rich_lazy import alignment as alignment
    from weft.measure.rich_lazy import laziness as laziness
    from weft.measure.rich_lazy import representation as representation
    from weft.measure.rich_lazy import sign_agreement as sign_agreement
    from weft.measure.tangent import tangent_kernel as tangent_kernel

# public name -> module; these need torch
_ON_USE = {
    "Laziness": "rich_lazy",
    "alignment": "rich_lazy",
    "effective_rank": "ranks",
    "laziness": "rich_lazy",
    "representation": "rich_lazy",
    "sign_agreement": "rich_lazy",
    "tangent_kernel": "tangent",
}

__all__ = [
    "Laziness",
    "ModelDifference",
    "ModelStatistics",
    "Place",
    "TensorDifference",
    "TensorStatistics",
    "alignment",
    "effective_rank",
    "laziness",
    "model_difference",
    "model_statistics",
    "places",
    "representation",
    "sign_agreement",
    "tangent_kernel",
]


def __getattr__(name: str) -> Any:
    if name not in _ON_USE:
        from weft.errors import did_you_mean

        raise AttributeError(f"module 'weft.measure' has no attribute {name!r}.{did_you_mean(name, __all__)}")
    value = getattr(importlib.import_module(f"weft.measure.{_ON_USE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
