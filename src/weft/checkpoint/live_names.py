"""How a model of transformers, once loaded, calls the tensors of its files.

transformers renames layers from release to release and reads old files through its own renamings, so what a live model
and its adapters call ``vit.layers.0.attention.q_proj`` is ``vit.encoder.layer.0.attention.attention.query`` in the file.
Some tensors are made from several of the file's (fused experts).
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterable, Iterator
from typing import Any

from weft.checkpoint.checkpoint import Checkpoint
from weft.errors import CheckpointError


class LiveNames:
    """The names of one model.

    Args:
        model: of transformers, on whatever device.
        names: of its tensors; those of its state dict if None.
    """

    def __init__(self, model: Any, names: Iterable[str] | None = None):
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = conversions(model)
        self._renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        self._converters = [m for m in mapping if isinstance(m, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._state = dict.fromkeys(model.state_dict() if names is None else names, True)

    def of(self, name: str) -> tuple[str, bool] | None:
        """The model's name for a file's tensor, and whether its values are converted; None if it has none."""
        from transformers.core_model_loading import rename_source_key

        renamed, converted = rename_source_key(name, self._renamings, self._converters, self._prefix, self._state)
        if renamed not in self._state:
            renamed, converted = rename_source_key(name, [], [], self._prefix, self._state)
        return (renamed, converted is not None) if renamed in self._state else None

    def places(self, wanted: Iterable[str], tensors: Iterable[str], where: str = "") -> dict[str, str]:
        """Those of ``tensors`` that are ``wanted`` in the model, or were it in an older one, by wanted name.

        Args:
            wanted: names in the model, or in files that it reads.
            tensors: names in a file, or the model's own.
            where: how to call both in messages; if empty, tensors that are converted are left out.

        Raises:
            CheckpointError: there is a ``where``, and the model makes a wanted tensor from several, or stores it otherwise than its files.
        """
        by_live: dict[str, list[tuple[str, bool]]] = {}
        for tensor in tensors:
            live = self.of(tensor)
            if live is not None:
                by_live.setdefault(live[0], []).append((tensor, live[1]))
        result = {}
        for name in wanted:
            goal = (name, False) if name in self._state else self.of(name)
            found = by_live.get(goal[0], []) if goal is not None else []
            if goal is None or not found:
                continue
            if goal[1] or len(found) > 1 or found[0][1]:
                if not where:
                    continue
                parts = [name] if goal[1] else sorted(n for n, _ in found)
                more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
                raise CheckpointError(
                    f"{where}: {goal[0]} of the model is made from {parts[0]}{more} of its files, and converted when it is "
                    "loaded, so a change of the one is not written as a change of the other. Load the adapter on the live "
                    "model that it was trained on (weft.adapt.load_adapter_), and write that with weft.save."
                )
            result[name] = found[0][0]
        return result


def names_of_model(model: Any, names: Iterable[str]) -> LiveNames | None:
    """The names of a live model, whose tensors are ``names``; None if it is none of transformers.

    >>> names_of_model(None, []) is None
    True
    """
    known = any(c.__name__ == "PreTrainedModel" for c in type(model).__mro__)
    return LiveNames(model, names) if known else None


def live_names(checkpoint: Checkpoint) -> LiveNames | None:
    """The names of a checkpoint's model; None where transformers is not there or does not know it.

    >>> import weft
    >>> live_names(weft.open({})) is None
    True
    """
    return _of_config(json.dumps(checkpoint.config, sort_keys=True, default=str)) if checkpoint.config else None


@functools.lru_cache(maxsize=4)
def _of_config(config: str) -> LiveNames | None:
    try:
        import transformers
    except ImportError:
        return None
    raw = json.loads(config)
    try:
        kind = transformers.models.auto.configuration_auto.CONFIG_MAPPING[raw["model_type"]]
        return LiveNames(on_meta(kind.from_dict(raw)))
    except Exception:  # of any of a thousand models; the caller says which names it did not find
        return None


def on_meta(config: Any, model_class: Any = None) -> Any:
    """A model of transformers without values.

    Args:
        config: transformers' configuration.
        model_class: the class to build; that of the configuration's ``architectures`` if None.

    Raises:
        CheckpointError: transformers has no such class.
    """
    import torch
    import transformers

    if model_class is None:
        names = config.architectures or ()
        model_class = next((getattr(transformers, n) for n in names if hasattr(transformers, n)), None)
        if model_class is None:
            model_class = transformers.AutoModel._model_mapping.get(type(config), None)
    if model_class is None:
        raise CheckpointError(
            f"transformers {transformers.__version__} has no model for {list(config.architectures or ())}."
        )
    for part in (config, config.get_text_config()):
        part.use_cache = False
        part._experts_implementation = "eager"
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    with torch.device("meta"), quiet():
        model = model_class._from_config(config, dtype=dtype)
    return model.eval()


def conversions(model: Any) -> list[Any]:
    """transformers' renamings and conversions of a model's files."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of transformers, which draws one for each block that is loaded."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
