"""Pages as files."""

from __future__ import annotations

import os
from pathlib import Path

from weft.errors import OutputError


def write_page(path: str | os.PathLike[str], text: str) -> Path:
    """Write a page under its name at once and whole; one that is there is replaced.

    Args:
        path: the file; its folder exists.
        text: the page, such as :func:`weft.view.evidence.report_page` gives.

    Returns:
        The path, with the user's folder written out.

    Raises:
        OutputError: it cannot be written.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> write_page(f"{folder}/page.html", "<!doctype html>").name
    'page.html'
    """
    path = Path(path).expanduser()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"{path}: the page cannot be written ({error.strerror}). Choose another place.") from None
    return path
