"""Rules of the house: what may import what, and what every file keeps."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "weft"
FLOORS = [
    {"errors", "method"},
    {"papers", "checkpoint", "kernels", "function", "packed"},
    {"symmetry", "calibrate", "engine"},
    {
        "init", "normalize", "adapt", "merge", "quantize", "prune", "share", "grow", "edit",
        "weigh", "robust", "optim", "federate", "continual", "data", "predict", "measure",
    },
    {"registry", "recipe", "view"},
    {"contract"},
    {"cli"},
]  # fmt: skip
FAMILIES = FLOORS[3]
# Reaching up, each with its reason.
ALLOWED = {
    ("papers", "registry"): "status is computed from the committed method index",
    ("method", "merge"): "an example in a docstring",
    ("checkpoint", "adapt"): "a folder of weft's own holds functions, which that family turns into factors",
    ("adapt", "registry"): "a folder names methods by their ids, which are looked up when it is written or read",
}
FILES = sorted(SOURCE.rglob("*.py"))


def part_of(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


def floor_of(part: str) -> int:
    return next((i for i, parts in enumerate(FLOORS) if part in parts), -1)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            if node.module == "weft":
                found.update(f"weft.{a.name}" for a in node.names)
        elif isinstance(node, ast.Import):
            found.update(a.name for a in node.names)
    return {m for m in found if m.split(".")[0] == "weft"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    assert floor_of(own) >= 0, f"{own} has no floor; add it to FLOORS"
    for module in imports(path):
        other = part_of(module)
        if not other or other == own or other.startswith("_") or (own, other) in ALLOWED:
            continue
        assert floor_of(other) >= 0, f"{module} has no floor"
        assert floor_of(other) <= floor_of(own), f"{path.name} imports {module}, which stands above it"
        assert not (own in FAMILIES and other in FAMILIES), f"family {own} imports family {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_modules_say_what_they_are(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path} has no module docstring"
    for node in tree.body:
        public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if public and not is_kernel(node):
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"
            if isinstance(node, ast.FunctionDef):
                bare = [a.arg for a in [*node.args.args, *node.args.kwonlyargs] if a.annotation is None]
                assert not bare, f"{path.name}: {node.name} leaves {bare} without a type"
                assert node.returns is not None, f"{path.name}: {node.name} has no return type"


def is_kernel(node: ast.AST) -> bool:
    decorators = getattr(node, "decorator_list", [])
    return any(isinstance(d, ast.Name) and d.id in ("kernel", "reduction", "fused", "inline") for d in decorators)


def test_the_project_speaks_of_itself_only() -> None:
    forbidden = re.compile(
        r"\.\./shared|/work/|/root/|/tmp/bm|pypi-more|helper-\d|\bissue \d+ of this\b", re.IGNORECASE
    )
    for path in [
        p for d in ("src", "docs", "examples", "benchmarks", "studies", "tests") for p in (ROOT / d).rglob("*")
    ]:
        if (
            path == Path(__file__)
            or path.suffix not in (".py", ".md", ".toml", ".yaml", ".json", ".html")
            or "out" in path.parts
        ):
            continue
        found = forbidden.search(path.read_text(encoding="utf-8", errors="replace"))
        assert not found, f"{path.relative_to(ROOT)} mentions {found.group(0)!r}"


def test_importing_weft_is_light() -> None:
    import subprocess
    import sys

    code = "import sys, weft; print([m for m in ('torch', 'numpy', 'numba', 'pydantic', 'weft.merge') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_a_merge_does_not_load_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys, numpy as np, weft\n"
        "s = {'w': np.ones((4, 4), np.float32)}\n"
        "weft.run({'steps': [{'method': 'linear', 'models': ['a', 'b']}]}, sys.argv[1], models={'a': s, 'b': s})\n"
        "print([m for m in ('torch', 'transformers', 'sklearn') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


def test_the_method_index_is_fresh() -> None:
    import json

    from weft.registry import DOCS, index, methods_page, summary

    assert index() == json.loads(json.dumps(summary())), "run `make docs`"
    assert DOCS.read_text() == methods_page(index()), "run `make docs`"


def test_the_readme_shows_the_committed_measurements() -> None:
    import importlib.util
    import json

    script = ROOT / "benchmarks" / "merge_vs_mergekit.py"
    spec = importlib.util.spec_from_file_location("merge_vs_mergekit", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.table(json.loads(module.RESULTS.read_text())) in (ROOT / "README.md").read_text()
