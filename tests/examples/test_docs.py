"""The snippets of a page of docs/ run, in order, as one program; pages say what is so."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {  # how many snippets there are at least
    "adapters.md": 2, "calibrate.md": 4, "init.md": 6, "merging.md": 1, "normalize.md": 4, "quantize.md": 6, "symmetry.md": 4,
}  # fmt: skip


@pytest.mark.parametrize("page", sorted(PAGES))
def test_snippets_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers").utils.logging.disable_progress_bar()
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
    if page == "merging.md":
        assert 0 < names["report"].distance_reduction < 1


def test_the_tables_name_every_statistic() -> None:
    from weft.calibrate.collect import STATISTICS

    text = (DOCS / "calibrate.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in STATISTICS)


def test_the_page_on_norms_shows_the_committed_measurements() -> None:
    spec = importlib.util.spec_from_file_location("norms", ROOT / "benchmarks" / "norms.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.table(json.loads(module.RESULTS.read_text())) in (DOCS / "normalize.md").read_text(encoding="utf-8")


def test_the_page_on_quantising_shows_the_committed_measurements() -> None:
    spec = importlib.util.spec_from_file_location("quantized_linear", ROOT / "benchmarks" / "quantized_linear.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.table(json.loads(module.RESULTS.read_text())) in (DOCS / "quantize.md").read_text(encoding="utf-8")
