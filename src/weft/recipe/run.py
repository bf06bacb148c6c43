"""``weft.run``: from a recipe to files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from weft.engine.plan import Plan, default_memory
from weft.engine.run import Options, Result, execute
from weft.recipe.opened import Opened
from weft.recipe.planner import plan_recipe
from weft.recipe.read import read_recipe
from weft.recipe.size import parse_size
from weft.recipe.soup import choose_members


def run(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    output: str | os.PathLike[str],
    *,
    models: Mapping[str, Any] | None = None,
    threads: int | None = None,
    memory: int | str | None = None,
    force: bool = False,
    score: Callable[[Path], float] | None = None,
    options: Options | None = None,
) -> Result:
    """Carry out a recipe.

    Args:
        recipe: a path to a YAML or JSON recipe (weft's or mergekit's), or the recipe as data.
        output: a folder to make, or one file if it ends in ``.safetensors``.
        models: state dicts or opened checkpoints for names that the recipe uses.
        threads: worker threads; default: the cores, at most 8.
        memory: budget of resident memory, in bytes or as ``"2GB"``.
        force: replace an output that weft made.
        score: for ``greedy_soup``: score of a candidate's folder, higher is better; instead of the step's command.
        options: all of the above and more, instead of them.

    Returns:
        What was done: output path, number of tensors, seconds.

    Raises:
        RecipeError, CheckpointError, OutputError: nothing is left half-written.

    >>> import numpy as np, tempfile, weft
    >>> a, b = {"w": np.zeros(2, np.float32)}, {"w": np.ones(2, np.float32)}
    >>> folder = tempfile.mkdtemp()
    >>> recipe = {"steps": [{"method": "linear", "models": ["a", "b"]}]}
    >>> result = weft.run(recipe, output=f"{folder}/merged", models={"a": a, "b": b})
    >>> with weft.open(f"{folder}/merged") as merged:
    ...     merged["w"].numpy()
    array([0.5, 0.5], dtype=float32)
    """
    if options is None:
        options = Options(force=force)
        if threads is not None:
            options.threads = threads
        options.memory = parse_size(memory) if memory is not None else default_memory()
    opened = Opened(given=models or {})
    with closing(opened):
        return execute(make_plan(recipe, opened, output, options=options, score=score), output, options)


def make_plan(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    opened: Opened,
    output: str | os.PathLike[str],
    *,
    options: Options | None = None,
    score: Callable[[Path], float] | None = None,
    dry_run: bool = False,
) -> Plan:
    """The plan of a recipe; ``opened`` must stay open while it is carried out.

    Headers alone decide it, except for a greedy soup, whose candidates are written and scored (not in a dry run).
    """
    found, written = read_recipe(recipe if isinstance(recipe, Mapping) else Path(recipe))
    found, notes = choose_members(found, opened, Path(output), options or Options(), score, dry_run)
    name = Path(output).name
    plan = plan_recipe(found, opened, single_file=name if name.endswith(".safetensors") else "", source=written)
    plan.notes.extend(notes)
    return plan
