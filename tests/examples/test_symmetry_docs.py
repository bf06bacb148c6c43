"""The snippets of docs/symmetry.md run, in order, as one program."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "symmetry.md"


def test_snippets_run() -> None:
    pytest.importorskip("transformers")
    snippets = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(snippets) >= 4
    names: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for snippet in snippets:
            exec(compile(snippet, str(PAGE), "exec"), names)
    assert [g.kind for g in names["symmetry"].groups] == ["intermediate"]
