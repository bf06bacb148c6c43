"""Fine-tune with sharded weights (FSDP2) and torch's distributed checkpoints.

torchrun --nproc-per-node 2 examples/train/with_fsdp2.py OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import task
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import weft


def prepare() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The sharded model and an optimizer of what trains."""
    model = task.model()
    report = weft.adapt_(model, weft.adapt.LoRA(rank=8, alpha=16))  # before sharding
    if dist.get_rank() == 0:
        print(report)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    return model.train(), torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> float:
    """The loss after the steps ``first`` to ``last``; each process takes its share of every batch."""
    loss = torch.zeros(())
    for batch in list(task.batches(last))[first:]:
        share = {n: t.chunk(dist.get_world_size())[dist.get_rank()] for n, t in batch.items()}
        loss = model(**share).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    loss = loss.detach()
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size()


def main(out: Path) -> None:
    """Train, stop, go on, save."""
    dist.init_process_group("gloo")
    model, optimizer = prepare()
    steps(model, optimizer, 0, 10)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=out / "state")
    straight = steps(model, optimizer, 10, 20)

    model, optimizer = prepare()  # another day
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=out / "state")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    again = steps(model, optimizer, 10, 20)
    plain = weft.plain_state_dict(model)  # gathers: every process must ask
    if dist.get_rank() == 0:
        print(f"loss after 20 steps: {straight:.4f} straight, {again:.4f} stopped and gone on")
        merged = task.model()
        merged.load_state_dict(plain)
        merged.save_pretrained(out / "merged")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
