"""Put Compacter's adapters behind chosen modules of a frozen model, in place, and take them out again.

An adapter is a submodule of the module whose output it changes, called by a forward hook that is a function of this
file, so a model with adapters is copied, pickled, compiled and checkpointed as any other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from weft.adapt.compacter import Compacter
from weft.errors import RecipeError
from weft.function.classes import unwrapped
from weft.function.where import Selector, matches, nearest_names

_NAME = "compacter"  # of the adapter, in the module after which it stands
_NOT_AFTER = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # which would run it, or list it, as one of theirs


@dataclass
class Inserted:
    """What ``insert_compacter_`` did.

    Attributes:
        after: names of the modules that have an adapter behind them now.
        trainable: numbers that train now, the shared rule once.
        total: numbers of the model and its adapters.
    """

    after: list[str] = field(default_factory=list)
    trainable: int = 0
    total: int = 0

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        return f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {share:.4f}"


def insert_compacter_(
    model: nn.Module,
    config: Compacter,
    where: Selector,
    *,
    features: int | None = None,
    shared_rule: bool = True,
    also_train: Selector = (),
) -> Inserted:
    """Freeze a model and put an adapter behind each chosen module, in place; the adapters train.

    An adapter is the submodule ``compacter`` of the module whose output it changes, so a state dict has it at
    ``<module>.compacter``. Of an output that is a tuple it changes the first tensor, as attention layers have it.

    Args:
        model: any module.
        config: of the adapters.
        where: after which modules, see :mod:`weft.function.where`; in BERT ``"output.dense"`` is Compacter, and
            ``"re:.*layer.[0-9]+.output.dense"`` Compacter++.
        features: of their outputs' last axis; read off linear layers and layer norms.
        shared_rule: one rule for all adapters (and one Parameter), or one for each.
        also_train: modules that train beside them, such as ``nn.LayerNorm`` or a new head.

    Raises:
        RecipeError: nothing matched, a size is unknown or does not fit, or an adapter is there; nothing has changed.

    >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    >>> print(insert_compacter_(model, Compacter(reduction=4), where=nn.Linear))
    trainable params: 184 || all params: 728 || trainable%: 25.2747
    >>> remove_compacter_(model), len(list(model.parameters()))
    (['0', '2'], 4)
    """
    bare = unwrapped(model)
    named = list(bare.named_modules())
    chosen = {path: m for path, m in named if matches(where, path, m)}
    if not chosen:
        raise RecipeError(f"No module was chosen by {where!r}.{nearest_names(where, named)}")
    trained = [m for path, m in named if also_train and matches(also_train, path, m)]
    if also_train and not trained:
        raise RecipeError(f"also_train={also_train!r} chooses no module.{nearest_names(also_train, named)}")
    adapters: dict[str, nn.Module] = {}
    rule: nn.Parameter | None = None
    for path, module in chosen.items():
        size = _checked_size(path, module, features)
        value = next(bare.parameters(), torch.empty(0))
        value = next(module.parameters(), value)
        made = config.build(size).to(value.device, value.dtype if value.is_floating_point() else None)
        if shared_rule:
            rule = made.down.rule if rule is None else rule
            made.down.rule = made.up.rule = rule
        adapters[path] = made.train(module.training)
    bare.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)
    for path, adapter in adapters.items():
        chosen[path].add_module(_NAME, adapter)
        chosen[path].register_forward_hook(_adapt)
    return Inserted(
        list(adapters),
        sum(p.numel() for p in bare.parameters() if p.requires_grad),
        sum(p.numel() for p in bare.parameters()),
    )


def remove_compacter_(model: nn.Module) -> list[str]:
    """Take all adapters of :func:`insert_compacter_` out again; the model computes what it did, and stays frozen.

    Returns:
        Names of the modules that had one.
    """
    found = []
    for path, module in unwrapped(model).named_modules():
        for key in [k for k, hook in module._forward_hooks.items() if hook is _adapt]:
            del module._forward_hooks[key]
            delattr(module, _NAME)
            found.append(path)
    return found


def _adapt(module: Any, args: Any, output: Any) -> Any:
    """The hook: a function of a module's own, so that models copy, pickle and compile."""
    if isinstance(output, tuple):
        return (module.compacter(output[0]), *output[1:])
    return module.compacter(output)


def _checked_size(path: str, module: nn.Module, features: int | None) -> int:
    if isinstance(module, _NOT_AFTER):
        raise RecipeError(
            f"{path or 'The model'} is a {type(module).__name__}, which would run an adapter inside it as one of its own "
            "modules; choose the module whose output it returns."
        )
    if _NAME in module._modules or hasattr(module, _NAME):
        raise RecipeError(
            f"{path or 'The model'} has an adapter already; call weft.adapt.remove_compacter_(model) first."
        )
    if features is not None:
        return features
    for name in ("out_features", "nf", "embedding_dim"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    shape = getattr(module, "normalized_shape", None)
    if shape:
        return int(shape[-1])
    raise RecipeError(
        f"The size of what {path or 'the model'} ({type(module).__name__}) returns is unknown; pass features=…"
    )
