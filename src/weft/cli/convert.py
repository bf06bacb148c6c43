"""``weft convert`` to GGUF, and what is to be said of a conversion from it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.engine.progress import Progress

if TYPE_CHECKING:
    import numpy as np


def gguf_command(
    model: str,
    output: str,
    *,
    kind: str = "q8_0",
    embeddings: str = "",
    imatrix: str = "",
    pre_tokenizer: str = "",
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a transformers folder or a GGUF file as GGUF.

    Args:
        model: what to read.
        output: the file.
        kind, embeddings, pre_tokenizer, force, progress: see :func:`weft.engine.gguf.write_gguf`.
        imatrix: a file of llama.cpp, or a folder that ``weft calibrate --statistics scales`` made.

    Returns:
        Facts for a report.
    """
    from weft.engine.gguf import write_gguf

    importance = _importance(model, imatrix) if imatrix else None
    done = write_gguf(
        model, output, kind=kind, embeddings=embeddings, importance=importance, pre_tokenizer=pre_tokenizer, force=force,
        progress=progress,
    )  # fmt: skip
    return done.to_dict()


def gguf_text(facts: Mapping[str, Any]) -> str:
    """The report in words."""
    from weft.cli.show import size

    types = ", ".join(f"{count} {name}" for name, count in sorted(facts["types"].items()))
    lines = [f"note: {note}" for note in facts["notes"]]
    lines.append(
        f"wrote {facts['output']}: {facts['tensors']} tensors ({types}), {size(facts['nbytes'])} in {facts['seconds']:.1f} s"
    )
    return "\n".join(lines)


def note_of(model: str, output: str) -> str:
    """What a folder made from a GGUF file lacks; empty for other models and outputs."""
    path = Path(model)
    if path.suffix != ".gguf" or not path.is_file() or output.endswith(".safetensors"):
        return ""
    from weft.checkpoint.gguf import open_gguf

    with closing(open_gguf(path)) as opened:
        if opened.config:
            return (
                "The tokenizer stays in the GGUF file: transformers reads it from there, "
                f'AutoTokenizer.from_pretrained(folder, gguf_file="{path.name}").'
            )
        return f"There is no config.json: {opened.no_config}. Put the model's own beside the weights."


def _importance(model: str, imatrix: str) -> dict[str, np.ndarray]:
    """The mean square of each input by GGUF's names."""
    from weft.calibrate import Statistics, imatrix_from_statistics, read_imatrix

    if not Path(imatrix).is_dir():
        return read_imatrix(imatrix).mean_squares()
    from weft.checkpoint.gguf_names import WRITTEN
    from weft.checkpoint.open import open_checkpoint

    with closing(open_checkpoint(model)) as opened:
        kind = str(opened.config.get("model_type", ""))
    return imatrix_from_statistics(Statistics.load(imatrix), WRITTEN.get(kind, kind)).mean_squares()
