"""``weft run``, ``merge`` and ``convert``: a recipe is planned, carried out and reported."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from typing import Any

from weft.cli.arguments import progress_shown
from weft.cli.show import plan_facts, plan_text, result_text
from weft.engine.run import Options, execute
from weft.recipe.opened import Opened
from weft.recipe.run import make_plan
from weft.recipe.size import parse_size


def run_options(force: bool, threads: int | None, memory: str) -> Options:
    """Options of the engine, its own defaults where nothing was typed."""
    options = Options(force=force)
    if threads:
        options.threads = threads
    if memory:
        options.memory = parse_size(memory)
    return options


def execute_recipe(
    recipe: str | dict[str, Any],
    output: str,
    *,
    dry_run: bool,
    force: bool,
    threads: int | None,
    memory: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Carry out a recipe, or its file, and print what was planned or done."""
    options = run_options(force, threads, memory)
    opened = Opened()
    with closing(opened), progress_shown(quiet or dry_run) as progress:
        options.progress = progress
        plan = make_plan(recipe, opened, output, options=options, dry_run=dry_run)
        if dry_run:
            facts = plan_facts(plan, options)
            print(json.dumps(facts, indent=1) if as_json else plan_text(facts))
            return
        for note in plan.notes:
            print(f"note: {note}", file=sys.stderr)
        result = execute(plan, output, options)
    facts = {
        "output": output,
        "tensors": result.tensors,
        "resumed": result.resumed,
        "bytes": result.nbytes,
        "seconds": round(result.seconds, 2),
        "notes": result.notes,
    }
    print(json.dumps(facts) if as_json else result_text(facts))
