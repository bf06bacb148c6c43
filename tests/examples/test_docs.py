"""The snippets of a page of docs/ run, in order, as one program."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {"adapters.md": 2, "init.md": 6, "quantize.md": 4, "symmetry.md": 4}  # how many snippets there are at least


@pytest.mark.parametrize("page", sorted(PAGES))
def test_snippets_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(
        r"^```python\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert len(snippets) >= PAGES[page]
    names: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for snippet in snippets:
            exec(compile(snippet, page, "exec"), names)
