"""A store for tests: a folder of buckets, served read-only in the language of S3."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

#: Keys of a page of a listing; few, so that small data sets have several pages.
PAGE = 5


class StoreServer(ThreadingHTTPServer):
    """Serves the folders in ``root`` as buckets.

    Attributes:
        root: folder of buckets.
        asked: method and path of every request.
        fails: answers to give instead, one status after another.
        known: the one access key that may read.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.asked: list[str] = []
        self.fails: list[int] = []
        self.known = "reader"

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serve(root: Path) -> Iterator[StoreServer]:
    """A server in a thread."""
    server = StoreServer(root)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    """GetObject with Range, HeadObject, ListObjectsV2; errors as S3 words them."""

    protocol_version = "HTTP/1.1"
    server: StoreServer

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        url = urlsplit(self.path)
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        self.server.asked.append(f"{self.command} {unquote(url.path)}")
        folder = self.server.root / bucket
        if self.server.fails:
            self._refuse(self.server.fails.pop(0), "InternalError")
        elif f"Credential={self.server.known}/" not in self.headers.get("Authorization", ""):
            self._refuse(403, "InvalidAccessKeyId")
        elif not folder.is_dir():
            self._refuse(404, "NoSuchBucket")
        elif query.get("list-type") == "2":
            self._list(folder, bucket, query)
        elif not (folder / key).is_file():
            self._refuse(404, "NoSuchKey")
        else:
            self._object((folder / key).read_bytes())

    def _object(self, content: bytes) -> None:
        status, headers = 200, {"Accept-Ranges": "bytes"}
        if span := self.headers.get("Range"):
            first, last = (int(text) for text in span.removeprefix("bytes=").split("-"))
            headers["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
            content, status = content[first : last + 1], 206
        self._send(status, content, headers)

    def _list(self, folder: Path, bucket: str, query: dict[str, str]) -> None:
        files = {
            path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()
        }
        keys = sorted(key for key in files if key.startswith(query.get("prefix", "")))
        keys = [key for key in keys if key > query.get("continuation-token", "")]
        page, more = keys[:PAGE], len(keys) > PAGE
        found = "".join(f"<Contents><Key>{escape(key)}</Key><Size>{files[key]}</Size></Contents>" for key in page)
        after = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        self._send(
            200,
            f"<ListBucketResult><Name>{bucket}</Name><KeyCount>{len(page)}</KeyCount>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{after}{found}</ListBucketResult>".encode(),
            {"Content-Type": "application/xml"},
        )

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode(), {})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
