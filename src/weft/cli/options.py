"""Options and arguments that commands of several files take, with one text each."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Folder or Hub id of a transformers model.")]
Output = Annotated[str, typer.Option("--output", "-o", help="Folder to make, or one file if it ends in .safetensors.")]
OutputFolder = Annotated[str, typer.Option("--output", "-o", help="Folder to make.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that weft made; discard an unfinished run.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything from headers and print the plan; write nothing.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Threads = Annotated[
    int | None, typer.Option("--threads", "-j", min=1, help="Worker threads (default: cores, at most 8).")
]
Memory = Annotated[
    str, typer.Option("--memory", help="Memory budget such as 2GB (default: 512MB or a quarter of RAM).")
]
HiddenMemory = Annotated[str, typer.Option("--memory", help="For hidden states; the rest goes to files.")]
Plugin = Annotated[list[str] | None, typer.Option("--plugin", help="Python file with METHODS of your own; it is run.")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, float16 or bfloat16 (default: as the inputs).")]
ShardSize = Annotated[str, typer.Option("--shard-size", help="Largest output file.")]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Rows of the data, at most.")]
Length = Annotated[int, typer.Option("--length", min=1, help="Tokens a row, at most.")]
