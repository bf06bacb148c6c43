"""Fine-tune with Accelerate: mixed precision, accumulated gradients, save_state and load_state.

python examples/train/with_accelerate.py OUT        or: accelerate launch examples/train/with_accelerate.py OUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import accelerate
import task
import torch

import weft


def prepare() -> tuple[accelerate.Accelerator, Any, Any, Any]:
    """An accelerator with the model, the optimizer and the data that it has prepared."""
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = task.model()
    report = weft.adapt_(model, weft.adapt.LoRA(rank=8, alpha=16))  # before prepare, which wraps the model
    accelerator.print(report)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    data = torch.utils.data.DataLoader(task.rows(256), batch_size=8)
    return accelerator, *accelerator.prepare(model, optimizer, data)


def steps(accelerator: accelerate.Accelerator, model: Any, optimizer: Any, batches: Any) -> float:
    """The loss after the batches."""
    model.train()
    loss = torch.zeros(())
    for batch in batches:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    return loss.item()


def main(out: Path) -> None:
    """Train, stop, go on, save."""
    accelerator, model, optimizer, data = prepare()
    batches = list(data)
    steps(accelerator, model, optimizer, batches[:10])
    accelerator.save_state(str(out / "state"))
    straight = steps(accelerator, model, optimizer, batches[10:20])

    accelerator, model, optimizer, data = prepare()  # another day
    accelerator.load_state(str(out / "state"))
    again = steps(accelerator, model, optimizer, list(data)[10:20])
    accelerator.print(f"loss after 20 steps: {straight:.4f} straight, {again:.4f} stopped and gone on")
    if accelerator.is_main_process:
        print(weft.adapt.save_adapter(accelerator.unwrap_model(model), out / "adapter"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
