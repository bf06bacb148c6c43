"""Look at weights without changing them. Start at :func:`weft.measure.inspection.model_statistics`.

``model_statistics`` reads one model once and describes every tensor, ``model_difference`` compares two models; both
stream chunks through compiled loops, so memory does not grow with the model. ``places`` sorts tensor names into layers
and kinds. Results are dataclasses with ``to_dict()``; ``weft.view`` prints and draws them.
"""

from weft.measure.difference import ModelDifference, TensorDifference, model_difference
from weft.measure.inspection import ModelStatistics, model_statistics
from weft.measure.places import Place, places
from weft.measure.statistics import TensorStatistics

__all__ = [
    "ModelDifference",
    "ModelStatistics",
    "Place",
    "TensorDifference",
    "TensorStatistics",
    "model_difference",
    "model_statistics",
    "places",
]
