"""The model card of an output: the hub's metadata, what was done, and from what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from weft.checkpoint.checkpoint import Checkpoint
from weft.recipe.schema import Recipe


def model_card(
    recipe: Recipe, written: Mapping[str, Any], inputs: Sequence[Checkpoint], config: Mapping[str, Any]
) -> str:
    """Text of README.md: metadata as the hub reads it, methods, inputs with their licences, the recipe."""
    licences = {c.name: _licence(c.folder) for c in inputs}
    known = sorted({v for v in licences.values() if v})
    metadata: dict[str, Any] = {"base_model": [c.name for c in inputs], "tags": ["merge", "weft"]}
    if config:
        metadata["library_name"] = "transformers"
    if len(known) == 1 and all(licences.values()):
        metadata["license"] = known[0]
    elif known:
        metadata["license"] = "other"
    rows = [f"| {c.name} | {c.parameters:,} | {licences[c.name] or 'not stated'} |" for c in inputs]
    methods = ", ".join(dict.fromkeys(s.method for s in recipe.steps))
    recipe_text = yaml.safe_dump(dict(written), sort_keys=False, allow_unicode=True)
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        "# Merged model",
        "",
        f"Made with [weft](https://pypi.org/project/weft/) by: {methods}.",
        "",
        "| input | parameters | licence |",
        "|---|---|---|",
        *rows,
        "",
        "The licences of all inputs apply to the result.",
        "",
        "```yaml",
        recipe_text.strip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _licence(folder: Path | None) -> str:
    """The licence that a model's own card states."""
    card = folder / "README.md" if folder else None
    if card is None or not card.is_file():
        return ""
    text = card.read_text(encoding="utf-8", errors="replace")[:20_000]
    if not text.startswith("---"):
        return ""
    try:
        metadata = yaml.safe_load(text.split("---", 2)[1])
    except (yaml.YAMLError, IndexError):
        return ""
    licence = metadata.get("license") if isinstance(metadata, dict) else None
    return licence if isinstance(licence, str) else ""
