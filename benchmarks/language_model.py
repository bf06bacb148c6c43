"""Train a small language model on the standard library's source, for what needs one that is really trained.

python benchmarks/language_model.py OUT        a Llama of 7 M parameters with its tokenizer; half an hour on two cores

Packages are held out whole: every eighth top-level module or package (by the order of their names) is never trained on.
``OUT/held_out.jsonl`` and ``OUT/calibration.jsonl`` hold texts of the held-out and of the trained-on packages.
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY, LENGTH, BATCH, STEPS, RATE = 4096, 256, 12, 3000, 2e-3
HELD_OUT = 8  # of so many packages one


def sources() -> tuple[list[str], list[str]]:
    """Files of the standard library: those to train on, and those of held-out packages."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {
        "site-packages",
        "test",
        "tests",
        "idlelib",
        "__pycache__",
        "lib2to3",
        "turtledemo",
        "ensurepip",
        "config",
    }
    packages = sorted(p for p in root.iterdir() if p.name not in skipped and (p.suffix == ".py" or p.is_dir()))
    train: list[str] = []
    held: list[str] = []
    for number, package in enumerate(packages):
        files = [package] if package.is_file() else sorted(package.rglob("*.py"))
        for path in files:
            if not skipped & set(path.parts):
                text = path.read_text(encoding="utf-8", errors="replace")
                (held if number % HELD_OUT == 3 else train).append(text)
    return train, held


def tokenizer_of(texts: list[str]) -> Any:
    """Byte-level BPE."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=["<|end|>"], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    )


def train(ids: Tensor, steps: int = STEPS, seed: int = 0) -> Any:
    """A Llama trained on a stream of token ids: products in bfloat16, weights in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, 0.05 + 0.95 * (1 + math.cos(math.pi * s / steps)) / 2)
    )
    generator = torch.Generator().manual_seed(seed)
    began = time.time()
    for step in range(steps):
        starts = torch.randint(len(ids) - LENGTH, (BATCH,), generator=generator)
        batch = torch.stack([ids[s : s + LENGTH] for s in starts.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5} loss {float(loss.detach()):.3f} {time.time() - began:.0f} s", flush=True)
    return model.eval()


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    texts, held = sources()
    tokenizer = tokenizer_of(texts)
    ids: list[int] = []
    for text in texts:
        ids += [0, *tokenizer.encode(text, add_special_tokens=False)]
    print(f"{len(texts)} files, {len(ids):,} tokens; {len(held)} files held out", flush=True)
    model = train(torch.tensor(ids), arguments.steps)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    for name, some in (("calibration", texts), ("held_out", held)):
        lines = [json.dumps({"text": text}) for text in some]
        (arguments.output / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
