"""Learn which of its nearest vectors each piece of a row becomes, together with the vectors; made for diffusion transformers.

VQ4DiT: Efficient Post-Training Vector Quantization for Diffusion Transformers, Deng et al., arXiv:2408.17131 (AAAI 2025).

    ŵ = Σⱼ rⱼ c_{A(w)_j},   r = softmax(z) ∈ ℝⁿ        A(w) = the n entries of the codebook C (k, d) that are nearest to w
    minimise over C, z:     L + λ Σ_{w,j} (1 − |2 rⱼ − 1|) / #w

w are pieces of d consecutive inputs of a row of W (out, in), C starts as k-means of all of them and z as log of distances, so
that r falls with them. L is the reconstruction of a block's outputs, or of a layer's from its Gram matrix
(:mod:`weft.quantize.reconstruct`); λ grows with the steps to ``decide``. A piece whose largest r passes ``freeze`` is that
entry from then on. What is kept is the state whose hard choices were best, the k-means start among them.

``learn``: both at once, the codebook alone, or assignments in the first half of the steps and both in the second, as the
code does. Data-free calibration is the batches' business: give the model noise and what it makes of it step by step.

Differences from the paper and its code: Adam instead of RMSprop; the penalty is the paper's and always there (the code's is
r (1 − r), in steps that it did not fall by itself); blocks are trained one after another instead of all at once; entries are
halved until codebooks take no more than ``overhead`` bits a weight, and a note says so.
Complexity: n · (1 + 2 / d) numbers to train a weight's piece with Adam's two, O(out · in · k) for the start.
Re-implemented from the equations (official code: non-commercial, not used).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.calibrate import BlockTask, Change
from weft.calibrate.task import EachLayer
from weft.errors import RecipeError
from weft.function.quantizer import QuantizeMethod
from weft.method import parameter
from weft.packed import Vectors
from weft.quantize.grid import checked
from weft.quantize.kmeans import PAIRS, affordable, as_half, weighted_kmeans
from weft.quantize.reconstruct import Reconstruction
from weft.quantize.soft import Descent, Soft

LEARN = ("both", "codebook", "assignments first")
ONE_HOT = 60.0  # logits of ± this give exactly 1 and 0 in single precision, and no gradient


@dataclass(frozen=True)
class VQ4DiT(Reconstruction):
    """Vectors, candidates, and how they are trained.

    >>> VQ4DiT(length=2, entries=64).bits
    3.0
    """

    length: int = parameter(4, "consecutive inputs of a row that make a vector", minimum=1, maximum=64)
    entries: int = parameter(256, "vectors of the codebook", minimum=2, maximum=65536)
    candidates: int = parameter(2, "nearest vectors among which each piece chooses", minimum=1, maximum=16)
    learn: str = parameter("both", "what is trained: both, codebook or assignments first", choices=LEARN)
    steps: int = parameter(400, "gradient steps for each block", minimum=0)
    rate: float = parameter(0.05, "learning rate of assignments", minimum=0)
    codebook_rate: float = parameter(1e-3, "learning rate of the codebook, in units of the largest weight", minimum=0)
    decide: float = parameter(1.0, "λ at the end, where the loss of the start is 1", minimum=0)
    freeze: float = parameter(0.99, "largest share at which a piece is decided", minimum=0.5, maximum=1)
    overhead: float = parameter(
        0.25, "bits a weight that codebooks may take; entries are halved until they do", minimum=0
    )
    samples: int = parameter(8, "sequences in a mini-batch", minimum=1)

    def __post_init__(self) -> None:
        if min(self.length, self.candidates, self.samples) < 1 or self.entries < 2 or self.steps < 0:
            raise RecipeError(
                f"VQ4DiT needs length, candidates and samples of at least 1, two entries or more and steps ≥ 0, got {self}."
            )
        if self.learn not in LEARN or not 0.5 <= self.freeze <= 1:
            raise RecipeError(
                f"VQ4DiT learns {', '.join(LEARN)} and freezes from 0.5 to 1, got {self.learn!r} and {self.freeze!r}."
            )
        numbers = (self.rate, self.codebook_rate, self.decide, self.overhead)
        if not all(0 <= v < math.inf for v in numbers):
            raise RecipeError(f"VQ4DiT's rates, decide and overhead are not negative, got {numbers}.")

    @property
    def bits(self) -> float:
        """Of the indices, a weight."""
        return math.ceil(math.log2(self.entries)) / self.length

    def soft(self, weight: Tensor, generator: torch.Generator) -> SoftAssignment:
        """Candidates and codebook of a matrix; k-means draws."""
        return SoftAssignment(weight, self, generator)

    def descent(self) -> Descent:
        """Adam, with a cosine to zero."""
        return Descent(self.steps, 1.0, "adam", "cosine", self.samples)

    def without_data(self) -> Change:
        """The start: plain k-means."""
        return EachLayer(lambda name, weight, statistics: self.soft(weight, torch.Generator()).packed())

    def change_block(self, task: BlockTask) -> None:
        """The layers of a block together; see :class:`~weft.quantize.reconstruct.Reconstruction`."""
        super().change_block(task)
        for name in task.layers:
            notes = affordable([self.entries], self.length, task.weight(name).shape, self.overhead)[1]
            if notes:
                task.note(name, notes=list(notes))


class SoftAssignment(Soft):
    """Pieces of rows as mixtures of their nearest codewords.

    Args:
        weight: (out, in).
        config: sizes.
        generator: of k-means.

    Attributes:
        codebook: (k, d), in units of the largest weight.
        logits: (out · ⌈in / d⌉, n), z.
        nearest: (out · ⌈in / d⌉, n) int64, A(w), the nearest first.

    Raises:
        RecipeError: it is no matrix of finite numbers.

    Source: arXiv:2408.17131, equations 5 to 10.

    >>> weight = torch.tensor([[0.0, 0.1, 1.0, 0.9]])
    >>> soft = SoftAssignment(weight, VQ4DiT(length=1, entries=2, overhead=16), torch.Generator())
    >>> soft.packed().dequantize().mul(100).round().tolist(), soft.shares().sum(1).tolist()
    ([[5.0, 5.0, 95.0, 95.0]], [1.0, 1.0, 1.0, 1.0])
    """

    nearest: Tensor
    unit: Tensor

    def __init__(self, weight: Tensor, config: VQ4DiT, generator: torch.Generator):
        super().__init__()
        weight = checked(weight).float()
        self.config, self.shape = config, (weight.shape[0], weight.shape[1])
        self.register_buffer("unit", weight.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
        padded = functional.pad(weight / self.unit, (0, -weight.shape[1] % config.length))
        vectors = padded.reshape(-1, config.length)
        (entries,), _ = affordable([config.entries], config.length, self.shape, config.overhead)
        table = weighted_kmeans(vectors, entries, generator=generator)
        parts = [  # distances of a few vectors at a time
            torch.cdist(part, table, compute_mode="donot_use_mm_for_euclid_dist").topk(
                min(config.candidates, entries), largest=False
            )
            for part in vectors.split(max(1, PAIRS // entries))
        ]
        distances = torch.cat([p.values for p in parts]).clamp(min=1e-6)
        self.register_buffer("nearest", torch.cat([p.indices for p in parts]))
        self.codebook = nn.Parameter(table.clone())
        self.logits = nn.Parameter((distances[:, -1:] / distances).log())
        self.progress = 0.0
        self.project()

    def shares(self) -> Tensor:
        """r: (pieces, n)."""
        return self.logits.softmax(1)

    def forward(self) -> Tensor:
        """Ŵ (out, in), float32."""
        if self.config.learn == "codebook":
            vectors = self.codebook[self.nearest[:, 0]]
        else:
            vectors = (self.shares().unsqueeze(2) * self.codebook[self.nearest]).sum(1)
        return vectors.reshape(self.shape[0], -1)[:, : self.shape[1]] * self.unit

    @torch.no_grad()
    def packed(self) -> Vectors:
        """Each piece's largest share."""
        first = self.logits.argmax(1, keepdim=True) if self.config.learn != "codebook" else self.nearest[:, :1] * 0
        indices = self.nearest.gather(1, first).reshape(1, self.shape[0], -1).to(torch.int32)
        return Vectors(indices, (as_half(self.codebook.detach() * self.unit).unsqueeze(0),), self.shape[1])

    def begin(self, progress: float) -> None:
        """λ grows; in the second half the codebook is trained too, where assignments go first."""
        self.progress = progress
        self.codebook.requires_grad_(self.config.learn != "assignments first" or progress >= 0.5)

    @torch.no_grad()
    def project(self) -> None:
        """Freeze what is decided."""
        shares = self.shares()
        largest = shares.max(1, keepdim=True)
        chosen = torch.zeros_like(shares).scatter_(1, largest.indices, 1) * 2 - 1
        self.logits.copy_(torch.where(largest.values > self.config.freeze, chosen * ONE_HOT, self.logits))

    def undecided(self) -> Tensor:
        """Σ (1 − |2 r − 1|) over a piece's candidates, its mean over pieces: 0 if and only if all are decided."""
        return (1 - (2 * self.shares() - 1).abs()).sum(1).mean()

    def penalty(self) -> Tensor | None:
        """The share of what is undecided."""
        if self.config.learn == "codebook" or not self.config.decide:
            return None
        return self.config.decide * self.progress * self.undecided()

    def rates(self) -> list[tuple[float, list[nn.Parameter]]]:
        """Assignments and codebook have their own."""
        return [(self.config.rate, [self.logits]), (self.config.codebook_rate, [self.codebook])]


METHODS = (
    QuantizeMethod(
        name="vq4dit",
        family="quantize",
        config=VQ4DiT,
        summary="Pieces of rows learn which of their nearest codewords they become, so that a block's outputs stay.",
        goal="shrink",
        paper="vq4dit",
        needs="calibration",
        checked_by=("brute force", "autograd"),
        error=0.29,
        finer={"entries": (4, 16, 64, 256)},
        group="",
        ragged=True,
        exceptions={"a row of zeros stays one": "its pieces are near a vector of the codebook, and none need be zero"},
        trial={"overhead": 100.0, "steps": 8},
    ),
)
