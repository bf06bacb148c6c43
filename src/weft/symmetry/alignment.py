"""What an alignment's registry row says: functions that find the order of a model's units that fits a reference.

Such a function takes the reference, the model and the symmetry of both, then its data, then its parameters by name, and a
``seed`` last. What it returns has ``permutations``, one array for each group, for :meth:`weft.symmetry.Symmetry.apply`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from weft.method import Method

INPUTS = "inputs"
INPUTS_AND_TARGETS = "inputs and targets"


@dataclass(frozen=True, kw_only=True)
class AlignMethod(Method):
    """A registry row of an alignment.

    Attributes:
        load: gives the public function when it is first needed, which may load torch; a merge of files does without.
        data: what the function takes after the symmetry: nothing (``""``), batches of ``INPUTS``, or batches of
            ``INPUTS_AND_TARGETS`` and a loss of outputs and targets.
        on_folders: whether ``weft align`` runs it.
    """

    load: Callable[[], Callable[..., Any]]
    data: str = ""
    on_folders: bool = False

    @property
    def function(self) -> Callable[..., Any]:
        """The public function; fields of the configuration are its keyword arguments, with the same defaults."""
        return self.load()
