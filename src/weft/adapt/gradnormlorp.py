"""Train whole matrices with AdamW's moments kept in a low-rank projection of the gradient, lengths of rows apart.

GradNormLoRP, Huang et al., arXiv:2412.19616 (2025), with GaLore, Zhao et al., arXiv:2403.03507 (2024), underneath.

    W = g · v / ‖v‖                                     W, v: (out, in), g, ‖v‖: (out, 1), one length a row
    ∂g = ⟨∂W, v⟩ / ‖v‖                                  ∂v = g / ‖v‖ · (∂W − ∂g · v / ‖v‖)
    v ← v − lr · scale · U N(Uᵀ ∂v V) Vᵀ                g ← g − lr · N(∂g)

N: Adam's bias-corrected m̂ / (√v̂ + ε), U: (out, r), V: (in, r): singular vectors of the gradient, taken anew every
``update_proj_gap`` steps. With ``normalize="none"`` ∂W is projected and W moves: GaLore.

Differences from the paper and its code: the code replaces the learned g by ‖v‖ at every step, so that it lives for one
forward pass; here it stays. The code's ∂v keeps the part along v; here ∂v is the gradient of weight normalisation,
orthogonal to v. The code keeps v as a second copy of W; here only the signed ‖v‖ of each row is kept, since W has the
direction of v and the length |g|. The code projects one side; ``projection="both"`` is the paper's formula. Sides and
signs of projections: :mod:`weft.adapt.galore`. A row of zeros has no direction: it moves by its own projected gradient
once, and its length is then that of what it became. Weight decay is decoupled and shrinks W, which is to say g. What
becomes of the moments at a change of basis is a choice: ``keep`` them (GaLore), ``rotate`` or ``reset`` them. Seen
from both sides the gradient that made the bases is diagonal, and while there are no moments N makes full steps of the
rounding errors beside the diagonal, unless ε is above them (the code has 1e-6).
Complexity: O(out · in · r) a step, O(out · in · min(out, in)) a change of basis. Memory: the moments, 2 r · max(out, in)
numbers with "auto" and 2 r² with "both", the bases, r for each row or column of a projected side, and 3 · out for
lengths, in float32 (float64 for such weights), plus a few matrices of one layer's size during its step.
Re-implemented from the equations (official code: no licence; GaLore's: Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from weft.adapt.galore import (
    PROJECTIONS,
    carried,
    low_rank_basis,
    project,
    project_back,
    projected_groups,
    projected_sides,
)
from weft.errors import RecipeError
from weft.function.optimizer import OptimizerMethod
from weft.function.protocol import as_matrix, wide
from weft.function.stack import is_sharded
from weft.method import configure, parameter

NORMALIZATIONS = ("none", "weight")
MOMENTS = ("keep", "rotate", "reset")


@dataclass(frozen=True)
class LowRankProjection:
    """AdamW on a low-rank projection of the gradients of a model's matrices, plain AdamW on all else.

    Source: arXiv:2412.19616 with ``normalize="weight", projection="both"``; arXiv:2403.03507 as it is.

    >>> model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 2))
    >>> optimizer = LowRankProjection(rank=2).build(model)
    >>> [(group.get("rank"), len(group["params"])) for group in optimizer.param_groups]
    [(2, 1), (None, 3)]
    """

    rank: int = parameter(128, "directions kept of each projected side", minimum=1)
    lr: float = parameter(1e-3, "learning rate", minimum=0)
    beta1: float = parameter(0.9, "decay of the first moment, below 1", minimum=0, maximum=1 - 1e-9)
    beta2: float = parameter(0.999, "decay of the second moment, below 1", minimum=0, maximum=1 - 1e-9)
    eps: float = parameter(1e-8, "added to the root of the second moment", minimum=0)
    weight_decay: float = parameter(0.0, "decoupled, times the learning rate", minimum=0)
    update_proj_gap: int = parameter(200, "steps from one basis to the next", minimum=1)
    scale: float = parameter(0.25, "of projected updates, against those of plain AdamW", minimum=0)
    projection: str = parameter("auto", "projected side; auto: the smaller one", choices=PROJECTIONS)
    normalize: str = parameter("none", "weight: lengths of rows learn apart", choices=NORMALIZATIONS)
    moments: str = parameter("keep", "what becomes of moments at a new basis", choices=MOMENTS)
    where: str = parameter("all-linear", "selects the layers whose weights are projected")

    def build(self, model: nn.Module) -> LowRankProjectedAdamW:
        """The optimizer for a model."""
        options = asdict(self)
        groups = projected_groups(model, options.pop("rank"), options.pop("where"))
        return LowRankProjectedAdamW(groups, betas=(options.pop("beta1"), options.pop("beta2")), **options)


def weight_norm_gradients(gradient: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of g and v where W = g · v / ‖v‖, row by row.

    Args:
        gradient: of W, (out, in).
        v: directions of any length, (out, in). A row of zeros has none: its v gets the gradient of W, its g zero.
        g: signed lengths, (out, 1).

    Returns:
        Those of g, (out, 1), and of v, (out, in), orthogonal to v.

    >>> weight_norm_gradients(torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 0.0]]), torch.tensor([[6.0]]))
    (tensor([[1.]]), tensor([[0., 3.]]))
    """
    norm = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    unit = v / torch.where(norm == 0, 1, norm)
    of_g = (gradient * unit).sum(1, keepdim=True)
    return of_g, torch.where(norm == 0, 1, g / norm) * (gradient - of_g * unit)


class LowRankProjectedAdamW(Optimizer):
    """AdamW whose groups with a ``rank`` are projected, after GaLore or GradNormLoRP; other groups are torch's AdamW.

    A projected parameter has two axes, (out, in), or is the kernel of a convolution (out, in, …), which counts as
    (out, in · …); ``"output_axis": 1`` in its group says that a matrix is stored as (in, out). All options may differ
    by group. The state of a projected parameter is float32, or float64 for one of that type; that of a plain one has
    its type, as torch's. The length |g| of a row is that of W itself, so changes of W from outside count.

    Args:
        params: parameters, or groups of them, see :func:`projected_groups`.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``; in projected groups ``lr`` is for lengths, too.
        update_proj_gap: steps from one basis to the next.
        scale: of projected updates.
        projection: "auto" (the smaller side), "left", "right" or "both".
        normalize: "none" (GaLore) or "weight" (GradNormLoRP).
        moments: "keep", "rotate" or "reset" at a new basis.

    Raises:
        RecipeError: an option is out of bounds, or a parameter or its gradient is complex, sparse, or, in a projected
            group, not a matrix or sharded. NaN in a gradient makes the weights NaN, as in torch.

    Source: arXiv:2412.19616, equations as in the module's docstring.

    >>> layer = nn.Linear(8, 4)
    >>> optimizer = LowRankProjectedAdamW([{"params": [layer.weight], "rank": 2}, {"params": [layer.bias]}], lr=0.1)
    >>> layer(torch.ones(1, 8)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.state_bytes()  # 4 · (2 · 2 · 8 + 2 · 4) of the weight, 4 · 2 · 4 of the bias
    192
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        projection: str = "auto",
        normalize: str = "none",
        moments: str = "keep",
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "projection": projection,
            "normalize": normalize,
            "moments": moments,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; with a ``rank`` they are projected."""
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except RecipeError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state; torch would round that of projected parameters to the parameter's type."""
        super().load_state_dict(state_dict)
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, (tensor, group) in zip(saved, self._parameters()):
            if group.get("rank") is not None:
                for name, value in state_dict["state"].get(number, {}).items():
                    if isinstance(value, Tensor) and name != "step":
                        self.state[tensor][name] = value.to(tensor.device, copy=True)

    def state_bytes(self) -> int:
        """Bytes of moments, bases and lengths that are held now; counters of steps aside."""
        named = (item for state in self.state.values() for item in state.items())
        held = [v for name, v in named if isinstance(v, Tensor) and name != "step"]
        return sum(v.numel() * v.element_size() for v in held)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure`` computes the loss and the gradients anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for tensor, _ in self._parameters():
            if tensor.grad is not None and tensor.grad.is_sparse:
                raise RecipeError(
                    f"A gradient of shape {list(tensor.grad.shape)} is sparse, and moments are dense; make the "
                    "embedding with sparse=False."
                )
        for group in self.param_groups:
            given = [p for p in group["params"] if p.grad is not None and p.numel()]
            if group.get("rank") is None:
                self._plain_step(given, group)
            else:
                for tensor in given:
                    self._projected_step(tensor, group)
        return loss

    def _parameters(self) -> list[tuple[Tensor, dict[str, Any]]]:
        return [(p, group) for group in self.param_groups for p in group["params"]]

    def _plain_step(self, given: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in given]
        for tensor, state in zip(given, states):
            if not state:
                state["step"] = torch.zeros(())
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
        first, second, steps = ([s[name] for s in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        _adam(given, [p.grad for p in given], first, second, steps, group, weight_decay=group["weight_decay"])

    def _projected_step(self, tensor: Tensor, group: dict[str, Any]) -> None:
        state, decay = self.state[tensor], group["lr"] * group["weight_decay"]
        weight, gradient = (_matrix(t, group) for t in (tensor, tensor.grad))
        if not state:
            state["step"] = torch.zeros(())
        with torch.autocast(tensor.device.type, enabled=False):  # it would round the products
            if group["normalize"] == "none":
                moved = weight * (1 - decay) + self._change(gradient, state, group)
            else:
                moved = self._normalized_step(weight, gradient, state, group)
        state["step"] += 1
        tensor.copy_((moved.mT if group.get("output_axis") else moved).reshape(tensor.shape))

    def _normalized_step(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> Tensor:
        length = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
        if "radius" not in state:
            state |= {name: torch.zeros_like(length) for name in ("radius", "length_avg", "length_avg_sq")}
        # signed ‖v‖; v starts as W, and a row that was given a direction from outside starts anew
        radius = torch.where(state["radius"] == 0, length, state["radius"])
        gone = length == 0
        v = weight * (radius / torch.where(gone, 1, length))
        g = torch.copysign(length, radius)
        of_g, of_v = weight_norm_gradients(gradient, v, g)
        first, second, steps = [state["length_avg"]], [state["length_avg_sq"]], [state["step"].clone()]
        _adam([g], [of_g], first, second, steps, group, weight_decay=group["weight_decay"])
        v += self._change(of_v, state, group)
        norm = torch.linalg.vector_norm(v, dim=1, keepdim=True)
        g = torch.where(gone, norm, g)
        state["radius"] = torch.copysign(norm, g)
        return v * (g / torch.where(norm == 0, 1, norm))

    def _change(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """−lr · scale · U N(Uᵀ G V) Vᵀ, with new bases where it is time."""
        if state.get("age", group["update_proj_gap"]) >= group["update_proj_gap"]:
            _renew(gradient, state, group)
        bases = state.get("left"), state.get("right")
        low = project(gradient, *bases)
        if "exp_avg" not in state:
            state |= {name: torch.zeros_like(low) for name in ("exp_avg", "exp_avg_sq")}
        # reset moments have seen the gradients since the last basis only
        seen = torch.tensor(float(state["age"])) if group["moments"] == "reset" else state["step"].clone()
        change = torch.zeros_like(low)
        _adam([change], [low], [state["exp_avg"]], [state["exp_avg_sq"]], [seen], group, weight_decay=0.0)
        state["age"] += 1
        return project_back(change.mul_(group["scale"]), *bases)


def _renew(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """New bases, and what becomes of the moments."""
    old = state.get("left"), state.get("right")
    for side in projected_sides((gradient.shape[0], gradient.shape[1]), group["projection"]):
        state[side] = low_rank_basis(gradient, group["rank"], side)
    state["age"] = 0
    if "exp_avg" in state and group["moments"] == "rotate":
        new = state.get("left"), state.get("right")
        state["exp_avg"], state["exp_avg_sq"] = carried(state["exp_avg"], state["exp_avg_sq"], old, new)
    elif "exp_avg" in state and group["moments"] == "reset":
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()


def _adam(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    steps: list[Tensor],
    group: Mapping[str, Any],
    *,
    weight_decay: float,
) -> None:
    """torch's AdamW, in place, steps included."""
    beta1, beta2 = group["betas"]
    options = {"beta1": beta1, "beta2": beta2, "lr": group["lr"], "eps": group["eps"], "weight_decay": weight_decay}
    adamw(parameters, gradients, first, second, [], steps, amsgrad=False, maximize=False, **options)


def _matrix(tensor: Tensor, group: Mapping[str, Any]) -> Tensor:
    """(out, in · …), float32 at least."""
    matrix = tensor.mT if group.get("output_axis") else as_matrix(tensor)
    return matrix.to(wide(tensor))


def _check(group: dict[str, Any]) -> None:
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise RecipeError(f"LowRankProjectedAdamW: betas must be two numbers, got {betas!r}.")
    options = {name: group[name] for name in LowRankProjection.__dataclass_fields__ if name in group}
    if options.get("rank", 1) is None:
        del options["rank"]
    configure(LowRankProjection, {**options, "beta1": betas[0], "beta2": betas[1]}, "LowRankProjectedAdamW")
    projected, axis = group.get("rank") is not None, group.get("output_axis", 0)
    for tensor in group["params"]:
        shape = list(tensor.shape)
        if not tensor.is_floating_point():
            raise RecipeError(
                f"LowRankProjectedAdamW: parameters are real floating point, got {tensor.dtype} of shape {shape}; give "
                "such parameters to an optimizer of torch."
            )
        if projected and (tensor.dim() < 2 or is_sharded(tensor)):
            raise RecipeError(
                f"LowRankProjectedAdamW: a group with a rank has whole matrices, got a parameter of shape {shape}, "
                "perhaps split over machines; leave `rank` out of its group."
            )
        if axis not in (0, 1) or (axis == 1 and tensor.dim() != 2):
            raise RecipeError(
                f"LowRankProjectedAdamW: output_axis is 0, or 1 for matrices, got {axis!r} for a parameter of shape {shape}."
            )


METHODS = (
    OptimizerMethod(
        name="galore",
        family="adapt",
        config=LowRankProjection,
        summary="AdamW with moments in a low-rank projection of each matrix's gradient.",
        goal="train",
        origin="GaLore, arXiv:2403.03507",
        needs="gradients",
        optimizer=LowRankProjectedAdamW,
        trial={"rank": 2, "update_proj_gap": 5},
        checked_by=("independent reference",),
    ),
    OptimizerMethod(
        name="gradnormlorp",
        family="adapt",
        config=LowRankProjection,
        summary="AdamW with moments in a two-sided low-rank projection, on directions and lengths of rows apart.",
        goal="train",
        paper="gradnormlorp",
        needs="gradients",
        defaults={"projection": "both", "normalize": "weight"},
        optimizer=LowRankProjectedAdamW,
        trial={"rank": 2, "update_proj_gap": 5},
        checked_by=("closed form", "torch"),
    ),
)
