"""Whether a walk reproduces a model of transformers, found out on a small copy of it with random weights."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
from torch import Tensor

from weft.checkpoint.open import open_checkpoint
from weft.errors import CheckpointError

# what makes a model large -> what it is in the small copy; only fields that a configuration has are set
_SMALL = {
    "vocab_size": 128, "intermediate_size": 48, "d_ff": 48, "n_inner": 48, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24, "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "image_size": 32, "patch_size": 8, "sliding_window": 8, "local_attention": 8,
}  # fmt: skip
_HEADS, _HEAD_DIM = 4, 8
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers")
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "decoder_start_token_id")
_checked: set[Any] = set()


def check_architecture(model_class: Any, config: Any) -> None:
    """Walk a small random model of a class, from memory and from disk, and compare with its plain forward pass.

    Outputs must be equal bit for bit, and the weights of each block must come back under the names of the file. Done once
    a process for each class.

    Args:
        model_class: a class of transformers' models.
        config: the configuration of the large model.

    Raises:
        CheckpointError: they differ, or no small copy can be made; the message says what to do.
    """
    kind = (model_class, type(config))
    if kind in _checked:
        return
    name = model_class.__name__
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = model_class._from_config(small(config), dtype=torch.float32).eval()
            batch = small_batch(model)
            with torch.no_grad():
                expected = _tensor(model(**batch))
            problem = _compare(model, batch, expected)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a class that nobody has tried here may raise
        raise CheckpointError(
            f"{name}: no small copy could be walked to check the architecture ({type(error).__name__}: {error}). If the "
            "model's plain forward pass is known to agree, pass check=False."
        ) from error
    if problem:
        raise CheckpointError(
            f"{name} cannot be walked block by block: {problem}. Use an architecture that can, or work on the model in "
            "memory as a whole."
        )
    _checked.add(kind)


def small(config: Any) -> Any:
    """A configuration of the same architecture with a few narrow layers.

    >>> import transformers
    >>> small(transformers.LlamaConfig()).hidden_size
    32
    """
    made = copy.deepcopy(config)
    for part in {id(c): c for c in (made, made.get_text_config())}.values():
        _shrink(part)
    made._experts_implementation = "eager"
    return made


def _shrink(config: Any) -> None:
    values = config.to_dict()
    heads = next(
        (values[k] for k in ("num_attention_heads", "n_head", "num_heads") if isinstance(values.get(k), int)), _HEADS
    )
    groups = values.get("num_key_value_heads") or heads
    wanted = dict(_SMALL)
    wanted |= dict.fromkeys(("num_attention_heads", "n_head", "num_heads"), _HEADS)
    wanted |= dict.fromkeys(("hidden_size", "n_embd", "d_model"), _HEADS * _HEAD_DIM)
    wanted |= dict.fromkeys(("head_dim", "d_kv"), _HEAD_DIM)
    wanted["num_key_value_heads"] = max(1, _HEADS * groups // heads)
    types = values.get("layer_types")
    layers = 3
    if isinstance(types, list):
        layers = max(2, 1 + max(types.index(t) for t in set(types)))
        config.layer_types = types[:layers]
    wanted |= dict.fromkeys(_LAYERS, layers)
    for key, value in wanted.items():
        if isinstance(values.get(key), int) and not isinstance(values[key], bool):
            setattr(config, key, min(value, values[key]) if key not in ("image_size", "patch_size") else value)
    for key in _TOKENS:
        if isinstance(values.get(key), int) and values[key] >= wanted["vocab_size"]:
            setattr(config, key, 1)


def small_batch(model: Any) -> dict[str, Tensor]:
    """Random data that a small copy takes, with padding where the model knows it."""
    config = model.config
    if model.main_input_name == "pixel_values":
        return {
            "pixel_values": torch.randn(2, getattr(config, "num_channels", 3), config.image_size, config.image_size)
        }
    vocabulary = config.get_text_config().vocab_size
    tokens = torch.randint(3, vocabulary, (2, 13))
    mask = torch.ones_like(tokens)
    mask[1, -4:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask}
    if config.is_encoder_decoder:
        batch["decoder_input_ids"] = tokens[:, :5]
    return batch


def _compare(model: Any, batch: dict[str, Tensor], expected: Tensor) -> str:
    """What is wrong, in words; empty if nothing is."""
    from weft.calibrate.source import FromCheckpoint, InMemory
    from weft.calibrate.walker import Walk
    from weft.checkpoint.live_names import quiet

    with tempfile.TemporaryDirectory(prefix="weft-") as folder:
        with quiet():
            model.save_pretrained(folder)
        with open_checkpoint(folder) as checkpoint:
            for source in (InMemory(model), FromCheckpoint(checkpoint, type(model))):
                where = "in memory" if type(source) is InMemory else "from disk"
                with Walk(source, [batch], check=False) as walk:
                    for block in walk:
                        if type(source) is InMemory:
                            continue
                        for name, value in block.stored().items():
                            if not torch.equal(value, checkpoint[name].torch()):
                                return f"{name} of {block.name} does not come back as it was read"
                    (output,) = walk.outputs()
                error = (_tensor(output) - expected).abs().max().item()
                if error != 0:
                    return f"{where}, outputs differ from the plain forward pass by {error:.3g}"
    return ""


def _tensor(output: Any) -> Tensor:
    value = output[0] if not isinstance(output, Tensor) else output
    if not isinstance(value, Tensor):
        raise CheckpointError(f"The model returns {type(output).__name__}, of which nothing can be compared.")
    return value
