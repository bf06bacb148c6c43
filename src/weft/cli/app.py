"""``weft``: one command for each thing that is done to weights.

What a command takes is in :mod:`weft.cli.commands`, by theme; what it does is in the other files of :mod:`weft.cli`. Help
answers at once because nothing but the standard library and typer is imported before a command runs.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import Annotated

import typer

from weft.cli.commands import adapters, calibrating, catalogue, evidence, files, merging, project, quantizing
from weft.errors import WeftError

app = typer.Typer(
    name="weft",
    help="Merge, adapt, quantise and inspect neural-network weights. A weight is a function: W = f(θ).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# name, function and example, in the order of the help
COMMANDS: list[tuple[str, Callable[..., None], str]] = [
    ("run", merging.run, "weft run recipe.yaml -o merged/ --dry-run"),
    ("merge", merging.merge, "weft merge ft0/ ft1/ --base base/ --method ties --density 0.5 -o merged/"),
    ("align", merging.align, "weft align other/ --to model/ -o aligned/"),
    ("convert", files.convert, "weft convert pytorch_model.bin -o model.safetensors, or weft convert model/ -o model.gguf -t q4_0"),
    ("bake", adapters.bake, "weft bake base/ --adapter a/ --adapter b/=0.5 --dtype bfloat16 -o model/"),
    ("inspect", files.inspect_, "weft inspect model/ --plot page.html"),
    ("diff", files.diff, "weft diff base/ tuned/ --limit 20"),
    ("extract", adapters.extract, "weft extract tuned/ --base base/ --lora-rank 32 -o adapter/"),
    ("adapt", adapters.adapt, "weft adapt model/ --method lora --rank 16 --where all-linear -o adapter/"),
    ("compare", calibrating.compare, "weft compare model/ --methods rtn,gptq --bits 4,3 --data texts.jsonl -o compare/"),
    ("calibrate", calibrating.calibrate, "weft calibrate model/ texts.jsonl -o stats/ --statistics gram,scales --samples 128"),
    ("quantize", quantizing.quantize, "weft quantize model/ --method gptq --bits 4 --group-size 128 --data texts.jsonl -o model-w4/"),
    ("eval", quantizing.evaluate, "weft eval model-w4/ texts.jsonl --against model/"),
    ("check", quantizing.check, "weft check model-w4/ --for vllm --tensor-parallel 2"),
    ("generate", quantizing.generate, 'weft generate model-w4/ "def main("'),
    ("papers", catalogue.papers, 'weft papers "fine-tunes interfere"'),
    ("methods", catalogue.methods, "weft methods combine"),
    ("schema", catalogue.schema, "weft schema > recipe.schema.json"),
    ("init", project.init, "weft init merge > recipe.yaml"),
    ("doctor", project.doctor, "weft doctor --json"),
    ("study", evidence.study, "weft study ghost-batch-norm --seeds 5"),
    ("test-method", evidence.test_method, "weft test-method my_merge --plugin my_merge.py"),
]  # fmt: skip
# of these, options that are parameters of the chosen method arrive among the models, in order
_WITH_METHOD_OPTIONS = ("merge", "adapt", "quantize")

for _name, _function, _example in COMMANDS:
    _settings = {"ignore_unknown_options": True} if _name in _WITH_METHOD_OPTIONS else None
    app.command(_name, epilog=f"Example: {_example}", context_settings=_settings)(_function)


def main() -> None:
    """Entry point: errors that weft raises on purpose are printed, not traced."""
    warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
    try:
        code = app(standalone_mode=False)  # typer returns the code of an Exit, and makes one of an interruption
        if code == 130:
            raise KeyboardInterrupt
        if isinstance(code, int) and code:
            sys.exit(code)
    except WeftError as error:
        _fail(error)
    except (typer.Abort, KeyboardInterrupt):
        print("\nstopped; the same command continues where it was", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "show"):  # a usage error of the option parser
            error.show()
            sys.exit(error.exit_code)
        raise


def _fail(error: WeftError) -> None:
    message = as_typed(str(error))
    if "--json" in sys.argv:
        print(json.dumps({"error": type(error).__name__, "message": message}))
    print(f"error: {message}", file=sys.stderr)
    sys.exit(error.exit_code)


def as_typed(message: str) -> str:
    """A message that names arguments of Python's functions, with the options that one types instead.

    >>> as_typed('replace it with force=True, or choose missing="skip"')
    'replace it with --force, or choose --missing skip'
    """
    message = message.replace("check_base=False", "--no-check-base").replace("max_change", "--max-change")
    message = re.sub(r'\b(missing|mismatch)="(\w+)"', r"--\1 \2", message).replace("base=…", "--base")
    message = message.replace("skip_errors=True", "--on-error skip")
    return re.sub(r"\b(force|allow_non_finite)=True", lambda found: "--" + found[1].replace("_", "-"), message)


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from weft import __version__

        print(f"weft {__version__}")
        raise typer.Exit()


if __name__ == "__main__":
    main()
