"""What a run's report and its recipe say of the configurations that changed a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any


def describe(config: Any) -> dict[str, Any]:
    """A configuration, or one for each selector, as JSON values.

    Args:
        config: a :class:`weft.calibrate.Change`, or a mapping from selectors to these.

    Returns:
        The class under ``config`` beside its fields; a dictionary of these for a mapping.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Rounded:
    ...     bits: int
    >>> describe({"*.q_proj": Rounded(bits=8)})
    {'*.q_proj': {'config': 'Rounded', 'bits': 8}}
    """
    if isinstance(config, Mapping):
        return {key if isinstance(key, str) else repr(key): describe(one) for key, one in config.items()}
    values = asdict(config) if is_dataclass(config) and not isinstance(config, type) else {}
    return {"config": type(config).__name__, **values}
