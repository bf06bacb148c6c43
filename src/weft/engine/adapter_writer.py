"""A PEFT folder written tensor by tensor: factors go to a spool file as they are found, and appear all at once."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from weft.checkpoint.dtypes import DType
from weft.checkpoint.header import build_header
from weft.checkpoint.lora_folder import CONFIG_FILE, WEIGHTS_FILE
from weft.engine.journal import WorkFolder
from weft.engine.run import REPORT_FILE
from weft.errors import OutputError

NO_TARGET = "dummy-target-modules"  # how PEFT spells an adapter that only saves modules


_TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}
_HEADS = ("classifier", "score")  # modules that PEFT saves whole in all classifiers of sequences


class AdapterWriter:
    """Collects an adapter's tensors and publishes the folder. Use it in a ``with`` statement.

    Memory: one tensor. Disk: twice the adapter's size until it is published.

    Args:
        output: the folder.
        force: replace an output that weft made.
        weights_file, config_file: names of the two files; PEFT's unless an adapter has a form of its own.

    Raises:
        OutputError: the output exists (and was not made by weft, or without ``force``), is being written, or does not
            fit on the disk; nothing is left behind.
    """

    def __init__(
        self,
        output: str | os.PathLike[str],
        *,
        force: bool = False,
        weights_file: str = WEIGHTS_FILE,
        config_file: str = CONFIG_FILE,
    ):
        self.output = Path(os.path.abspath(Path(output).expanduser()))
        self._force = force
        self._weights_file, self._config_file = weights_file, config_file
        self._work = WorkFolder(self.output)
        self._spool: BinaryIO | None = None
        self._placed: dict[str, tuple[int, DType, tuple[int, ...]]] = {}

    def __enter__(self) -> AdapterWriter:
        if self.output.exists():
            ours = self.output.is_dir() and ((self.output / REPORT_FILE).is_file() or not any(self.output.iterdir()))
            if not self._force or not ours:
                fix = "Choose another output" + ("." if self._force else ", or replace it with force=True.")
                made = " and was not made by weft" if self._force else ""
                raise OutputError(f"{self.output}: exists already{made}. {fix}")
        self._work.acquire()
        if self._work.read()[0] is not None and not self._force:
            self._work.release()
            raise OutputError(f"{self._work.root}: holds an unfinished run. Finish it, or start over with force=True.")
        shutil.rmtree(self._work.files, ignore_errors=True)
        self._work.files.mkdir()
        self._spool = (self._work.root / "spool").open("wb+")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._spool is not None:
            self._spool.close()
            self._spool = None
        if self._work.root.exists() and not self.published:
            self._work.remove()

    @property
    def published(self) -> bool:
        """Whether the folder has its final name."""
        return not self._work.files.exists()

    def add(self, name: str, bits: np.ndarray, dtype: DType, shape: tuple[int, ...] | None = None) -> None:
        """Append a tensor, given as the bits of its elements."""
        assert self._spool is not None
        if name in self._placed:
            raise ValueError(f"{name} was added before")
        self._placed[name] = (self._spool.tell(), dtype, bits.shape if shape is None else shape)
        try:
            self._spool.write(np.ascontiguousarray(bits).reshape(-1).view(np.uint8).data)
        except OSError as error:
            raise OutputError(f"{self.output}: cannot be written ({error.strerror}).") from None

    def publish(self, config: Mapping[str, Any], report: Mapping[str, Any]) -> None:
        """Write the safetensors file, the configuration and weft's report, and give the folder its name."""
        assert self._spool is not None
        prefix, header = build_header(((n, d, s) for n, (_, d, s) in self._placed.items()), {})
        try:
            self._spool.flush()
            with (self._work.files / self._weights_file).open("wb") as out:
                out.write(prefix)
                for name, info in header.tensors.items():
                    self._spool.seek(self._placed[name][0])
                    self._copy(out, info.nbytes)
                out.flush()
                os.fsync(out.fileno())
            for file, value in ((self._config_file, config), (REPORT_FILE, report)):
                text = json.dumps(value, indent=2, sort_keys=file == self._config_file, ensure_ascii=False) + "\n"
                (self._work.files / file).write_text(text, encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{self.output}: cannot be written ({error.strerror}).") from None
        self._work.publish(self._force, single_file=False)

    def _copy(self, out: BinaryIO, count: int) -> None:
        assert self._spool is not None
        while count:
            piece = self._spool.read(min(count, 1 << 22))
            out.write(piece)
            count -= len(piece)


def plain_config(
    ranks: Mapping[str, int],
    *,
    alpha: float | None = None,
    modules_to_save: Sequence[str] = (),
    biases: bool = False,
    fan_in_fan_out: bool = False,
    base_model: str = "",
    task_type: str | None = None,
) -> dict[str, Any]:
    r"""``adapter_config.json`` of factors with these ranks; without ``alpha`` the scale is 1 everywhere.

    >>> config = plain_config({"a.q": 4, "a.v": 4, "b.q": 2})
    >>> config["r"], config["rank_pattern"], config["alpha_pattern"]
    (4, {'^b\\.q': 2}, {'^b\\.q': 2})
    """
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    odd = {"^" + re.escape(module): rank for module, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "r": usual,
        "lora_alpha": usual if alpha is None else alpha,
        "rank_pattern": odd,
        "alpha_pattern": odd if alpha is None else {},
        "target_modules": sorted(ranks) or NO_TARGET,
        "modules_to_save": list(modules_to_save) or None,
        "bias": "lora_only" if biases else "none",
        "fan_in_fan_out": fan_in_fan_out,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def task_type(architectures: Sequence[str], saved: Sequence[str]) -> str | None:
    """PEFT's name for what a model does, from ``architectures`` of its configuration and the modules saved whole.

    None for a classifier whose head is not saved: PEFT would look for one in the file, and not load without.

    >>> task_type(["LlamaForCausalLM"], []), task_type([], [])
    ('CAUSAL_LM', None)
    >>> task_type(["BertForSequenceClassification"], ["classifier"]), task_type(["BertForSequenceClassification"], [])
    ('SEQ_CLS', None)
    """
    task = next((t for k, t in _TASKS.items() if architectures and architectures[0].endswith(k)), None)
    head = any(path.endswith(_HEADS) for path in saved)
    return None if task == "SEQ_CLS" and not head else task
