"""What there is: papers, methods, and the schema of recipes."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from weft.cli.options import Json
from weft.errors import RecipeError, did_you_mean


def papers(
    query: Annotated[list[str] | None, typer.Argument(help="Words for your problem, or a paper's key.")] = None,
    have: Annotated[str | None, typer.Option("--have", help="What you have: 'one trained model' …")] = None,
    want: Annotated[
        str | None, typer.Option("--want", help="combine, shrink, adapt, train, edit, measure, predict.")
    ] = None,
    family: Annotated[str | None, typer.Option("--family", help="merge, quantize, prune …")] = None,
    grade: Annotated[str | None, typer.Option("--grade", help="planned, lab, checked or core.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Rows to show.")] = 10,
    as_json: Json = False,
) -> None:
    """Find the paper for a problem, and how to run its method here."""
    from weft.papers import papers_command

    asked = bool(query or have or want or family or grade)
    print(papers_command(" ".join(query or ()), have, want, family, grade, limit if asked else None, as_json))


def methods(
    name: Annotated[str, typer.Argument(help="A goal (combine, shrink …) or a method's id, for its parameters.")] = "",
    as_json: Json = False,
) -> None:
    """List methods by goal, or show one method's parameters."""
    from weft.cli.show import method_text
    from weft.papers import methods_command
    from weft.registry import index

    rows = {r["name"]: r for r in index()}
    if name in rows:
        print(json.dumps(rows[name], indent=1) if as_json else method_text(rows[name]))
        return
    from weft.method import GOALS

    if name and name not in GOALS:
        raise RecipeError(f"{name!r} is neither a goal nor a method.{did_you_mean(name, [*GOALS, *rows])}")
    print(methods_command(name or None, as_json))


def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from weft.recipe.json_schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=1))
