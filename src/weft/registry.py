"""All methods that weft knows: every module of a family that defines ``METHODS``, and plugins.

``methods()`` imports the families. ``index()`` reads a committed summary instead, so that ``--help``, ``methods``,
``papers`` and ``schema`` answer at once; a test keeps the summary fresh (``python -m weft.registry`` rewrites it).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import pkgutil
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from weft.errors import RecipeError, did_you_mean
from weft.method import Method

FAMILIES = ("merge", "edit", "adapt", "init", "normalize", "quantize", "prune")
ENTRY_POINT = "weft.methods"
INDEX = Path(__file__).with_name("methods.json")
DOCS = Path(__file__).parents[2] / "docs" / "methods.md"
_plugins: dict[str, Method] = {}


@cache
def _family(family: str) -> dict[str, Method]:
    found: dict[str, Method] = {}
    package = importlib.import_module(f"weft.{family}")
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
        for row in getattr(importlib.import_module(f"weft.{family}.{module}"), "METHODS", ()):
            if row.name in found:
                raise RuntimeError(f"two methods are called {row.name!r}")
            found[row.name] = row
    return found


def _built_in() -> dict[str, Method]:
    return {name: row for family in FAMILIES for name, row in _family(family).items()}


def methods() -> dict[str, Method]:
    """All methods by name, built-in ones first, then those of installed packages and of ``--plugin`` files."""
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT):
        if entry.name not in _plugins:
            add(entry.load(), f"entry point {entry.name}")
    return {**_built_in(), **_plugins}


def method(name: str) -> Method:
    """The method called ``name``; imports its family only, so that a merge does not wait for torch.

    Raises:
        RecipeError: there is none; the message names the nearest.

    >>> method("ties").goal
    'combine'
    """
    family = next((row["family"] for row in index() if row["name"] == name), None)
    found = _family(family).get(name) if family else _plugins.get(name)
    if found is None:
        known = methods()
        if name not in known:
            raise RecipeError(f"There is no method {name!r}.{did_you_mean(name, known)} `weft methods` lists them all.")
        found = known[name]
    return found


def load_plugin(path: str | Path) -> list[Method]:
    """Register the ``METHODS`` of a Python file; the file's code is run, so it must be one you trust."""
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"{path}: no such plugin file.")
    spec = importlib.util.spec_from_file_location(f"weft_plugin_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return add(getattr(module, "METHODS", ()), str(path))


def add(rows: Any, where: str = "plugin") -> list[Method]:
    """Register rows from outside; raises ``RecipeError`` if a name is taken."""
    rows = [rows] if isinstance(rows, Method) else list(rows)
    if not rows or not all(isinstance(r, Method) for r in rows):
        raise RecipeError(f"{where}: a plugin defines METHODS, a sequence of weft.method.Method rows; found none.")
    for row in rows:
        if any(row.name == known["name"] for known in index()):
            raise RecipeError(f"{where}: the name {row.name!r} belongs to a method of weft; choose another.")
        _plugins[row.name] = row
    return rows


def summary() -> list[dict[str, Any]]:
    """What the committed index holds: one entry a method, without its code."""
    rows = []
    for row in _built_in().values():
        parameters = [{k: v for k, v in asdict(p).items() if v not in (None, "", ())} for p in row.parameters.values()]
        entry = {
            "name": row.name,
            "family": row.family,
            "goal": row.goal,
            "summary": row.summary,
            "paper": row.paper,
            "origin": row.origin,
            "needs": row.needs,
            "checked_by": list(row.checked_by),
            "differs": getattr(row, "differs", ""),
            "base": getattr(row, "base", ""),
            "parameters": parameters,
            **_how_to_run(row),
        }
        rows.append({k: v for k, v in entry.items() if v not in ("", []) or k == "parameters"})
    return rows


def _how_to_run(row: Method) -> dict[str, str]:
    """The Python call that runs a method, and the shell line where there is one."""
    fields = {p.key: p.field for p in row.parameters.values()}
    changed = {fields.get(key, key): value for key, value in row.defaults.items()}
    function = getattr(row, "function", None)
    layer = getattr(row, "layer", None)
    if layer is not None:
        required = [n for n, p in inspect.signature(layer).parameters.items() if p.default is p.empty]
        place = "torch.nn" if layer.__module__.startswith("torch.nn") else f"weft.{row.family}"
        given = [*required, *(f"{name}={value!r}" for name, value in changed.items())]
        return {"call": f"{place}.{layer.__name__}({', '.join(given)})"}
    if function is None:
        needs = [p.field for p in row.parameters.values() if p.required and p.field not in changed]
        values = ", ".join([*(f"{k}=…" for k in needs), *(f"{k}={v!r}" for k, v in changed.items())])
        built = f"weft.{row.family}.{row.config.__name__}({values})"
        if hasattr(row, "optimizer"):
            return {"call": f"{built}.build(model)"}
        if getattr(row, "adapter", False):
            flags = "".join(f" --{p.key.replace('_', '-')} …" for p in row.parameters.values() if p.required)
            return {
                "call": f"weft.adapt_(model, {built})",
                "shell": f"weft adapt MODEL --method {row.name}{flags} -o OUT",
            }
        if row.family == "quantize":
            return {
                "call": f"weft.quantize_(model, {built})",
                "shell": f"weft quantize MODEL --method {row.name} -o OUT",
            }
        if row.family == "prune":
            return {"call": f"weft.prune_(model, {built})"}
        return {"call": f"weft.parametrize_(model, {built})" if hasattr(row.config, "build") else built}
    if hasattr(row, "fills"):
        needed = [n for n, p in inspect.signature(function).parameters.items() if p.default is p.empty]
        return {"call": f"weft.{row.family}.{function.__name__}({', '.join(needed)})"}
    given = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in changed:
            given.append(f"{name}={changed[name]!r}")
        elif parameter.default is parameter.empty:
            given.append(name)
        elif name in fields.values():
            given.append(f"{name}={parameter.default!r}")
    call = f"weft.{row.family}.{function.__name__}({', '.join(given)})"
    if hasattr(row, "on_folders"):
        return {"call": call, **({"shell": "weft align OTHER --to MODEL -o OUT"} if row.on_folders else {})}
    low, high = getattr(row, "models", (0, 0))
    models = " ".join("ABCD"[: max(low, min(2, high or 2))])
    base = " --base BASE" if getattr(row, "base", "") == "required" else ""
    return {"call": call, "shell": f"weft merge {models}{base} --method {row.name} -o OUT"}


def index() -> list[dict[str, Any]]:
    """The committed summary of all built-in methods; imports no family."""
    return _index()


@cache
def _index() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(INDEX.read_text(encoding="utf-8"))
    return rows


def write_index() -> None:
    """Rewrite the committed summary, and docs/methods.md in a checkout."""
    INDEX.write_text(json.dumps(summary(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _index.cache_clear()
    if DOCS.parent.is_dir():
        DOCS.write_text(methods_page(index()), encoding="utf-8")


def methods_page(rows: list[dict[str, Any]]) -> str:
    """All methods and their parameters, as markdown."""
    lines = [
        "# Methods",
        "",
        "Written by `make docs` from the registry. `weft methods NAME` shows one of them with all its parameters.",
        "",
        "| id | family | what it does | parameters | from |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: (r["family"], r["name"].removeprefix("mergekit/"), r["name"])):
        parameters = ", ".join(
            f"`{p['key']}` {'required' if p['required'] else p.get('default')}" for p in row["parameters"]
        )
        said = row["summary"] + (f" Differs from weft's own row: {row['differs']}." if "differs" in row else "")
        source = " · ".join(v for v in (row.get("paper", ""), row.get("origin", "")) if v)
        cells = (f"`{row['name']}`", row["family"], said, parameters, source)
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    write_index()
