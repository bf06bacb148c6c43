"""The snippets of docs/normalize.md run, in order, as one program, and its table is the committed measurement."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "normalize.md"


def test_snippets_run() -> None:
    pytest.importorskip("transformers")
    snippets = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(snippets) == 4
    names: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for snippet in snippets:
            exec(compile(snippet, str(PAGE), "exec"), names)


def test_the_page_shows_the_committed_measurements() -> None:
    spec = importlib.util.spec_from_file_location("norms", ROOT / "benchmarks" / "norms.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.table(json.loads(module.RESULTS.read_text())) in PAGE.read_text(encoding="utf-8")
