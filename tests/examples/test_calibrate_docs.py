"""The snippets of docs/calibrate.md run, in order, as one program."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "calibrate.md"


def test_snippets_run() -> None:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    snippets = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(snippets) == 4
    names: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for snippet in snippets:
            exec(compile(snippet, str(PAGE), "exec"), names)


def test_the_tables_name_every_statistic() -> None:
    from weft.calibrate.collect import STATISTICS

    text = PAGE.read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in STATISTICS)
