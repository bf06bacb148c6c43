"""``weft study``: run a study of the checkout that weft was installed from."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from weft.errors import RecipeError, did_you_mean

FOLDER = Path(__file__).parents[3] / "studies"


def studies() -> list[str]:
    """Keys of all studies."""
    return sorted(p.stem.replace("_", "-") for p in FOLDER.glob("[!_]*.py"))


def run_study(key: str, seeds: int) -> dict[str, Any]:
    """Run one study; its verdict and table. Nothing is written.

    Raises:
        RecipeError: there is no such study, or weft was not installed from a checkout.
    """
    known = studies()
    if not known:
        raise RecipeError("Studies are part of a checkout of weft, installed with pip install -e; none was found.")
    if key not in known:
        raise RecipeError(f"There is no study {key!r}.{did_you_mean(key, known)}")
    path = FOLDER / f"{key.replace('-', '_')}.py"
    sys.path.insert(0, str(FOLDER.parent))
    spec = importlib.util.spec_from_file_location(f"studies.{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result: dict[str, Any] = module.run(seeds=seeds)
    return result
