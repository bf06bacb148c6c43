"""One registry row for one method: what it is called, what configures it, what it needs.

A method's file defines its row last, as ``METHOD``; variants with other defaults are listed in ``VARIANTS``.
The command line, the recipe schema, the documentation table and the contract tests are generated from the
rows: one file in, everything else follows.

A configuration is a frozen dataclass whose fields are made by :func:`parameter`. Fields are checked by
:func:`configure`, at the door of a recipe as well as of a Python function, with the same messages.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

from weft.errors import RecipeError, did_you_mean

GOALS = ("combine", "shrink", "adapt", "train", "edit", "measure", "predict")
ConfigT = TypeVar("ConfigT")


def parameter(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[str] | None = None,
    per_model: str = "",
    key: str = "",
) -> Any:
    """A field of a configuration.

    Args:
        default: the default value; without one the parameter is required.
        help: one line for the command line, the schema and the docs.
        minimum, maximum: inclusive bounds.
        choices: allowed strings.
        per_model: the recipe key under which each input model may give its own value (``"weight"``); the field
            then holds one number for all models or a tuple with one number a model.
        key: the recipe key where it differs from the field's name (``"lambda"`` for ``lambda_``).
    """
    metadata = {
        "help": help,
        "minimum": minimum,
        "maximum": maximum,
        "choices": tuple(choices or ()),
        "per_model": per_model,
        "key": key,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Parameter:
    """One parameter as the outside sees it, read from a configuration's field."""

    field: str
    key: str
    type: str
    default: Any
    required: bool
    help: str
    minimum: float | None
    maximum: float | None
    choices: tuple[str, ...]
    per_model: str


@dataclass(frozen=True)
class Method:
    """A row of the registry.

    Attributes:
        name: the one id, used on the command line, in Python, in recipes and in the catalogue.
        family: the package under ``weft`` that holds it.
        config: its frozen dataclass.
        summary: one line for a practitioner.
        goal: what a user wants with it, one of ``GOALS``.
        paper: key of its card in the catalogue, empty for a method that has none.
        origin: where it comes from, in a few words, when there is no card.
        needs: "nothing", "calibration", "gradients" or "a scorer".
        defaults: other defaults than the dataclass's, for variants.
        checked_by: names of the oracles that its tests hold it against; grades are computed from them.
    """

    name: str
    family: str
    config: type
    summary: str
    goal: str
    paper: str = ""
    origin: str = ""
    needs: str = "nothing"
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    checked_by: tuple[str, ...] = ()

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Parameters by recipe key."""
        return {p.key: p for p in describe(self.config, self.defaults)}

    def configure(self, values: Mapping[str, Any]) -> Any:
        """Build and check the configuration from recipe keys; see :func:`configure`."""
        by_key = self.parameters
        renamed = {}
        for key, value in {**self.defaults, **values}.items():
            if key not in by_key:
                raise RecipeError(f"{self.name} has no parameter {key!r}.{did_you_mean(key, by_key)}")
            renamed[by_key[key].field] = value
        return configure(self.config, renamed, self.name)


def describe(config: type, defaults: Mapping[str, Any] | None = None) -> list[Parameter]:
    """The parameters of a configuration class, in order."""
    hints = get_type_hints(config)
    result = []
    for field in dataclasses.fields(config):
        meta = field.metadata
        key = meta.get("key") or field.name
        default = (defaults or {}).get(key, field.default)
        required = default is dataclasses.MISSING
        result.append(
            Parameter(
                field=field.name,
                key=key,
                type=_type_name(hints[field.name]),
                default=None if required else default,
                required=required,
                help=meta.get("help", ""),
                minimum=meta.get("minimum"),
                maximum=meta.get("maximum"),
                choices=meta.get("choices", ()),
                per_model=meta.get("per_model", ""),
            )
        )
    return result


def configure(config: type[ConfigT], values: Mapping[str, Any], owner: str = "") -> ConfigT:
    """Build a configuration and check every value against its type and bounds.

    Raises:
        RecipeError: an unknown or missing parameter, a wrong type, a value out of bounds.

    >>> from weft.merge import Ties
    >>> configure(Ties, {"density": 0.5, "weights": (1.0, 2.0)}).density
    0.5
    >>> configure(Ties, {"densty": 0.5}, "ties")
    Traceback (most recent call last):
    weft.errors.RecipeError: ties has no parameter 'densty'. Did you mean density?
    """
    owner = owner or config.__name__
    rows = {p.field: p for p in describe(config)}
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name not in rows:
            raise RecipeError(f"{owner} has no parameter {name!r}.{did_you_mean(name, rows)}")
        checked[name] = _check(owner, rows[name], value)
    missing = [p.key for p in rows.values() if p.required and p.field not in checked]
    if missing:
        raise RecipeError(
            f"{owner} needs the parameter {missing[0]!r}: {rows[missing[0]].help}"
            if missing[0] in rows
            else f"{owner} needs the parameter {missing[0]!r}."
        )
    return config(**checked)


def per_model(value: float | Sequence[float], count: int, name: str = "weights") -> tuple[float, ...]:
    """One number for each of ``count`` models from one number for all or a sequence.

    >>> per_model(0.5, 2), per_model([1, 2], 2)
    ((0.5, 0.5), (1.0, 2.0))
    """
    if isinstance(value, int | float):
        return (float(value),) * count
    result = tuple(float(v) for v in value)
    if len(result) != count:
        raise RecipeError(f"{name} has {len(result)} values for {count} models; give one for each, or a single number.")
    return result


def _type_name(hint: Any) -> str:
    text = getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint)
    return str(text).replace("typing.", "").replace("collections.abc.", "")


def _check(owner: str, row: Parameter, value: Any) -> Any:
    label = f"{owner}: parameter {row.key!r}"
    if hasattr(value, "tolist"):  # numpy and torch numbers and arrays
        value = value.tolist()
    if value is None and "None" in row.type:
        return None
    if row.type == "bool":
        if not isinstance(value, bool):
            raise RecipeError(f"{label} must be true or false, got {value!r}.")
        return value
    if row.type == "str" or (row.choices and isinstance(value, str)):
        if not isinstance(value, str):
            raise RecipeError(f"{label} must be text, got {value!r}.")
        if row.choices and value not in row.choices:
            raise RecipeError(
                f"{label} must be one of {', '.join(row.choices)}, got {value!r}.{did_you_mean(value, row.choices)}"
            )
        return value
    if isinstance(value, list | tuple):
        if "tuple" not in row.type:
            raise RecipeError(f"{label} must be one number, got a list of {len(value)}.")
        if "str" in row.type and "float" not in row.type:
            if not all(isinstance(v, str) for v in value):
                raise RecipeError(f"{label} must be a list of texts, got {value!r}.")
            return tuple(value)
        return tuple(_number(label, row, v) for v in value)
    number = _number(label, row, value)
    return (number,) if row.type.startswith("tuple") else number


def _number(label: str, row: Parameter, value: Any) -> float | int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RecipeError(f"{label} must be a finite number, got {value!r}.")
    whole = row.type.removeprefix("tuple[").startswith("int") and "float" not in row.type
    if whole:
        if value != int(value):
            raise RecipeError(f"{label} must be a whole number, got {value!r}.")
        value = int(value)
    below = row.minimum is not None and value < row.minimum
    above = row.maximum is not None and value > row.maximum
    if below or above:
        low = "-∞" if row.minimum is None else f"{row.minimum:g}"
        high = "∞" if row.maximum is None else f"{row.maximum:g}"
        raise RecipeError(f"{label} must be between {low} and {high}, got {value!r}.")
    return value if whole else float(value)


Function = Callable[..., Any]
