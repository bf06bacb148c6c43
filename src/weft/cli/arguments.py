"""From what was typed to what the library takes: options of methods, numbers, plugins, and progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from weft.errors import RecipeError, did_you_mean

T = TypeVar("T", int, float)


def load_plugins(paths: list[str] | None) -> None:
    """Run files with methods of the user's own."""
    if paths:
        from weft.registry import load_plugin

        for path in paths:
            load_plugin(path)


@contextmanager
def progress_shown(quiet: bool) -> Iterator[Any]:
    """A :class:`weft.engine.progress.Progress` that ends with the block; silent if ``quiet``."""
    from weft.engine.progress import default_progress

    progress = default_progress(quiet)
    try:
        yield progress
    finally:
        progress.finish()


def method_options(arguments: list[str], method: str, command: Any) -> tuple[dict[str, Any], list[str]]:
    """``--density 0.5 --normalize false`` as parameters; what is no option is one more model.

    ``command`` is the function of the command, whose own options are told where one of them is nearest.

    Raises:
        RecipeError: the method has no such option, or its value is missing.

    >>> method_options(["one/", "--density", "0.5", "two/", "--no-normalize"], "ties", None)
    ({'density': 0.5, 'normalize': False}, ['one/', 'two/'])
    """
    from weft.registry import method as find_method

    row = find_method(method)
    values: dict[str, Any] = {}
    models: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            models.append(argument)
            continue
        key, equals, text = argument[2:].partition("=")
        key = key.replace("-", "_")
        known = row.parameters
        if key not in known and key.removeprefix("no_") in known and not equals:
            values[key.removeprefix("no_")] = False
            continue
        if key not in known:
            near = _near_option(key, list(known), command)
            raise RecipeError(f"{method} has no option --{key.replace('_', '-')}.{near}")
        if not equals:
            if known[key].type == "bool" and (not rest or rest[0].lower() not in ("true", "false")):
                values[key] = True
                continue
            if not rest:
                raise RecipeError(f"--{key.replace('_', '-')} needs a value.")
            text = rest.pop(0)
        values[key] = value_of(text)
    return values, models


def _near_option(key: str, known: list[str], command: Any) -> str:
    """The nearest of a method's options and of the command's own; if none is near, the method's."""
    from inspect import get_annotations

    said = get_annotations(command, eval_str=True).values()
    marks = [o for one in said for o in getattr(one, "__metadata__", ())]
    own = [n for o in marks for n in (o.default, *(o.param_decls or ())) if isinstance(n, str) and n[:2] == "--"]
    near = did_you_mean("--" + key.replace("_", "-"), [*("--" + k.replace("_", "-") for k in known), *own])
    if near.startswith(" Did"):
        return near
    return f"{did_you_mean(key, known)} `weft {command.__name__} --help` lists the command's own."


def value_of(text: str) -> Any:
    """A number, true or false, a list of numbers, or text.

    >>> value_of("0.5"), value_of("True"), value_of("1,2"), value_of("a,b")
    (0.5, True, [1.0, 2.0], 'a,b')
    """
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return [float(p) for p in text.split(",")] if "," in text else float(text)
    except ValueError:
        return text


def list_of(kind: type[T], text: str, option: str, what: str, example: str) -> list[T]:
    """Values with commas between them.

    Args:
        kind: int or float.
        text: what was typed.
        option, what, example: for the error: where it was typed, what it should be, and how that looks.

    Raises:
        RecipeError: a part is of another kind.

    >>> list_of(int, "3,4", "--bits-from", "whole numbers", "3,4,8")
    [3, 4]
    """
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"{option}: {text!r} is no list of {what}; write them like {example}.") from None
