"""Methods from outside: entry points and plugins."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest

from weft import registry
from weft.errors import RecipeError

PLUGIN = """
from dataclasses import dataclass
from weft.engine.merging import MergeMethod

@dataclass(frozen=True)
class First:
    pass

def _combine(chunk, config, state, out):
    out[:] = chunk.tensors[0]

METHODS = (MergeMethod(name={name!r}, family="merge", config=First, summary="The first.", goal="combine", origin="a test",
                       combine=_combine),)
"""


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_plugins", {})


def test_plugin_file(tmp_path: Path) -> None:
    (tmp_path / "first.py").write_text(PLUGIN.format(name="first_only"))
    assert [m.name for m in registry.load_plugin(tmp_path / "first.py")] == ["first_only"]
    assert registry.method("first_only").family == "merge"


def test_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        name = "their_first"

        def load(self) -> Any:
            space: dict[str, Any] = {"__name__": "theirs"}
            exec(PLUGIN.format(name="their_first"), space)
            return space["METHODS"]

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [Entry()] if group == "weft.methods" else [])
    assert registry.method("their_first").summary == "The first."


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (PLUGIN.format(name="ties"), "belongs to a method of weft"),
        ("METHODS = ()", "found none"),
        ("x = 1", "found none"),
    ],
)
def test_plugins_that_are_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "p.py").write_text(text)
    with pytest.raises(RecipeError, match=words):
        registry.load_plugin(tmp_path / "p.py")


def test_unknown_names_are_answered() -> None:
    with pytest.raises(RecipeError, match="Did you mean ties"):
        registry.method("tiess")
    with pytest.raises(RecipeError, match="no such plugin"):
        registry.load_plugin("nowhere.py")
