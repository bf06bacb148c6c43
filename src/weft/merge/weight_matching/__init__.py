"""Put the units of one model into the order of another, so that models trained apart can be averaged.

Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching, Ito et al., arXiv:2402.04051 (2024), on the
matching of Git Re-Basin, Ainsworth et al., arXiv:2209.04836 (2022).

    π = argmax Σ_k ⟨A_k, π(B)_k⟩  =  argmin ‖A − π(B)‖²        over all groups of units that permute together
    p = argmax_p Σ_i C[i, p_i]                                 one group, the others given: a linear assignment
    C = Σ_(k, axis) unfold_axis(A_k) · unfold_axis(B_k)ᵀ       (n, n), over all places where the group has its units
    ‖A − P B Qᵀ‖² = Σ σ_a² + Σ σ_b² − 2 Σ_ij σ_a,i σ_b,j (u_a,i · P u_b,j) (v_a,i · Q v_b,j)

The last line is why it works: a permutation leaves singular values, and so most of the distance, as they are, and can
only turn directions, the large ones first; ``singular_alignment`` measures that.

Groups come from ``weft.symmetry``, in any model that it can trace. They are swept in random order until none improves.
Where groups lie within others (what a head holds, hidden units of an expert) outer and inner units are matched
together: each pair of outer units is first matched inside, in the groups' order, and the best values are the outer cost.

Start with :func:`align`, then merge by any method. :func:`match_weights`, :func:`match_activations` and
:func:`match_straight_through` give permutations, :func:`match_many` those of several models; after a merge
:func:`reset_batch_norm_`; :func:`match_report`, :func:`loss_barrier` and :func:`singular_alignment` say what it did.

Differences from the papers and their code: a step is taken only if the exact objective rises, also where a group has
its units in two axes of one tensor and the assignment is but a linearisation; groups whose neighbours have not moved are
not solved again; the order stays where a tie could be broken either way; restarts from random orders; running statistics
move but do not count; heads are matched with what they hold. n_ℓ in R is the geometric mean of both models' counts.

Complexity: for each sweep one product of the size of a forward pass over n samples for every group, and one assignment,
O(n³); for m units around others m² of each inside. Re-implemented from the equations (Git Re-Basin's code: MIT).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from weft.merge.weight_matching.methods import METHODS, ActivationMatching, StraightThroughMatching, WeightMatching

if TYPE_CHECKING:
    from weft.merge.weight_matching.activations import match_activations as match_activations
    from weft.merge.weight_matching.batch_norm import reset_batch_norm_ as reset_batch_norm_
    from weft.merge.weight_matching.diagnostics import Barrier as Barrier
    from weft.merge.weight_matching.diagnostics import MatchReport as MatchReport
    from weft.merge.weight_matching.diagnostics import loss_barrier as loss_barrier
    from weft.merge.weight_matching.diagnostics import match_report as match_report
    from weft.merge.weight_matching.diagnostics import singular_alignment as singular_alignment
    from weft.merge.weight_matching.many import match_many as match_many
    from weft.merge.weight_matching.straight_through import StraightThrough as StraightThrough
    from weft.merge.weight_matching.straight_through import match_straight_through as match_straight_through
    from weft.merge.weight_matching.weights import Matching as Matching
    from weft.merge.weight_matching.weights import align as align
    from weft.merge.weight_matching.weights import match_weights as match_weights

# public name -> module; they load torch, which a merge of files does without
ON_USE = {
    "Barrier": "diagnostics",
    "MatchReport": "diagnostics",
    "Matching": "weights",
    "StraightThrough": "straight_through",
    "align": "weights",
    "loss_barrier": "diagnostics",
    "match_activations": "activations",
    "match_many": "many",
    "match_report": "diagnostics",
    "match_straight_through": "straight_through",
    "match_weights": "weights",
    "reset_batch_norm_": "batch_norm",
    "singular_alignment": "diagnostics",
}

__all__ = [
    "METHODS",
    "ActivationMatching",
    "Barrier",
    "MatchReport",
    "Matching",
    "StraightThrough",
    "StraightThroughMatching",
    "WeightMatching",
    "align",
    "loss_barrier",
    "match_activations",
    "match_many",
    "match_report",
    "match_straight_through",
    "match_weights",
    "reset_batch_norm_",
    "singular_alignment",
]


def __getattr__(name: str) -> Any:
    if name not in ON_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{ON_USE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
