"""Small bottlenecks after a frozen model's layers, whose matrices are sums of Kronecker products that layers share.

Compacter, Karimi Mahabadi et al., arXiv:2106.04647 (2021), on the PHM layers of Zhang et al., arXiv:2102.08597 (2021).

    H = Σ_i A_i ⊗ (s_i t_i)           PHM: x (…, in) -> x H + b (…, out);  i = 1 … n
    A: (n, n, n)                      the rule, one for all layers of all adapters where it is shared
    s: (n, in / n, rank), t: (n, rank, out / n)
    y = h + U(gelu(D(h)))             the adapter; D: features -> features / reduction, U: back, both PHM; gelu by tanh

H is never built: with x as (…, n, in / n), each x_a is multiplied by all s_i, mixed over a by A_i, multiplied by t_i.
Parameters of a layer: n rank (in + out) / n = rank (in + out), its bias out, and n³ once for the rule. Compacter stands
after attention and feed-forward of each block, Compacter++ after feed-forward alone, both before the residual sum.

    init="paper"  A ~ N(0, 10⁻⁸) (0.01² where not shared), s and t Xavier-uniform of gain √2, biases 0: nearly the identity
    init="zero"   A ~ N(0, 1/n), s ~ N(0, n/in), t ~ N(0, 1/(n rank)), t of U zero, biases 0: exactly the identity

Differences from the paper and its code: "zero" is ours; it leaves D white noise as it is on average, and gradients do
not pass through a rule of 10⁻⁴, which plain gradient descent cannot leave. The code's rank above 1 multiplies the two
factors entry by entry, here they are a matrix product. The paper trains layer norms too: ``also_train=nn.LayerNorm``.
Complexity: n · rank · (in + out) + n³ · rank multiplications a token and layer. Re-implemented from the equations
(official code: no licence).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.errors import RecipeError
from weft.function.layer import LayerMethod
from weft.method import parameter

_SHARED_STD, _OWN_STD = 1e-4, 1e-2  # of the rule, in the paper's code


@dataclass(frozen=True)
class Compacter:
    """A bottleneck of parametrised hypercomplex multiplications.

    Source: arXiv:2106.04647, sections 3.1 and 4.

    >>> Compacter(reduction=4).build(64)
    CompacterAdapter(
      (down): PHMLinear(64, 16, n=4, rank=1)
      (up): PHMLinear(16, 64, n=4, rank=1)
    )
    """

    reduction: int = parameter(32, "features over the width of the bottleneck", minimum=1)
    n: int = parameter(4, "Kronecker products in a sum, and the size of their first factors", minimum=1)
    rank: int = parameter(1, "of their second factors", minimum=1)
    init: str = parameter("paper", "paper: nearly the identity, zero: exactly", choices=("paper", "zero"))

    def build(self, features: int) -> nn.Module:
        """The adapter."""
        return CompacterAdapter(features, reduction=self.reduction, n=self.n, rank=self.rank, init=self.init)


def phm_matrix(rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """H = Σ_i A_i ⊗ (s_i t_i), built: to look at, or to merge.

    Args:
        rule: A (n, n, n).
        left, right: s (n, in / n, rank) and t (n, rank, out / n).

    Returns:
        (in, out): what x of shape (…, in) is multiplied by from the right.

    >>> phm_matrix(torch.ones(1, 1, 1), torch.ones(1, 3, 1), torch.ones(1, 1, 2)).shape
    torch.Size([3, 2])
    """
    n = len(rule)
    return torch.einsum("iac,ikr,irp->akcp", rule, left, right).reshape(n * left.shape[1], n * right.shape[2])


def phm_product(x: Tensor, rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x H without building H; arguments as for :func:`phm_matrix`, x (…, in) -> (…, out).

    >>> x, rule, s, t = torch.randn(5, 6), torch.randn(2, 2, 2), torch.randn(2, 3, 1), torch.randn(2, 1, 4)
    >>> bool(torch.allclose(phm_product(x, rule, s, t), x @ phm_matrix(rule, s, t), atol=1e-5))
    True
    """
    parts = x.unflatten(-1, (len(rule), left.shape[1]))
    thin = torch.einsum("...ak,ikr->...air", parts, left)
    mixed = torch.einsum("...air,iac->...cir", thin, rule)
    return torch.einsum("...cir,irp->...cp", mixed, right).flatten(-2)


class PHMLinear(nn.Module):
    """A linear map whose matrix is a sum of n Kronecker products.

    Args:
        in_features, out_features: sizes; n divides both.
        n: how many products.
        rank: of their second factors.
        bias: add one, which starts at zero.
        rule: the first factors (n, n, n), to share them; None draws some.
        init: "paper" or "zero", see the module's docstring.

    Source: arXiv:2102.08597, section 3.

    >>> PHMLinear(8, 4, n=2)(torch.ones(3, 8)).shape
    torch.Size([3, 4])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        n: int = 4,
        rank: int = 1,
        bias: bool = True,
        rule: nn.Parameter | None = None,
        init: str = "paper",
    ):
        super().__init__()
        if n < 1 or in_features % n or out_features % n or min(in_features, out_features, rank) < 1:
            raise RecipeError(
                f"n={n} must divide the {in_features} inputs and the {out_features} outputs, one or more of each, at a "
                f"rank of 1 or more (got {rank}); choose another n or, in an adapter, another reduction."
            )
        if rule is not None and tuple(rule.shape) != (n, n, n):
            raise RecipeError(f"The shared rule must be {[n] * 3}, got {list(rule.shape)}.")
        self.in_features, self.out_features, self.n, self.rank = in_features, out_features, n, rank
        self.rule = nn.Parameter(torch.empty(n, n, n)) if rule is None else rule
        self.left = nn.Parameter(torch.empty(n, in_features // n, rank))
        self.right = nn.Parameter(torch.empty(n, rank, out_features // n))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)
        if rule is None:
            draw_rule(self.rule, init, shared=False)
        if init == "paper":
            for factor in (*self.left, *self.right):
                nn.init.xavier_uniform_(factor, gain=math.sqrt(2))
        else:
            nn.init.normal_(self.left, std=math.sqrt(n / in_features))
            nn.init.normal_(self.right, std=1 / math.sqrt(n * rank))

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) -> (…, out_features)."""
        if x.shape[-1] != self.in_features:
            raise RecipeError(f"PHMLinear takes {self.in_features} features on the last axis, got {list(x.shape)}.")
        y = phm_product(x, self.rule, self.left, self.right)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.in_features}, {self.out_features}, n={self.n}, rank={self.rank}"


def draw_rule(rule: nn.Parameter, init: str, *, shared: bool) -> None:
    """Draw the first factors in place, as the module's docstring has them.

    >>> draw_rule(nn.Parameter(torch.empty(2, 2, 2)), "zero", shared=True)
    """
    own = _SHARED_STD if shared else _OWN_STD
    nn.init.normal_(rule, std=own if init == "paper" else 1 / math.sqrt(len(rule)))


class CompacterAdapter(nn.Module):
    """h + U(gelu(D(h))), U and D sums of Kronecker products with one rule.

    Args:
        features: of h, its last axis.
        reduction: features over the width of the bottleneck.
        n, rank, init: as for :class:`PHMLinear`.
        rule: to share it with other adapters; its values are left as they are.

    Source: arXiv:2106.04647, section 4.

    >>> adapter, h = CompacterAdapter(64, reduction=8, init="zero"), torch.randn(2, 3, 64)
    >>> bool(torch.equal(adapter(h), h)), sum(p.numel() for p in adapter.parameters())
    (True, 280)
    """

    def __init__(
        self,
        features: int,
        *,
        reduction: int = 32,
        n: int = 4,
        rank: int = 1,
        init: str = "paper",
        rule: nn.Parameter | None = None,
    ):
        super().__init__()
        if init not in ("paper", "zero"):
            raise RecipeError(f'init must be "paper" or "zero", got {init!r}.')
        width = features // reduction
        if rule is None:
            rule = nn.Parameter(torch.empty(n, n, n))
            draw_rule(rule, init, shared=True)
        self.down = PHMLinear(features, width, n=n, rank=rank, rule=rule, init=init)
        self.up = PHMLinear(width, features, n=n, rank=rank, rule=rule, init=init)
        if init == "zero":
            nn.init.zeros_(self.up.right)

    def forward(self, h: Tensor) -> Tensor:
        """(…, features) -> (…, features)."""
        y = self.up(functional.gelu(self.down(h), approximate="tanh"))
        return torch.add(h, y).to(h.dtype)


def _identity(x: Tensor) -> Tensor:
    return x


METHODS = (
    LayerMethod(
        name="compacter",
        family="adapt",
        config=Compacter,
        layer=CompacterAdapter,
        summary="Bottlenecks of Kronecker products with shared factors after layers of a frozen model.",
        goal="adapt",
        paper="compacter",
        starts_as=_identity,
        start_error=1e-3,  # two maps with a rule of about 1e-4 each
        trial={"reduction": 3, "n": 2},
        checked_by=("closed form", "brute force"),
    ),
)
