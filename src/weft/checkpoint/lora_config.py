"""``adapter_config.json`` of an adapter as PEFT writes it: read strictly, so that nothing is computed wrongly.

LoRA says ΔW = scale · B A. Everything else that the file may ask for either changes the formula in a way that
is carried out exactly (rsLoRA, DoRA, patterns), or is refused by name. So is every other type but MiSS, whose change
is a matrix that all column blocks share, or (Bat) made of the weight's own blocks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weft.errors import CheckpointError

# fields that, when set, mean something else than ΔW = scale · B A
_REFUSED = {
    "layer_replication": "it repeats layers of the base model",
    "target_parameters": "it adapts fused parameters, whose layout the file does not state",
    "alora_invocation_tokens": "it acts on some tokens only, so no single weight equals it",
    "arrow_config": "it routes each token to its own adapters, so no single weight equals it",
    "monteclora_config": "it draws its weights at random",
    "kasa_config": "it replaces singular values of the base model",
    "use_qalora": "it averages groups of inputs",
    "use_bdlora": "its factors are block-diagonal",
}
# starts that subtract something from the base model, which the file does not hold
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_MAX_PATTERN = 1000  # characters of one name pattern
_MAX_NUMBER = 10**9  # ranks and alphas; also keeps out NaN and infinity


@dataclass(frozen=True)
class LoraConfig:
    """What an adapter's configuration says of its arithmetic.

    Attributes:
        rank: of modules that no pattern names.
        alpha: numerator of the scale of modules that no pattern names.
        rank_pattern, alpha_pattern: regular expressions on the end of a module's path -> its rank, its alpha.
        rslora: the scale is alpha/√rank instead of alpha/rank.
        dora: rows are normalised and multiplied by a learned magnitude.
        fan_in_fan_out: weights of the adapted layers are stored (in, out).
        tied: adapters and saved modules of the input embedding hold for the output layer too.
        token_rows: rows of the input embedding that are replaced; by module if it is named.
        base: what the adapter was trained on, as its author called it.
        miss: "" for LoRA; of MiSS, "shards", "mini" or "bat".
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    fan_in_fan_out: bool = False
    tied: bool = False
    token_rows: Any = None
    base: str = ""
    miss: str = ""

    def rank_of(self, module: str) -> int:
        """The rank that the configuration promises for a module."""
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def alpha_of(self, module: str) -> float:
        """The numerator of a module's scale."""
        return _by_pattern(self.alpha_pattern, module, self.alpha)

    def scale_of(self, module: str) -> float:
        """What B A is multiplied by."""
        alpha, rank = self.alpha_of(module), self.rank_of(module)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def parse_lora_config(raw: Mapping[str, Any], where: str) -> LoraConfig:
    """Check a configuration.

    Raises:
        CheckpointError: it is neither LoRA nor MiSS, or asks for something that weft cannot compute exactly.

    >>> parse_lora_config({"peft_type": "LORA", "r": 4, "lora_alpha": 8}, "adapter").scale_of("layer")
    2.0
    >>> parse_lora_config({"peft_type": "LOHA"}, "adapter")
    Traceback (most recent call last):
    weft.errors.CheckpointError: adapter: is an adapter of the type LOHA; weft reads LORA (with rsLoRA and DoRA) and MISS ...
    """
    kind = raw.get("peft_type")
    if kind not in ("LORA", "MISS"):
        found = f"is an adapter of the type {kind}" if isinstance(kind, str) else "its configuration names no peft_type"
        raise CheckpointError(
            f"{where}: {found}; weft reads LORA (with rsLoRA and DoRA) and MISS only. "
            "Merge it into its base with the library that made it, and give the merged model."
        )
    for name, reason in _REFUSED.items():
        if raw.get(name):
            raise CheckpointError(f"{where}: uses {name}: {reason}, so it cannot be added to a weight.")
    if kind == "MISS":
        forms = {"bat": "bat", "mini": "mini"}
        width = int(_number(raw.get("r", 64), "r", where, whole=True))
        base = str(raw.get("base_model_name_or_path") or "")
        return LoraConfig(width, width, base=base, miss=forms.get(str(raw.get("init_weights")), "shards"))
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{where}: was started with {start!r}, which changes the base model too. Save it again as plain LoRA "
            "(PEFT: save_pretrained with path_initial_model_for_weight_conversion), and give that."
        )
    rank = _number(raw.get("r", 8), "r", where, whole=True)
    return LoraConfig(
        rank=int(rank),
        alpha=_number(raw.get("lora_alpha", 8), "lora_alpha", where),
        rank_pattern={k: int(v) for k, v in _pattern(raw, "rank_pattern", where, whole=True).items()},
        alpha_pattern=_pattern(raw, "alpha_pattern", where),
        rslora=bool(raw.get("use_rslora")),
        dora=bool(raw.get("use_dora")),
        fan_in_fan_out=bool(raw.get("fan_in_fan_out")),
        tied=bool(raw.get("ensure_weight_tying")),
        token_rows=raw.get("trainable_token_indices"),
        base=str(raw.get("base_model_name_or_path") or ""),
    )


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    for pattern, value in patterns.items():
        if _on_path(pattern).match(module):
            return value
    return default


def _on_path(pattern: str) -> re.Pattern[str]:
    """PEFT's reading of a key of a pattern: a regular expression for the end of a module's path."""
    return re.compile(rf"(.*\.)?({pattern})$")


def _pattern(raw: Mapping[str, Any], name: str, where: str, whole: bool = False) -> dict[str, float]:
    value = raw.get(name) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: {name} must map names to numbers, found {type(value).__name__}.")
    for pattern in value:
        try:
            _on_path(pattern if len(pattern) <= _MAX_PATTERN else "(")
        except (re.error, RecursionError):
            raise CheckpointError(f"{where}: {name} holds {pattern[:80]!r}, which is not a name pattern.") from None
    return {pattern: _number(number, name, where, whole=whole) for pattern, number in value.items()}


def _number(value: Any, name: str, where: str, whole: bool = False) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and -_MAX_NUMBER <= value <= _MAX_NUMBER
    if not good or (whole and (value != int(value) or value < 1)):
        need = "a positive whole number" if whole else "a number"
        raise CheckpointError(f"{where}: {name} must be {need}, found {value!r}.")
    return value
