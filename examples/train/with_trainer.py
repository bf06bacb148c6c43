"""Fine-tune with transformers' Trainer: checkpoints that hold the adapter, resume, the best one at the end.

python examples/train/with_trainer.py OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import task
import transformers

import weft
from weft.adapt.trainer import AdapterTrainer


def trainer(out: Path, steps: int) -> AdapterTrainer:
    """A trainer for so many steps in all."""
    model = task.model()
    print(weft.adapt_(model, weft.adapt.LoRA(rank=8, alpha=16)))
    arguments = transformers.TrainingArguments(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=3e-3, lr_scheduler_type="constant",
        save_steps=10, eval_strategy="steps", eval_steps=10, logging_steps=10, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False}, load_best_model_at_end=True, report_to=[], disable_tqdm=True,
        use_cpu=True,
    )  # fmt: skip
    samples = task.rows(300)
    return AdapterTrainer(model, arguments, train_dataset=samples[:256], eval_dataset=samples[256:])


def main(out: Path) -> None:
    """Train, stop, go on, save."""
    straight = trainer(out / "straight", 20)
    straight.train()
    trainer(out / "stopped", 10).train()
    resumed = trainer(out / "stopped", 20)
    resumed.train(resume_from_checkpoint=True)
    losses = [t.evaluate()["eval_loss"] for t in (straight, resumed)]
    print(f"loss after 20 steps: {losses[0]:.4f} straight, {losses[1]:.4f} stopped and gone on")
    print(weft.adapt.save_adapter(resumed.model, out / "adapter"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
