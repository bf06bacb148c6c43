"""weft (WEight FuncTions): everything that is done to a neural network's weights, behind one idea, W = f(θ).

Start with ``weft.open`` (look into a checkpoint), ``weft.run`` (carry out a recipe) and ``weft.merge`` (merge tensors).
Nothing heavy is imported until it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> (module, attribute); an empty attribute means the module itself
_PUBLIC = {
    "Checkpoint": ("weft.checkpoint.checkpoint", "Checkpoint"),
    "WeftError": ("weft.errors", "WeftError"),
    "adapt": ("weft.adapt", ""),
    "adapt_": ("weft.adapt.attach", "adapt_"),
    "bake_": ("weft.function.attach", "bake_"),
    "calibrate": ("weft.calibrate", ""),
    "functions": ("weft.function.attach", "functions"),
    "edit": ("weft.edit", ""),
    "init": ("weft.init", ""),
    "measure": ("weft.measure", ""),
    "merge": ("weft.merge", ""),
    "normalize": ("weft.normalize", ""),
    "parametrize_": ("weft.function.attach", "parametrize_"),
    "plain_state_dict": ("weft.function.export", "plain_state_dict"),
    "save": ("weft.function.export", "save"),
    "prune": ("weft.prune", ""),
    "prune_": ("weft.prune.run", "prune_"),
    "quantize": ("weft.quantize", ""),
    "quantize_": ("weft.quantize.run", "quantize_"),
    "run": ("weft.recipe.run", "run"),
    "symmetry": ("weft.symmetry", ""),
    "open": ("weft.checkpoint.open", "open_checkpoint"),
}
__all__ = [*_PUBLIC, "__version__"]

if TYPE_CHECKING:
    from weft import adapt as adapt
    from weft import calibrate as calibrate
    from weft import edit as edit
    from weft import init as init
    from weft import measure as measure
    from weft import merge as merge
    from weft import normalize as normalize
    from weft import prune as prune
    from weft import quantize as quantize
    from weft import symmetry as symmetry
    from weft.adapt.attach import adapt_ as adapt_
    from weft.checkpoint.checkpoint import Checkpoint as Checkpoint
    from weft.checkpoint.open import open_checkpoint as open  # noqa: F401
    from weft.errors import WeftError as WeftError
    from weft.function.attach import bake_ as bake_
    from weft.function.attach import functions as functions
    from weft.function.attach import parametrize_ as parametrize_
    from weft.function.export import plain_state_dict as plain_state_dict
    from weft.function.export import save as save
    from weft.prune.run import prune_ as prune_
    from weft.quantize.run import quantize_ as quantize_
    from weft.recipe.run import run as run


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        from weft.errors import did_you_mean

        raise AttributeError(f"module 'weft' has no attribute {name!r}.{did_you_mean(name, _PUBLIC)}")
    module, attribute = _PUBLIC[name]
    loaded = importlib.import_module(module)
    value = getattr(loaded, attribute) if attribute else loaded
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
