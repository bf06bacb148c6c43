"""Greedy soups over checkpoints: candidates are written, scored by the user's command, and thrown away."""

from __future__ import annotations

import math
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from weft.engine.run import Options, execute
from weft.errors import RecipeError
from weft.merge.soups import Selection, select_greedily
from weft.recipe.opened import Opened
from weft.recipe.planner import plan_recipe
from weft.recipe.schema import Recipe, Step

_TAIL = 400  # characters of a failed command's output that are shown


def choose_members(
    recipe: Recipe,
    opened: Opened,
    output: Path,
    options: Options,
    score: Callable[[Path], float] | None,
    dry_run: bool,
) -> tuple[Recipe, list[str]]:
    """The recipe with every greedy soup reduced to its members, and a note for each.

    Raises:
        RecipeError: no scorer, or a scorer that fails or prints no number.
    """
    notes: list[str] = []
    steps: list[Step] = []
    for number, step in enumerate(recipe.steps):
        if step.method != "greedy_soup":
            steps.append(step)
            continue
        if not step.score and score is None:
            raise RecipeError(
                "greedy_soup needs a scorer: a command in the step's field score (--score), in which {} stands for the "
                "candidate's folder and whose last line is the score, or score= in Python."
            )
        if not step.models:
            raise RecipeError("greedy_soup takes whole models, not slices or modules.")
        if dry_run:
            notes.append("greedy_soup: members are chosen by score when the recipe runs; this plan shows all of them.")
            steps.append(step)
            continue
        scorer = score or partial(run_scorer, step.score)
        before = recipe.model_copy(update={"steps": [*steps, step]})
        chosen = _select(before, number, opened, output, options, scorer)
        kept = [s for s in step.models if s.model in chosen.members]
        steps.append(step.model_copy(update={"models": kept}))
        names = ", ".join(opened.get(m).name for m in chosen.members)
        best = max(v for v in chosen.order_scores.values() if not math.isnan(v))
        notes.append(
            f"greedy_soup kept {len(kept)} of {len(step.models)} models: {names}; "
            f"score {chosen.score:g}, best single model {best:g}."
        )
    return recipe.model_copy(update={"steps": steps}), notes


def _select(
    recipe: Recipe,
    number: int,
    opened: Opened,
    output: Path,
    options: Options,
    scorer: Callable[[Path], float],
) -> Selection[str]:
    step = recipe.steps[number]
    parent = output.expanduser().absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{output.name}.candidates-", dir=parent))
    quiet = Options(threads=options.threads, memory=options.memory)

    def score_of(members: Sequence[str]) -> float:
        models = [s for s in step.models if s.model in members]
        steps = [*recipe.steps[:number], step.model_copy(update={"models": models})]
        candidate = folder / "candidate"
        execute(plan_recipe(recipe.model_copy(update={"steps": steps}), opened), candidate, quiet)
        try:
            return scorer(candidate)
        finally:
            shutil.rmtree(candidate, ignore_errors=True)

    try:
        accept_equal = bool(step.parameters.get("accept_equal", False))
        return select_greedily([s.model for s in step.models], score_of, accept_equal=accept_equal)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_scorer(command: str, folder: Path) -> float:
    """The number in the last line that a shell command prints; ``{}`` in it becomes the folder's path.

    >>> run_scorer("echo loss was low; echo 0.75", Path("."))
    0.75
    """
    filled = command.replace("{}", shlex.quote(str(folder)))
    done = subprocess.run(filled, shell=True, capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip()[-_TAIL:]
    if done.returncode:
        raise RecipeError(f"The scorer failed with exit status {done.returncode}: {filled}\n{said}")
    lines = done.stdout.strip().splitlines()
    try:
        return float(lines[-1])
    except (IndexError, ValueError):
        raise RecipeError(
            f"The scorer's last line must be a number: {filled}\n{said or '(it printed nothing)'}"
        ) from None
