"""What extracting or merging adapters did, in numbers and in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class AdapterReport:
    """What an adapter that weft made holds.

    Attributes:
        output: the adapter's folder.
        ranks: by module.
        lost: by module, share of the change's squared norm that the factors do not hold.
        kept: share of the squared norm of all factored changes that the adapter holds.
        saved: tensors saved whole.
        left_out: changed tensors that the adapter does not hold -> why.
        unchanged: number of tensors that need nothing, as they are the base's.
    """

    output: Path
    ranks: dict[str, int] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    kept: float = 1.0
    saved: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    unchanged: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "output": str(self.output)}

    def text(self) -> str:
        """A few lines for a terminal."""
        ranks = sorted(set(self.ranks.values()))
        span = f"rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "") if ranks else "none"
        lines = [
            f"{self.output}: {len(self.ranks)} matrices ({span}), {self.kept:.4%} of their squared change kept",
            f"{len(self.saved)} tensors saved whole, {self.unchanged} unchanged",
        ]
        worst = sorted(self.lost, key=lambda m: -self.lost[m])[:3]
        lines += [f"  {self.lost[m]:.2%} lost in {m} (rank {self.ranks[m]})" for m in worst if self.lost[m] > 1e-4]
        lines += [f"  not in the adapter: {name} ({why})" for name, why in self.left_out.items()]
        return "\n".join(lines)
