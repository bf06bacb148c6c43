"""Small models and layers for the checks of weight functions."""

from __future__ import annotations

import atexit
import tempfile
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from weft.function.attach import Attached, parametrize_
from weft.function.classes import Carrier
from weft.function.export import plain_state_dict
from weft.function.protocol import FunctionMethod, Inner, WeightFunction
from weft.function.stack import Stack


class Block(nn.Module):
    """Two layers beside a shortcut."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.up = nn.Linear(16, 32, dtype=dtype)
        self.down = nn.Linear(32, 16, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 16) -> (batch, 16)."""
        y: Tensor = x + self.down(torch.tanh(self.up(x)))
        return y


class Net(nn.Module):
    """Two blocks and a head, of the same numbers each time.

    Attributes:
        checkpointing: None, or whether checkpointing is of the reentrant kind.
    """

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.checkpointing: bool | None = None
        self.blocks = nn.ModuleList([Block(dtype), Block(dtype)])
        self.head = nn.Linear(16, 8, dtype=dtype)
        fill(self, 0)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 16) -> (batch, 8)."""
        for block in self.blocks:
            if self.checkpointing is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing)
        y: Tensor = self.head(x)
        return y


class Tied(nn.Module):
    """An embedding whose weight is the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight
        fill(self, 0)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch) -> (batch, 16)."""
        y: Tensor = self.head(self.embedding(tokens))
        return y


class Experts(nn.Module):
    """A stack of matrices, (experts, out, in), or as (experts, in, out)."""

    def __init__(self, *, is_transposed: bool = False):
        super().__init__()
        self.is_transposed = is_transposed
        self.weight = nn.Parameter(torch.empty(3, 8, 16) if is_transposed else torch.empty(3, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 8) -> (experts, batch, 16); reads its weight once for each expert."""
        matrices = [self.weight[i].mT if self.is_transposed else self.weight[i] for i in range(3)]
        return torch.stack([functional.linear(x, matrix) for matrix in matrices])


def layers() -> dict[str, tuple[nn.Module, Tensor]]:
    """A layer of each layout, with an input."""
    made: dict[str, tuple[nn.Module, Tensor]] = {
        "linear": (nn.Linear(16, 8), torch.randn(4, 16)),
        "wide linear": (nn.Linear(8, 16, bias=False), torch.randn(2, 3, 8)),
        "embedding": (nn.Embedding(16, 8), torch.tensor([3, 0, 3])),
        "1-d convolution": (nn.Conv1d(8, 16, 3), torch.randn(2, 8, 5)),
        "2-d convolution": (nn.Conv2d(8, 16, 3), torch.randn(2, 8, 5, 5)),
        "3-d convolution": (nn.Conv3d(8, 8, 2), torch.randn(2, 8, 3, 3, 3)),
        "grouped convolution": (nn.Conv2d(8, 16, 3, groups=2), torch.randn(2, 8, 5, 5)),
        "transposed convolution": (nn.ConvTranspose2d(8, 16, 3), torch.randn(2, 8, 4, 4)),
        "grouped transposed convolution": (nn.ConvTranspose2d(8, 16, 3, groups=2), torch.randn(2, 8, 4, 4)),
        "experts": (Experts(), torch.randn(4, 8)),
        "transposed experts": (Experts(is_transposed=True), torch.randn(4, 8)),
    }
    for module, _ in made.values():
        fill(module, 1)
    return made


def fill(module: nn.Module, seed: int) -> None:
    """Numbers of a trained layer's size into all parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            if not value.is_meta:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float64))


def shake(module: nn.Module, seed: int = 2) -> None:
    """Move all parameters a little, as some steps of training do: many functions start as the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype))


def configuration(method: FunctionMethod, model: nn.Module | None = None) -> Any:
    """The row's configuration for small layers; required parameters get middling values.

    Args:
        method: the row.
        model: what its function will go on, for rows that read checkpoints of the model.
    """
    required = {k: (p.choices[0] if p.choices else 0.5) for k, p in method.parameters.items() if p.required}
    given = {method.checkpoints: _checkpoints(model or Net())} if method.checkpoints else {}
    return method.configure({**required, **method.trial, **given})


def _checkpoints(model: nn.Module) -> tuple[str, ...]:
    """Two files with numbers of a trained layer's size for all tensors of a model, written once in a process."""
    shapes = {n: tuple(t.shape) for n, t in plain_state_dict(model).items()}
    paths = []
    for seed in (21, 22):
        path = Path(_folder().name) / f"{zlib.crc32(repr(shapes).encode()):08x}-{seed}.safetensors"
        if not path.exists():
            generator = torch.Generator().manual_seed(seed)
            save_file({n: 0.3 * torch.randn(shape, generator=generator) for n, shape in shapes.items()}, path)
        paths.append(str(path))
    return tuple(paths)


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Goes with the process."""
    made = tempfile.TemporaryDirectory()
    atexit.register(made.cleanup)
    return made


def attach(method: FunctionMethod, model: nn.Module, *, moved: bool = True, seed: int = 0) -> Attached:
    """Attach a row's function to all weights of a model; ``moved``: as some steps on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        report = parametrize_(model, configuration(method, model), data=batches(model))
    if moved:
        shake(model)
    return report


def batches(model: nn.Module) -> list[Tensor]:
    """Two batches of inputs for one of the models here, for functions that start from data."""
    first = next(m for m in model.modules() if m._parameters or isinstance(m, Carrier))
    kinds: dict[type, tuple[int, ...]] = {
        nn.Conv1d: (5,),
        nn.Conv2d: (5, 5),
        nn.Conv3d: (3, 3, 3),
        nn.ConvTranspose2d: (4, 4),
    }
    generator = torch.Generator().manual_seed(11)
    value = next(model.parameters())
    made = []
    for _ in range(2):
        if isinstance(first, nn.Embedding):
            made.append(torch.randint(0, first.num_embeddings, (32,), generator=generator))
            continue
        features = next((getattr(first, n) for n in ("in_features", "in_channels") if hasattr(first, n)), 8)
        space = next((s for kind, s in kinds.items() if isinstance(first, kind)), ())
        draws = torch.randn(32, features, *space, generator=generator, dtype=torch.float64)
        made.append(draws.to(value.device, value.dtype))
    return made


def stack_of(layer: Any, name: str = "weight") -> Stack:
    """What computes a layer's tensor."""
    found: Stack = layer.parametrizations[name]
    return found


class Scaled(WeightFunction):
    """A function with a fast path: each output times a number."""

    has_product = True

    def __init__(self, weight: Tensor):
        super().__init__()
        self.log = nn.Parameter(torch.linspace(-0.5, 0.5, weight.shape[0], dtype=weight.dtype))

    def forward(self, stored: Tensor) -> Tensor:
        """(out, in) -> (out, in)."""
        return stored * self.log.exp().unsqueeze(-1)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """See the base."""
        return weight / self.log.exp().unsqueeze(-1)

    def product(self, x: Tensor, inner: Inner) -> Tensor:
        """See the base."""
        return inner(x) * self.log.exp()


class Shifted(WeightFunction):
    """A function without a fast path: plus a matrix, times a number."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.shift = nn.Parameter(0.1 * torch.ones_like(weight).cumsum(0) / weight.shape[0])

    def forward(self, stored: Tensor) -> Tensor:
        """(out, in) -> (out, in)."""
        return 1.5 * stored + self.shift

    def right_inverse(self, weight: Tensor) -> Tensor:
        """See the base."""
        return (weight - self.shift) / 1.5


class Other:
    """The configuration of a function that stands in for any other."""

    def __init__(self, kind: type[Scaled] | type[Shifted]):
        self.kind = kind

    def build(self, weight: Tensor, *, batched: bool) -> WeightFunction:
        """See FunctionConfig."""
        return self.kind(weight)
