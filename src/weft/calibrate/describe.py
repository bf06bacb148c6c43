"""What a run's report and its recipe say of the configurations that changed a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any


def describe(config: Any) -> dict[str, Any]:
    """A configuration, or one for each selector, as JSON values.

    Args:
        config: a :class:`weft.calibrate.Change`, or a mapping from selectors to these.

    Returns:
        The class under ``config`` beside its fields; the same of configurations within; a dictionary of these for a mapping.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Rounded:
    ...     bits: int
    >>> describe({"*.q_proj": Rounded(bits=8)})
    {'*.q_proj': {'config': 'Rounded', 'bits': 8}}
    """
    if isinstance(config, Mapping):
        return {key if isinstance(key, str) else repr(key): describe(one) for key, one in config.items()}
    if not is_dataclass(config) or isinstance(config, type):
        return {"config": type(config).__name__}
    within = {f.name: describe(v) for f in fields(config) if is_dataclass(v := getattr(config, f.name))}
    return {"config": type(config).__name__, **asdict(config), **within}
