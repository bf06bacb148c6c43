"""Fine-tune a model by small functions of its frozen weights. Start at :mod:`weft.adapt.lora`."""

from weft.adapt.lora import LoRA

__all__ = ["LoRA"]
