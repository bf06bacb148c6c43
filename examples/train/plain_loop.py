"""Fine-tune with LoRA in a loop of one's own: gradient checkpointing, optimizer groups, stop and go on, save.

python examples/train/plain_loop.py OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import task
import torch

import weft


def prepare() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The model with its adapter, and an optimizer of what trains."""
    model = task.model()
    print(weft.adapt_(model, weft.adapt.LoRA(rank=8, alpha=16), modules_to_save="model.norm"))
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()  # the embeddings are frozen, and checkpointing needs inputs with gradients
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    factors = [p for n, p in trained.items() if n.endswith((".A", ".B"))]
    rest = [p for n, p in trained.items() if not n.endswith((".A", ".B"))]
    groups = [{"params": factors, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0, "lr": 1e-3}]
    return model.train(), torch.optim.AdamW(groups, lr=3e-3)


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    """Losses of the steps ``first`` to ``last``."""
    losses = []
    for batch in list(task.batches(last))[first:]:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(out: Path) -> None:
    """Train, stop, go on, save."""
    model, optimizer = prepare()
    steps(model, optimizer, 0, 10)
    weft.adapt.save_adapter(model, out / "step10")
    torch.save(optimizer.state_dict(), out / "optimizer.pt")
    straight = steps(model, optimizer, 10, 20)

    model, optimizer = prepare()  # another day
    weft.adapt.restore_adapter_(model, out / "step10")
    optimizer.load_state_dict(torch.load(out / "optimizer.pt", weights_only=True))
    again = steps(model, optimizer, 10, 20)
    print(f"loss after 20 steps: {straight[-1]:.4f} straight, {again[-1]:.4f} stopped and gone on")

    print(weft.adapt.save_adapter(model, out / "adapter"))  # PEFT loads it
    weft.save(model, out / "merged")  # a plain model


if __name__ == "__main__":
    main(Path(sys.argv[1]))
