"""Real data on every machine: the functions of Python's standard library, and the package each of them is from."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

import numpy as np

# who fine-tunes on what; no team sees another team's packages
TEAMS = {
    "team-a": ("asyncio", "email", "http"),
    "team-b": ("importlib", "logging", "unittest"),
    "team-c": ("multiprocessing", "xml", "_pydecimal"),
}
PACKAGES = tuple(package for packages in TEAMS.values() for package in packages)
SHORTEST = 80  # characters; below that a function says little about where it is from


def functions(package: str) -> list[str]:
    """The source text of every function of a package, each text once."""
    library = Path(sysconfig.get_path("stdlib"))
    folder = library / package
    found = set()
    for file in sorted(folder.rglob("*.py")) if folder.is_dir() else [library / f"{package}.py"]:
        if {"test", "tests"} & set(file.relative_to(library).parts):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(" ".join(ast.unparse(node).split()))
    return sorted(text for text in found if len(text) >= SHORTEST)


def corpus(per_package: int) -> tuple[list[str], np.ndarray]:
    """Texts, and the number of each text's package."""
    texts, labels = [], []
    for number, package in enumerate(PACKAGES):
        available = functions(package)
        chosen = np.random.default_rng(number).permutation(len(available))[:per_package]
        texts += [available[i] for i in chosen]
        labels += [number] * len(chosen)
    return texts, np.array(labels)


def split(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions of the texts to train on (65%), to choose settings with (12%), and to report (23%)."""
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    random = np.random.default_rng(seed)
    for package in np.unique(labels):
        own = random.permutation(np.flatnonzero(labels == package)).tolist()
        first, second = round(0.65 * len(own)), round(0.77 * len(own))
        for part, positions in zip(parts, (own[:first], own[first:second], own[second:])):
            part += positions
    return np.array(parts[0]), np.array(parts[1]), np.array(parts[2])
