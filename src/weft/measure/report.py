"""What reports share: a plain dictionary of themselves, and one loop over tensors in threads."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

import numpy as np

from weft.engine.chunks import ThreadWorkspaces, Workspace
from weft.engine.plan import default_threads
from weft.engine.progress import Progress

T = TypeVar("T")
R = TypeVar("R")


class Report:
    """A dataclass that turns into plain JSON types."""

    def to_dict(self) -> dict[str, Any]:
        """All fields as dicts, lists, strings and numbers; NaN and infinity become None, as JSON has neither."""
        result: dict[str, Any] = plain(self)
        return result


def plain(value: Any) -> Any:
    """``value`` in JSON's types.

    >>> plain({"a": (1.5, float("nan")), "b": float("-inf")})
    {'a': [1.5, None], 'b': None}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def ratio(numerator: float, denominator: float) -> float | None:
    """A quotient, or None where it has no finite value."""
    if not denominator or not math.isfinite(numerator) or not math.isfinite(denominator):
        return None
    return float(numerator / denominator)


def each(
    items: Sequence[T],
    work: Callable[[T, Workspace, Callable[[], bool]], R],
    weight: Callable[[T], tuple[str, int]],
    *,
    label: str,
    threads: int | None,
    progress: Progress | None,
) -> list[R]:
    """``work(item, workspace, stopped)`` for every item, the largest first; results in the order of ``items``.

    Args:
        items: what to work on.
        work: looks at ``stopped()`` from chunk to chunk, so that an error or Ctrl-C ends all threads soon.
        weight: name and bytes of an item, for the order and the progress report.
        label: what the progress report calls this.
        threads: worker threads; default: the cores, at most 8.
        progress: where to report.
    """
    progress = progress or Progress()
    stop = threading.Event()
    workspaces = ThreadWorkspaces()
    order = sorted(range(len(items)), key=lambda i: -weight(items[i])[1])
    progress.start(label, len(items), sum(weight(item)[1] for item in items))
    results: dict[int, R] = {}
    with ThreadPoolExecutor(threads or default_threads(), thread_name_prefix="weft") as pool:
        pending: dict[Future[R], int] = {
            pool.submit(lambda i: work(items[i], workspaces(), stop.is_set), i): i for i in order
        }
        try:
            for future in as_completed(pending):
                results[pending[future]] = future.result()
                progress.advance(*weight(items[pending[future]]))
        except BaseException:
            stop.set()
            for future in pending:
                future.cancel()
            raise
        finally:
            progress.finish()
    return [results[i] for i in range(len(items))]
