"""mergekit's methods: their parameters with mergekit's defaults, and the rows of the registry that they mean."""

from __future__ import annotations

from typing import Any

from weft.engine.merging import MergeMethod
from weft.errors import RecipeError, did_you_mean
from weft.registry import index, method, methods

# mergekit's parameters that have an effect, with its defaults; None: mergekit demands a value
_TASKS: dict[str, Any] = {"weight": None, "normalize": False, "lambda": 1.0}
_SPARSE = {**_TASKS, "density": 1.0, "rescale": False}
_DARE = {**_SPARSE, "rescale": True}
_BREADCRUMBS = {**_SPARSE, "gamma": 0.01}
_DELLA = {**_DARE, "epsilon": 0.15}
PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {"weight": None, "normalize": True},
    "slerp": {"t": None},
    "nuslerp": {"weight": None, "nuslerp_row_wise": False, "nuslerp_flatten": True},
    "multislerp": {"weight": None, "normalize_weights": True, "eps": 1e-8},
    "karcher": {"max_iter": 10, "tol": 1e-5},
    "task_arithmetic": _TASKS,
    "ties": {**_SPARSE, "normalize": True},
    "dare_linear": _DARE,
    "dare_ties": _DARE,
    "breadcrumbs": _BREADCRUMBS,
    "breadcrumbs_ties": _BREADCRUMBS,
    "della": {**_DELLA, "normalize": True},
    "della_linear": _DELLA,
    "sce": {"select_topk": 1.0},
    "ram": {"epsilon": 1e-5},
    "ramplus_tl": {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2},
    "model_stock": {"filter_wise": False},
    "nearswap": {"t": None},
    "arcee_fusion": {},
    "passthrough": {"scale": 1.0},
}
KNOWN_PARAMETERS = {"int8_mask", "embed_slerp"} | {key for row in PARAMETERS.values() for key in row}


def find_row(name: str) -> MergeMethod:
    """The registry row that a ``merge_method`` means: mergekit's own variant if there is one."""
    wanted = (f"mergekit/{name}", name)
    listed = {row["name"] for row in index()}
    known = listed if listed & set(wanted) else set(methods())  # plugins are not in the index
    found = next((method(n) for n in wanted if n in known), None)
    if not isinstance(found, MergeMethod):
        merges = [row["name"] for row in index() if row.get("shell", "").startswith("weft merge")]
        raise RecipeError(f"There is no merge_method {name!r}.{did_you_mean(name, [*PARAMETERS, *merges])}")
    return found
