"""What speaks for a method: the study of its paper's claim, and the contract battery."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from weft.cli.arguments import load_plugins
from weft.cli.options import Json, Plugin


def study(
    key: Annotated[str, typer.Argument(help="A paper's key; without one, the studies there are.")] = "",
    seeds: Annotated[int, typer.Option("--seeds", min=2, help="Repetitions.")] = 5,
) -> None:
    """Test a paper's claim on real data at a small scale (from a checkout of weft)."""
    from weft.cli.study import run_study, studies

    if not key:
        print("\n".join(studies()))
        return
    print(json.dumps(run_study(key, seeds), indent=1))


def test_method(
    name: Annotated[str, typer.Argument(help="A method's id.")],
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """Run the contract battery on a method, your own included."""
    from weft.contract import run_battery
    from weft.registry import method as find_method

    load_plugins(plugin)
    results = run_battery(find_method(name))
    failed = [r for r in results if r["outcome"] == "failed"]
    if as_json:
        print(json.dumps(results, indent=1))
    else:
        for row in results:
            print(f"{row['outcome']:8} {row['check']}{': ' + row['reason'] if row['reason'] else ''}")
        print(f"{len(results) - len(failed)} of {len(results)} checks passed")
    if failed:
        raise typer.Exit(1)
