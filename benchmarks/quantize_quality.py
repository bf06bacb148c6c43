"""What quantising costs: every method at 8, 4, 3 and 2 bits on a language model and on a sentence encoder.

python benchmarks/quantize_quality.py --model LM [--methods 'rtn;awq, gptq rounding'] [--only encoder]
                                                    adds rows to benchmarks/results/quantize_quality.json

LM is what ``benchmarks/language_model.py`` makes: calibrated on 64 × 256 tokens of packages that it was trained on, judged by
perplexity on 96 × 256 tokens of held-out packages. The encoder is MiniLM-L6: calibrated on 96 docstrings of the standard library,
judged by the mean of 1 − cos of 256 others' embeddings, and by a logistic regression that tells ten modules apart, fitted to the
embeddings of the original on other docstrings. All matrices of the blocks are quantised, groups of 64 inputs share a scale;
defaults otherwise. Bits and megabytes are those of the files; seconds are one thread's processor time, reading and writing included. Rows
that are there are not measured again.
"""

from __future__ import annotations

import argparse
import ast
import json
import platform
import sysconfig
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from quantizers import batches as encoder_batches
from quantizers import docstrings, folder
from torch import Tensor

from weft.calibrate import Change
from weft.quantize import (
    AWQ,
    GPTQ,
    HQQ,
    JLCM,
    NUPES,
    RTN,
    VPTQ,
    W8A8,
    AdaDim,
    Codebook,
    FlexRound,
    FloatingPoint,
    GradientPTQ,
    PowerQuant,
    ShiftAdd,
    SignRound,
    SmoothQuant,
    VectorQuantization,
    VQ4DiT,
    ZeroQuantFP,
    evaluate,
    load_quantized,
    quantize_model,
)  # fmt: skip

RESULTS = Path(__file__).with_name("results") / "quantize_quality.json"
GROUP = 64
VECTORS = {4: (2, 256), 3: (2, 64), 2: (4, 256)}  # length, entries
CLASSES, EACH = 10, 24


def candidates() -> dict[str, Change]:
    """Configurations by "method bits": those of few bits, by which methods differ, first."""
    made: dict[str, Change] = {}
    for bits in (8, 4, 3, 2):
        made[f"rtn {bits}"] = RTN(bits, GROUP)
        made[f"rtn, mse ranges {bits}"] = RTN(bits, GROUP, ranges="mse")
        made[f"hqq {bits}"] = HQQ(bits, GROUP)
        made[f"gptq {bits}"] = GPTQ(bits, GROUP)
        made[f"gptq, mse ranges {bits}"] = GPTQ(bits, GROUP, ranges="mse")
        made[f"powerquant {bits}"] = PowerQuant(bits, GROUP)
    made |= {"fp8 8": FloatingPoint(), "w8a8 8": W8A8(), "smoothquant 8": SmoothQuant()}
    made |= {"nf4 4": Codebook("nf4"), "fp4 4": Codebook("fp4"), "zeroquant_fp 4": ZeroQuantFP(group_size=GROUP)}
    for bits in (8, 4, 3, 2):
        made[f"awq {bits}"] = AWQ(bits, GROUP)
        made[f"awq, gptq rounding {bits}"] = AWQ(bits, GROUP, rounding="gptq")
        made[f"adadim {bits}"] = AdaDim(bits, GROUP)
        made[f"adadim, gptq rounding {bits}"] = AdaDim(bits, GROUP, rounding="gptq")
        made[f"signround {bits}"] = SignRound(bits, GROUP)
        made[f"flexround {bits}"] = FlexRound(bits, GROUP)
        made[f"adaround {bits}"] = GradientPTQ(bits, GROUP)
        made[f"nupes {bits}"] = NUPES(bits, GROUP)
    for bits, (length, entries) in VECTORS.items():
        made[f"vptq {bits}"] = VPTQ(length, entries)
        made[f"shiftaddllm {bits}"] = ShiftAdd(bits)
        made[f"kmeans_vq {bits}"] = VectorQuantization(length, entries)
        made[f"vq4dit {bits}"] = VQ4DiT(length, entries)
        made[f"jlcm {bits}"] = JLCM(2**bits)
    return dict(sorted(made.items(), key=lambda item: "3248".index(item[0][-1])))


class LanguageModel:
    """Perplexity on held-out packages."""

    def __init__(self, model: Path):
        from weft.calibrate.data import DataOptions, load_tokenizer, read_batches

        self.folder, tokenizer = str(model), load_tokenizer(model)
        self.calibration = read_batches(model / "calibration.jsonl", tokenizer, DataOptions(64, 256, 8, pack=True))
        self.held_out = read_batches(model / "held_out.jsonl", tokenizer, DataOptions(96, 256, 8, pack=True))
        for batch in self.calibration:
            del batch["labels"]

    def score(self, model: Any) -> dict[str, float]:
        """Of a model in memory."""
        return {"perplexity": float(f"{evaluate(model, self.held_out)['perplexity']:.5g}")}


class Encoder:
    """Fidelity of embeddings, and what a classifier makes of them."""

    def __init__(self) -> None:
        from sklearn.linear_model import LogisticRegression
        from transformers import AutoModel

        self.folder = folder()
        texts, self.held_out = docstrings()
        self.calibration = encoder_batches(texts)
        train, self.labels, self.test = _classes()
        original = AutoModel.from_pretrained(self.folder).eval()
        self.before = _embedded(original, self.held_out)
        classifier = LogisticRegression(max_iter=2000, C=10.0)
        self.classifier = classifier.fit(_embedded(original, [t for t, _ in train]).numpy(), [c for _, c in train])

    def score(self, model: Any) -> dict[str, float]:
        """Of a model in memory."""
        distance = 1 - torch.cosine_similarity(self.before, _embedded(model, self.held_out))
        found = self.classifier.score(_embedded(model, self.test).numpy(), self.labels)
        return {"one_minus_cosine": float(f"{float(distance.mean()):.4g}"), "accuracy": round(float(found), 4)}


def _classes() -> tuple[list[tuple[str, str]], list[str], list[str]]:
    """Docstrings of the ten modules that have most of them: to fit, and to judge by."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef | ast.ClassDef) else None
            if text and len(text) > 40:
                found[path.stem].append(" ".join(text.split("\n\n")[0].split()))
    largest = sorted(found, key=lambda name: (-len(found[name]), name))[:CLASSES]
    train = [(t, name) for name in largest for t in found[name][: 2 * EACH : 2]]
    test = [(t, name) for name in largest for t in found[name][1 : 2 * EACH : 2]]
    return train, [name for _, name in test], [t for t, _ in test]


@torch.no_grad()
def _embedded(model: Any, texts: list[str]) -> Tensor:
    """The mean over tokens: (texts, 384)."""
    found = []
    for batch in encoder_batches(texts):
        mask = batch["attention_mask"].unsqueeze(-1)
        found.append((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.cat(found)


def measure(task: LanguageModel | Encoder, config: Change) -> dict[str, Any]:
    """One row."""
    with tempfile.TemporaryDirectory() as work:
        began = time.process_time()
        data = task.calibration if config.needs or config.targets else None
        made = quantize_model(task.folder, Path(work) / "out", config, data, format="weft", check=False)
        seconds = time.process_time() - began
        report = json.loads((made / "weft.json").read_text())["layers"].values()
        size = sum(p.stat().st_size for p in made.glob("*.safetensors"))
        model = load_quantized(made, backend="dequantize")
        bits = [facts["bits"] for facts in report if "bits" in facts]
        return {
            **task.score(model),
            "bits_per_weight": round(sum(bits) / len(bits), 3),
            "MB": round(size / 1e6, 2),
            "seconds": round(seconds, 1),
        }


def main() -> None:
    """Measure what is missing, and write after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--methods", default="")
    parser.add_argument("--only", choices=("language", "encoder"), default=None)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    facts: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    facts |= {"group_size": GROUP, "torch": torch.__version__, "machine": platform.machine()}
    tasks: dict[str, Callable[[], Any]] = {"language": lambda: LanguageModel(arguments.model), "encoder": Encoder}
    wanted = arguments.methods.split(";") if arguments.methods else None
    for kind, build in tasks.items():
        if arguments.only not in (None, kind):
            continue
        task, rows = build(), facts.setdefault(kind, {})
        if "original" not in rows:
            from weft.checkpoint.open import open_checkpoint

            with open_checkpoint(task.folder) as checkpoint:
                rows["original"] = {**task.score(load_quantized(checkpoint)), "MB": round(checkpoint.nbytes / 1e6, 2)}
        for label, config in candidates().items():
            if label in rows or (wanted and label.rpartition(" ")[0] not in wanted):
                continue
            rows[label] = measure(task, config)
            print(kind, label, rows[label], flush=True)
            RESULTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
