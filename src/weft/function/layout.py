"""Which axes of a layer's tensor are outputs and inputs: what a layer stores, as a weight function sees it.

=================================  ==========================  ==================================
layer                              stored                      seen by a function
=================================  ==========================  ==================================
linear, embedding                  (out, in), (rows, columns)  the same
convolution                        (out, in / groups, …)       the same
transposed convolution             (in, out / groups, …)       (out, in / groups, …)
transformers' Conv1D (GPT-2)       (in, out)                   (out, in)
fused experts (Mixtral, Qwen-MoE)  (experts, out, in)          the same, a stack of matrices
fused experts (GPT-OSS, Llama 4)   (experts, in, out)          (experts, out, in), a stack
bilinear                           (out, in1, in2)             the same
=================================  ==========================  ==================================

A grouped convolution is one matrix whose rows are the weights of one output each. A layer of one's own is understood
if it has a ``kernel_size`` (a convolution) or says ``is_transposed = True`` ((…, in, out)); otherwise two axes are a
matrix, three a stack of matrices, and more a kernel (out, …).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

_TRANSPOSED_EXPERTS = ("Llama4TextExperts",)  # store (experts, in, out) and do not say so


@dataclass(frozen=True)
class Layout:
    """How a stored tensor is turned into what a function sees, and back.

    Attributes:
        batched: a stack of matrices.
        transposed: matrices are stored as (in, out).
        groups: of a transposed convolution; 0 for everything else.
    """

    batched: bool = False
    transposed: bool = False
    groups: int = 0

    def seen(self, stored: Tensor) -> Tensor:
        """The stored tensor as a function sees it.

        >>> import torch
        >>> Layout(groups=2).seen(torch.zeros(4, 3, 5)).shape
        torch.Size([6, 2, 5])
        """
        if self.transposed:
            return stored.mT
        return _swap(stored, self.groups) if self.groups else stored

    def stored(self, weight: Tensor) -> Tensor:
        """A function's result as the layer stores it: the inverse of :meth:`seen`."""
        return self.seen(weight)  # swapping two axes undoes itself


def layout_of(module: nn.Module, name: str, tensor: Tensor) -> Layout:
    """The layout of tensor ``name`` of a layer; see the module's table.

    >>> import torch
    >>> layout_of(nn.Conv1d(4, 6, 3), "weight", torch.zeros(6, 4, 3))
    Layout(batched=False, transposed=False, groups=0)
    """
    axes = tensor.dim()
    if isinstance(module, nn.modules.conv._ConvTransposeNd) and name == "weight":
        return Layout(groups=module.groups)
    if hasattr(module, "kernel_size") or isinstance(module, nn.Bilinear):
        return Layout()
    transposed = (is_conv1d(type(module)) and name == "weight") or (
        axes in (2, 3) and (getattr(module, "is_transposed", False) is True or _stores_transposed(type(module)))
    )
    return Layout(batched=axes == 3, transposed=transposed)


def is_conv1d(kind: type) -> bool:
    """Whether a class is transformers' Conv1D, which stores its matrix transposed (no import needed to know)."""
    return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers") for c in kind.__mro__)


def is_packed(module: nn.Module) -> bool:
    """Whether a module is a linear layer over a packed weight (``weft.packed``, which is not imported to know)."""
    return getattr(module, "packed_linear", False) is True


def _stores_transposed(kind: type) -> bool:
    return any(c.__name__ in _TRANSPOSED_EXPERTS and c.__module__.startswith("transformers") for c in kind.__mro__)


def _swap(kernel: Tensor, groups: int) -> Tensor:
    """(groups · a, b, …) -> (groups · b, a, …)."""
    first, second, *rest = kernel.shape
    split = kernel.reshape(groups, first // groups, second, *rest).transpose(1, 2)
    return split.reshape(groups * second, first // groups, *rest)
