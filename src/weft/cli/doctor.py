"""``weft doctor``: is this installation fit to work?"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import time
from typing import Any

from weft import __version__
from weft.cli.show import size
from weft.engine.plan import default_memory, default_threads

_NEEDED = ("torch", "numpy", "numba", "safetensors", "xxhash", "pydantic", "typer", "rich", "PyYAML")
_OPTIONAL = {
    "transformers": "weft[hf]",
    "huggingface-hub": "weft[hf]",
    "peft": "weft[hf]",
    "scikit-learn": "weft[science]",
    "scipy": "weft[science]",
    "matplotlib": "weft[science]",
    "compressed-tensors": "weft[quantize]",
    "gguf": "weft[quantize]",
    "bitsandbytes": "weft[quantize]",
    "accelerate": "weft[quantize]",
    "triton": "weft[triton]",
}


def examine() -> dict[str, Any]:
    """Facts and problems, as data; ``ok`` is False if something needed is missing or miscomputes."""
    needed = {name: _version(name) for name in _NEEDED}
    kernels = _check_kernels()
    problems = [f"{name} is not installed: pip install {name}" for name, version in needed.items() if not version]
    if kernels["error"]:
        problems.append(kernels["error"])
    return {
        "ok": not problems,
        "weft": __version__,
        "python": sys.version.split()[0],
        "machine": f"{platform.machine()}, {platform.system()} {platform.release()}",
        "cores": default_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "memory_budget_bytes": default_memory(),
        "free_disk_bytes": shutil.disk_usage(".").free,
        "needed": needed,
        "optional": {name: _version(name) for name in _OPTIONAL},
        "gpu": _gpu(),
        "kernels": kernels,
        "problems": problems,
    }


def text(findings: dict[str, Any]) -> str:
    """For a person."""
    optional = [
        f"{name} {version}" if version else f"{name} missing (pip install '{_OPTIONAL[name]}')"
        for name, version in findings["optional"].items()
    ]
    lines = [
        f"weft {findings['weft']}, Python {findings['python']}, {findings['machine']}",
        f"cores     {findings['cores']}",
        f"memory    {size(findings['memory_bytes'])}, budget {size(findings['memory_budget_bytes'])} unless --memory is given",
        f"disk      {size(findings['free_disk_bytes'])} free here",
        f"needed    {', '.join(f'{n} {v}' for n, v in findings['needed'].items())}",
        f"optional  {', '.join(optional)}",
        f"gpu       {findings['gpu'] or 'none'}",
        f"kernels   {findings['kernels']['state']}",
    ]
    lines += [f"problem   {p}" for p in findings["problems"]]
    return "\n".join([*lines, "all good" if findings["ok"] else "not fit to work: see the problems above"])


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _gpu() -> str:
    if importlib.util.find_spec("torch") is None:
        return ""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""


def _check_kernels() -> dict[str, Any]:
    """Compile (or load) the kernels of one merge and compare with numpy."""
    began = time.perf_counter()
    try:
        import numpy as np

        from weft.merge import linear

        made = linear([np.ones(5, np.float32), np.zeros(5, np.float32)], weights=[3, 1])
        right = bool((made == 0.75).all())
    except Exception as error:  # whatever stops the compiler is a finding, not a crash of the doctor
        return {"state": "do not compile", "error": f"compiled kernels fail: {error}", "seconds": 0.0}
    seconds = round(time.perf_counter() - began, 2)
    state = f"right, ready in {seconds} s" if right else "wrong"
    return {"state": state, "error": "" if right else "compiled kernels give wrong numbers", "seconds": seconds}
