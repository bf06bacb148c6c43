"""A small server that answers as the Hugging Face Hub does, and misbehaves on request."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def host_of(request: BaseHTTPRequestHandler) -> str:
    """The name by which this machine was called."""
    return str(request.headers["Host"]).split(":")[0]


@dataclass
class Hub:
    """Repositories by name, each a map from file names to contents, and the requests that were made."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range
    tokens: dict[str, set[str]] = field(default_factory=dict)  # by the host that was sent them
    trouble: Callable[[str, str], str] = lambda path, range_: ""  # "", "503", "cut", "whole", "shifted", "moved"
    url: str = ""

    def ranges(self) -> list[str]:
        """The ranges that were asked for."""
        return [r for method, _, r in self.requests if method == "GET" and r]

    def start(self) -> Callable[[], None]:
        """Listen on a free port of this machine; what stops it."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer(False)

            def do_GET(self) -> None:
                self._answer(True)

            def log_message(self, *arguments: object) -> None:
                pass

            def _answer(self, with_body: bool) -> None:
                wanted = self.headers.get("Range", "")
                hub.requests.append((self.command, self.path, wanted))
                hub.tokens.setdefault(host_of(self), set()).add(self.headers.get("Authorization", ""))
                listing = re.fullmatch(r"/api/models/([^/]+/[^/?]+)(?:/revision/([^?]+))?(?:\?.*)?", self.path)
                content = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)(?:\?.*)?", self.path)
                match = listing or content
                if match is None:
                    return self._send(404, b"")
                files, revision = hub.repositories.get(match[1]), match[2]
                if files is None:
                    return self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
                if match[1] in hub.gated and content:
                    return self._send(403, b"", {"X-Error-Code": "GatedRepo"})
                if revision not in (None, "main", "v1", COMMIT):
                    return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
                if listing:
                    siblings = [{"rfilename": name} for name in files]
                    body = json.dumps({"id": match[1], "sha": COMMIT, "siblings": siblings}).encode()
                    return self._send(200, body, {"Content-Type": "application/json"})
                if match[3] not in files:
                    return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return self._file(files[match[3]], wanted, with_body)

            def _file(self, data: bytes, wanted: str, with_body: bool) -> None:
                headers = {
                    "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
                    "X-Repo-Commit": COMMIT,
                    "Accept-Ranges": "bytes",
                }
                trouble = hub.trouble(self.path, wanted) if with_body else ""
                if trouble == "503":
                    return self._send(503, b"")
                if trouble == "moved" and host_of(self) == "127.0.0.1":
                    elsewhere = f"{hub.url.replace('127.0.0.1', 'localhost')}{self.path}?signed=1"
                    return self._send(302, b"", {"Location": elsewhere})
                span = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
                if span is None or trouble == "whole":
                    return self._send(200, data, headers, with_body)
                first, last = int(span[1]), min(int(span[2]), len(data) - 1)
                named = first + 1 if trouble == "shifted" else first
                headers["Content-Range"] = f"bytes {named}-{last}/{len(data)}"
                body = data[first : last + 1]
                return self._send(206, body, headers, with_body, cut=len(body) // 2 if trouble == "cut" else None)

            def _send(
                self,
                status: int,
                body: bytes,
                headers: dict[str, str] | None = None,
                with_body: bool = True,
                cut: int | None = None,
            ) -> None:
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if with_body:
                    self.wfile.write(body if cut is None else body[:cut])
                if cut is not None:
                    self.wfile.flush()
                    self.close_connection = True

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}"

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return stop
