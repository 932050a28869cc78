"""A server with the hub's layout: the facts of a dataset, its tree, files by ranges behind a redirect. Any of it can fail."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40
Answer = Callable[[BaseHTTPRequestHandler], bool]  # returns whether it has answered


class HubServer(ThreadingHTTPServer):
    """Serves `repos`, folders by name. `trouble` is asked first at every request for bytes of a file."""

    daemon_threads = True

    def __init__(self, repos: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos = repos
        self.trouble: Answer = lambda handler: False
        self.status_of_facts = 200
        self.commit = COMMIT  # of the branch
        self.requests: Counter[str] = Counter()
        self.tokens: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving(repos: dict[str, Path]) -> Iterator[HubServer]:
    """Run a server in a thread."""
    server = HubServer(repos)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def times(count: int, answer: Callable[[BaseHTTPRequestHandler], None]) -> Answer:
    """Answer the first `count` requests for bytes in another way."""
    left = [count]

    def trouble(handler: BaseHTTPRequestHandler) -> bool:
        if not left[0]:
            return False
        left[0] -= 1
        answer(handler)
        return True

    return trouble


def status(code: int, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    """Answer with a status and no content."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in {"Content-Length": "0", **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()

    return answer


def cut(handler: BaseHTTPRequestHandler) -> None:
    """Promise more bytes than are sent, and end the connection."""
    handler.send_response(206)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.wfile.write(b"torn")
    handler.close_connection = True


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.tokens.add(self.headers.get("Authorization", ""))
        for repo, folder in self.server.repos.items():
            if path.startswith(f"/api/datasets/{repo}"):
                self.server.requests["api"] += 1
                if self.server.status_of_facts != 200:
                    code = "GatedRepo" if self.server.status_of_facts == 403 else "RepoNotFound"
                    return status(self.server.status_of_facts, X_Error_Code=code)(self)
                rest = path.removeprefix(f"/api/datasets/{repo}")
                tree = self._tree(folder)
                sha = rest.removeprefix("/revision/") if rest.endswith(COMMIT) else self.server.commit
                siblings = [{"rfilename": entry["path"]} for entry in tree]
                return self._json(tree if rest.startswith("/tree/") else {"id": repo, "sha": sha, "siblings": siblings})
            if path.startswith(f"/datasets/{repo}/resolve/"):
                self.server.requests["resolve"] += 1
                commit, name = path.removeprefix(f"/datasets/{repo}/resolve/").split("/", 1)
                file = folder / name
                facts = {"X_Repo_Commit": commit, "X_Linked_Etag": f'"{_oid(file)}"', "X_Linked_Size": str(file.stat().st_size)}
                # another host than that of the redirect, as with the hub: the token may not follow
                return status(302, Location=f"http://localhost:{self.server.server_address[1]}/cdn/{repo}/{name}", **facts)(self)
            if path.startswith(f"/cdn/{repo}/"):
                self.server.requests["bytes"] += 1
                if not self.server.trouble(self):
                    self._bytes(folder / path.removeprefix(f"/cdn/{repo}/"))
                return None
        return status(404, X_Error_Code="RepoNotFound")(self)

    def _json(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _tree(self, folder: Path) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": file.relative_to(folder).as_posix(), "size": file.stat().st_size, "oid": _oid(file)}
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        ]

    def _bytes(self, file: Path) -> None:
        data = chunk = file.read_bytes()
        if wanted := self.headers.get("Range"):
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            chunk = data[int(start) : int(end or len(data)) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{int(start) + len(chunk) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(chunk)))
        self.end_headers()
        self.wfile.write(chunk)


def _oid(file: Path) -> str:
    return sha1(file.read_bytes()).hexdigest()
