"""A file on the Hugging Face Hub as a source of bytes: only the ranges that are asked for are transferred."""

from __future__ import annotations

import re
import threading
import time
from typing import Any

from weft.errors import CheckpointError

BLOCK = (
    8 << 20
)  # bytes of one request: long enough that its latency does not matter, short enough to hold for each thread
HEAD = 128 << 10  # bytes of the first request: most headers fit
TIMEOUT = 30  # seconds without an answer
ATTEMPTS = 5  # at a transfer that breaks off; each goes on where the last one stopped


class LastBlock(threading.local):
    """The block that a thread read last, of any of a checkpoint's files."""

    def __init__(self) -> None:
        self.key: tuple[object, int] | None = None
        self.data = b""


class RemoteFile:
    """A file of a repository at a fixed commit, read with range requests.

    Reads shorter than a block are served from the block around them, which the thread keeps.
    """

    def __init__(self, url: str, name: str, headers: dict[str, str], last: LastBlock):
        self.name = name
        self._url = url
        self._headers = headers
        self._last = last
        self._closed = False
        self.size = -1
        self.head = self.fetch(0, HEAD)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """See :class:`weft.checkpoint.files.ByteSource`."""
        if offset + len(buffer) > self.size:
            raise CheckpointError(f"{self.name}: read beyond its end ({self.size:,} bytes).")
        if offset + len(buffer) <= len(self.head):
            buffer[:] = self.head[offset : offset + len(buffer)]
            return
        if len(buffer) >= BLOCK:
            buffer[:] = self.fetch(offset, offset + len(buffer))
            return
        done = 0
        while done < len(buffer):
            number, within = divmod(offset + done, BLOCK)
            if self._last.key != (self, number):
                self._last.key = None
                self._last.data = self.fetch(number * BLOCK, min((number + 1) * BLOCK, self.size))
                self._last.key = (self, number)
            piece = self._last.data[within : within + len(buffer) - done]
            buffer[done : done + len(piece)] = piece
            done += len(piece)

    def fetch(self, start: int, stop: int) -> bytes:
        """The bytes from ``start`` to ``stop``, or to the end of the file.

        Raises:
            CheckpointError: the transfer broke off too often, or the server does not send ranges.
        """
        if self._closed:
            raise CheckpointError(f"{self.name}: the checkpoint was closed.")
        if start >= stop:
            return b""
        data, trouble = bytearray(), ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(min(0.25 * 2**attempt, 4))
            try:
                trouble = self._transfer(data, start, stop)
            except CheckpointError:
                raise
            except (
                Exception
            ) as error:  # the library's, httpx's and the operating system's, all mean that it cannot be had
                raise explained(error, self.name) from None
            end = stop if self.size < 0 else min(stop, self.size)
            if not trouble and start + len(data) == end:
                return bytes(data)
        raise CheckpointError(
            f"{self.name}: the transfer from the Hub broke off {ATTEMPTS} times ({trouble or 'too few bytes'}). "
            "Check the connection and run the same command again."
        )

    def _transfer(self, data: bytearray, start: int, stop: int) -> str:
        """Append to ``data`` what one request brings; what went wrong."""
        import httpx
        from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff

        wanted = {**self._headers, "Range": f"bytes={start + len(data)}-{stop - 1}", "Accept-Encoding": "identity"}
        with http_stream_backoff("GET", self._url, headers=wanted, timeout=TIMEOUT) as response:
            hf_raise_for_status(response)
            self._check(response, start + len(data))
            # an error must not leave this block: http_stream_backoff takes it for its own and asks again
            try:
                for piece in response.iter_raw():
                    data += piece
                    if len(data) > stop - start:
                        return "the server sent more than was asked for"
            except httpx.TransportError as error:
                return str(error) or type(error).__name__
        return ""

    def _check(self, response: Any, start: int) -> None:
        """That the answer is the range asked for, of a file of the size known."""
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if response.status_code != 206 or found is None or int(found[1]) != start:
            raise CheckpointError(
                f"{self.name}: the server does not send parts of files (status {response.status_code}), so weights cannot be "
                "read in place. Download the repository with `hf download` and give the folder."
            )
        if self.size not in (-1, int(found[2])):
            raise CheckpointError(f"{self.name}: its size on the Hub changed while it was read.")
        self.size = int(found[2])

    def close(self) -> None:
        """See :class:`weft.checkpoint.files.ByteSource`."""
        self._closed = True
        self._last.key, self._last.data = None, b""


def explained(error: Exception, text: str) -> CheckpointError:
    """What an error of the Hub's library means to a user."""
    from huggingface_hub import errors

    detail = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    if isinstance(error, errors.GatedRepoError):
        fix = "the repository is gated: accept its terms on its page, then log in with `hf auth login` or set HF_TOKEN."
    elif isinstance(error, errors.RepositoryNotFoundError):
        fix = (
            "no such folder here, and the Hub has no such repository, or it is private. Check the spelling, or log in "
            "with `hf auth login`."
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        fix = "the repository has no such revision. Check the branch, tag or commit after the @."
    elif isinstance(error, errors.EntryNotFoundError):
        fix = "the repository has no such file."
    elif isinstance(error, errors.OfflineModeIsEnabled):
        fix = (
            "no such folder here, not complete in the local cache, and HF_HUB_OFFLINE is set. Unset it, or download "
            "the repository first."
        )
    else:
        fix = (
            f"the Hub cannot be asked, and the repository is not complete in the local cache ({detail}). "
            "Check the connection; if a local folder was meant, check its path."
        )
    return CheckpointError(f"{text}: {fix}")
