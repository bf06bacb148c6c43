"""W = f(θ) in a live model: attach a function to a weight, train its parameters, bake plain weights.

Start at :mod:`weft.function.protocol` (what a function is) and :mod:`weft.function.attach` (``weft.parametrize_``,
``weft.bake_``, ``weft.functions``). :mod:`weft.function.where` chooses layers, :mod:`weft.function.layout` says what a
function sees of them, :mod:`weft.function.places` finds them under all their names, :mod:`weft.function.export` saves.
"""

from weft.function.attach import Attached, bake_, functions, parametrize_
from weft.function.export import plain_state_dict, save
from weft.function.protocol import FunctionConfig, FunctionMethod, WeightFunction

__all__ = [
    "Attached",
    "FunctionConfig",
    "FunctionMethod",
    "WeightFunction",
    "bake_",
    "functions",
    "parametrize_",
    "plain_state_dict",
    "save",
]
