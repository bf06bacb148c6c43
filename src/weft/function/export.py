"""Save a model that carries functions as if its weights were plain: no reader ever meets ``parametrizations.*`` names."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from weft.checkpoint.save import save_tensors
from weft.checkpoint.unbaked import refuse_unbaked
from weft.errors import OutputError, RecipeError
from weft.function.classes import Carrier, unwrapped
from weft.function.stack import PackedStack, gathered


def plain_state_dict(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A state dict with every computed weight in place of its function's parts.

    Args:
        model: with or without functions; if it is sharded, every process must call this.
        state: values to compute from instead of the model's own, such as a state dict gathered from shards; by the
            names that the model has inside torch.compile's and DistributedDataParallel's wrappers.

    Returns:
        Names as the plain model has them; computed weights are detached copies, tied names share one tensor.

    Raises:
        RecipeError: a computed weight is packed.

    >>> import weft
    >>> from weft.normalize import WeightStandardization
    >>> layer = nn.Linear(3, 2)
    >>> _ = weft.parametrize_(layer, WeightStandardization())
    >>> sorted(plain_state_dict(layer))
    ['bias', 'weight']
    """
    model = unwrapped(model)
    whole = {n: gathered(v) for n, v in (model.state_dict() if state is None else state).items()}
    computed: dict[int, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, Carrier):
            continue
        for name in module.weft_names:
            stack = module.parametrizations[name]
            if isinstance(stack, PackedStack):
                raise RecipeError(
                    f"{path}.{name} is packed, and with its functions it is no packed weight: save the adapter alone "
                    "(weft.adapt.save_adapter), or the model before functions were attached."
                )
            prefix = f"{path}.parametrizations.{name}." if path else f"parametrizations.{name}."
            parts = {n.removeprefix(prefix): whole.pop(n) for n in list(whole) if n.startswith(prefix)}
            if id(stack) not in computed and parts:
                computed[id(stack)] = stack.value(parts).contiguous()
            if id(stack) in computed:
                whole[f"{path}.{name}" if path else name] = computed[id(stack)]
    return whole


def save(model: nn.Module, folder: str | os.PathLike[str], **options: Any) -> None:
    """Save a model with baked weights; the model itself keeps its functions.

    Args:
        model: a transformers model (saved by its own ``save_pretrained``) or any module (saved as model.safetensors).
        folder: where; made if missing.
        options: passed on to ``save_pretrained``.

    Raises:
        OutputError: the folder cannot be written, or holds a model.safetensors and the model is not transformers' own.

    >>> import tempfile, weft
    >>> layer, folder = nn.Linear(3, 2), tempfile.mkdtemp()
    >>> _ = weft.parametrize_(layer, weft.adapt.LoRA(rank=1))
    >>> save(layer, folder)
    >>> with weft.open(folder) as written:
    ...     list(written)
    ['bias', 'weight']
    """
    bake_on_save()
    model = unwrapped(model)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder, **options)
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error}).") from None
    state = plain_state_dict(model)
    refuse_unbaked(state)
    first: dict[Any, str] = {}  # a file holds each storage once; names of its twins go where safetensors looks for them
    twins: dict[str, str] = {}
    for name, tensor in state.items():
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if tensor.numel() and first.setdefault(key, name) != name:
            twins[name] = first[key]
    kept = {n: t.detach().cpu().contiguous() for n, t in state.items() if n not in twins}
    save_tensors(Path(folder) / "model.safetensors", kept, {"format": "pt", **twins})


def bake_on_save() -> None:
    """Have transformers' ``save_pretrained`` write baked weights of models with functions, and all others as before.

    A model may be saved by its own method, by a trainer, or as a part of a larger model that knows of no functions; all
    of these end there, and a file with the parts of functions would load as random weights.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return
    owner = modeling.PreTrainedModel
    if not hasattr(owner.save_pretrained, "weft_original"):
        owner.save_pretrained = _baking(owner.save_pretrained)


def _baking(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(m, Carrier) for m in self.modules()):
            return original(self, save_directory, *args, **kwargs)
        call = inspect.signature(original).bind(self, save_directory, *args, **kwargs)
        call.arguments["state_dict"] = plain_state_dict(self, call.arguments.get("state_dict"))
        refuse_unbaked(call.arguments["state_dict"])
        return original(*call.args, **call.kwargs)

    save_pretrained.weft_original = original  # type: ignore[attr-defined]
    return save_pretrained
