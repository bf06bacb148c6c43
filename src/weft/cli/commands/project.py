"""To begin with: a recipe to start from, and whether the installation is sound."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from weft.cli.options import Json


def init(kind: Annotated[str, typer.Argument(help="merge, slices, chain, soup or mergekit.")] = "merge") -> None:
    """Print a recipe to start from."""
    from weft.cli.show import template

    print(template(kind), end="")


def doctor(as_json: Json = False) -> None:
    """Check the installation: versions, cores, memory, compiled kernels, optional packages."""
    from weft.cli.doctor import examine, text

    findings = examine()
    print(json.dumps(findings, indent=1) if as_json else text(findings))
    if not findings["ok"]:
        raise typer.Exit(1)
