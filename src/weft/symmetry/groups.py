"""A model's symmetry as data: which places of which axes permute together. No tensors, no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from weft.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from weft.symmetry.apply import Cut
    from weft.symmetry.permutations import Generator, Permutations


@dataclass(frozen=True)
class Loop:
    """Another factor of an axis: ``size`` steps of ``stride`` places; ``group`` is its name if it permutes too."""

    size: int
    stride: int
    group: str = ""


@dataclass(frozen=True)
class Member:
    """Where unit j of a group lies in one axis of one tensor: at ``start + j · stride + Σ_l i_l · loops[l].stride``.

    A fused tensor has one member for each of its parts; loops with a larger stride are the factors before the group,
    loops with a smaller stride those after it.
    """

    tensor: str
    axis: int
    start: int
    stride: int
    loops: tuple[Loop, ...] = ()


@dataclass(frozen=True)
class Group:
    """Units that permute together wherever they occur.

    Attributes:
        name: unique, from the tensors and the kind.
        kind: hidden, intermediate, channels, heads, key_value_heads, query_heads, head_dim, experts or axis.
        size: number of units.
        members: where they lie.
        within: groups inside of whose every unit there is a permutation of its own, as units of an expert.
    """

    name: str
    kind: str
    size: int
    members: tuple[Member, ...]
    within: tuple[str, ...] = ()

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that have a part in it."""
        return tuple(dict.fromkeys(m.tensor for m in self.members))


@dataclass(frozen=True)
class Frozen:
    """A factor of ``size`` places of an axis that must stay in its order, and why."""

    tensor: str
    axis: int
    size: int
    reason: str


@dataclass(frozen=True)
class Symmetry:
    """What may be permuted in a model without changing its function.

    Attributes:
        groups: in the order of the model's tensors, each after those that it lies within.
        frozen: what may not, with reasons.
        unknown: operations without a rule, and how often; all that they touch is frozen.
        shapes: of every tensor.
        aliases: further names of tied tensors -> the name used in members.
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    unknown: tuple[tuple[str, int], ...]
    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]

    def __getitem__(self, name: str) -> Group:
        """A group by name.

        Raises:
            RecipeError: there is none, with the nearest names.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise RecipeError(f"There is no group {name!r}.{did_you_mean(name, [g.name for g in self.groups])}")

    def of_kind(self, *kinds: str) -> tuple[Group, ...]:
        """Groups of one or several kinds."""
        return tuple(g for g in self.groups if g.kind in kinds)

    def shape(self, group: str | Group) -> tuple[int, ...]:
        """Shape of a group's permutations: one of ``size`` for each unit of the groups that it lies within."""
        group = self[group] if isinstance(group, str) else group
        return (*(self[name].size for name in group.within), group.size)

    def why_frozen(self, tensor: str, axis: int) -> tuple[str, ...]:
        """The reasons why an axis, or a part of it, must stay in its order."""
        name = self.aliases.get(tensor, tensor)
        if name not in self.shapes:
            raise RecipeError(f"There is no tensor {tensor!r}.{did_you_mean(tensor, self.shapes)}")
        axis %= max(len(self.shapes[name]), 1)
        return tuple(f.reason for f in self.frozen if (f.tensor, f.axis) == (name, axis))

    # what can be done with it; each is described where it is defined

    def identity(self) -> Permutations:
        """See :func:`weft.symmetry.permutations.identity`."""
        from weft.symmetry.permutations import identity

        return identity(self)

    def random(self, generator: Generator, groups: tuple[str, ...] | None = None) -> Permutations:
        """See :func:`weft.symmetry.permutations.random`."""
        from weft.symmetry.permutations import random

        return random(self, generator, groups)

    def invert(self, permutations: Permutations) -> Permutations:
        """See :func:`weft.symmetry.permutations.invert`."""
        from weft.symmetry.permutations import invert

        return invert(self, permutations)

    def compose(self, first: Permutations, then: Permutations) -> Permutations:
        """See :func:`weft.symmetry.permutations.compose`."""
        from weft.symmetry.permutations import compose

        return compose(self, first, then)

    def apply(self, state: Any, permutations: Permutations) -> Any:
        """See :func:`weft.symmetry.apply.apply`."""
        from weft.symmetry.apply import apply

        return apply(self, state, permutations)

    def cut(self, group: str, keep: Any) -> tuple[Cut, ...]:
        """See :func:`weft.symmetry.apply.cut`."""
        from weft.symmetry.apply import cut

        return cut(self, group, keep)

    # JSON

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; :meth:`from_dict` reads them."""
        return asdict(self)

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Symmetry:
        """What :meth:`to_dict` gave.

        Raises:
            RecipeError: it is something else.
        """
        try:
            groups = tuple(
                Group(
                    g["name"], g["kind"], g["size"],
                    tuple(
                        Member(m["tensor"], m["axis"], m["start"], m["stride"], tuple(Loop(**loop) for loop in m["loops"]))
                        for m in g["members"]
                    ),
                    tuple(g["within"]),
                )
                for g in value["groups"]
            )  # fmt: skip
            return cls(
                groups,
                tuple(Frozen(**f) for f in value["frozen"]),
                tuple((str(name), int(n)) for name, n in value["unknown"]),
                {str(name): tuple(shape) for name, shape in value["shapes"].items()},
                dict(value["aliases"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise RecipeError(f"This is not a symmetry as weft writes it ({type(error).__name__}: {error}).") from None

    @classmethod
    def from_json(cls, text: str) -> Symmetry:
        """What :meth:`to_json` gave."""
        try:
            value = json.loads(text)
        except ValueError as error:
            raise RecipeError(f"This is not JSON ({error}).") from None
        return cls.from_dict(value)
