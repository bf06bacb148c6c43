"""Rules of the house: what may import what, and what every file keeps."""

import ast
import importlib
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


TEXTS = (".py", ".md", ".toml", ".yaml", ".json", ".html", ".svg", ".txt")
# What means nothing on another machine: a path under a folder of users, mounts or scratch space, and a host of a private network.
MACHINE_PATH = re.compile(
    r"(?<![\w./~}>-])/(?:root|home|Users|mnt|media|srv|opt|tmp|var|data|scratch|work|workspace)/\w|\b[A-Z]:\\+Users\b"
)
PRIVATE_HOST = re.compile(
    r"\b(?:10\.\d{1,3}|192\.168|172\.(?:1[6-9]|2\d|3[01]))\.\d{1,3}\.\d{1,3}\b"
    r"|//(?!127\.0\.0\.1\b|localhost\b)[\w.-]+:\d+|\b[\w-]+\.(?:internal|intranet|corp|lan)\b(?![\w(.])"
)


def of_one_machine(text: str) -> str:
    """The first thing in a text that holds on one machine alone, or nothing."""
    found = MACHINE_PATH.search(text) or PRIVATE_HOST.search(text)
    return found.group(0) if found else ""


def test_nothing_is_of_one_machine() -> None:
    folders = ("src", "docs", "examples", "benchmarks", "studies", "tests")
    found = [p for folder in folders for p in (ROOT / folder).rglob("*") if "out" not in p.relative_to(ROOT).parts]
    for path in [*found, *ROOT.glob("*")]:
        if path.suffix in TEXTS or path.name == "Makefile":
            place = of_one_machine(path.read_text(encoding="utf-8", errors="replace"))
            assert not place, f"{path.relative_to(ROOT)} mentions {place!r}, which is of one machine"


@pytest.mark.parametrize(
    ("parts", "bad"),
    [
        (["see /", "home/", "someone/model"], True), (['"/', "tmp/", 'x"'], True), (["C:", "\\Users", "\\x"], True),
        (["http://", "mirror.example", ":8080/simple"], True), (["192.", "168.", "0.7"], True), (["proxy.", "corp"], True),
        (["docs/", "home/", "page.md"], False), (["/proc/", "self/status"], False), (["version 10.1.2"], False),
        (["http://", "127.0.0.1:", "9"], False), (["threading.", "local"], False),
    ],
    ids=lambda value: "".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_what_is_of_one_machine(parts: list[str], bad: bool) -> None:
    assert bool(of_one_machine("".join(parts))) is bad


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("packed.form", "Packed"), ("packed.formats.format", "Format"), ("function.protocol", "WeightFunction"),
        ("quantize.soft", "Soft"), ("quantize.reconstruct", "Reconstruction"), ("checkpoint.computed", "RowBlocks"),
    ],
)  # fmt: skip
def test_a_base_says_what_is_missing(module: str, name: str) -> None:
    base = getattr(importlib.import_module(f"weft.{module}"), name)
    incomplete = type(f"Incomplete{name}", (base,), {})
    with pytest.raises(TypeError, match="abstract method"):
        incomplete()


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
