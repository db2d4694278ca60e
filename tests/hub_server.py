"""A Hub on the loopback: the part of its protocol that uploads and downloads speak, over plain HTTP.

Repositories, preupload, the LFS batch, uploads of blobs, commits and downloads; no Xet storage. It keeps
what it is told in memory, so a test can see what arrived and when.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WRITER, READER = "hf_writer_of_the_tests", "hf_reader_of_the_tests"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server holds."""

    repos: dict[str, dict[str, Any]] = field(default_factory=dict)  # id -> private, files
    blobs: dict[str, bytes] = field(default_factory=dict)  # sha256 -> content
    uploads: list[str] = field(default_factory=list)  # blobs, in the order that they arrived
    commits: int = 0
    drop: str = ""  # the blob whose uploads break off in the middle
    pause: float = 0.0  # seconds that it thinks before it takes a blob or a commit
    seen: list[str] = field(default_factory=list)  # authorization headers
    url: str = ""


@contextmanager
def serve() -> Iterator[Hub]:
    """A running hub."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _tree(files: dict[str, bytes]) -> list[dict[str, Any]]:
    return [
        {
            "type": "file",
            "path": path,
            "size": len(content),
            "oid": hashlib.sha1(content).hexdigest(),
        }
        for path, content in files.items()
    ]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                out = b""
                while size := int(self.rfile.readline(), 16):
                    out += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return out
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def reply(self, code: int, data: Any = None, **headers: str) -> None:
            raw = data if isinstance(data, bytes) else json.dumps(data or {}).encode()
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(raw)))
            with suppress(ConnectionError):  # whoever asked was killed
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(raw)

        def token(self) -> str:
            given = self.headers.get("Authorization", "").removeprefix("Bearer ")
            hub.seen.append(given)
            return given

        def do_POST(self) -> None:
            raw, path = self.body(), self.path.split("?")[0]
            if path.startswith("/verify"):
                return self.reply(200)
            if self.token() != WRITER:
                return self.reply(403 if self.token() == READER else 401, {"error": "no right"})
            data = [json.loads(line) for line in raw.splitlines()]
            if path == "/api/repos/create":
                return self.create(data[0])
            if "/preupload/" in path:
                return self.preupload(data[0])
            if path.endswith("/info/lfs/objects/batch"):
                return self.batch(data[0])
            if "/commit/" in path:
                return self.commit(path.split("/api/models/")[1].split("/commit/")[0], data)
            return self.reply(200) if path == "/api/validate-yaml" else self.reply(404)

        def create(self, data: Any) -> None:
            name = f"{data.get('organization') or 'someone'}/{data['name']}"
            if name in hub.repos:
                return self.reply(409, {"error": "exists", "url": f"{hub.url}/{name}"})
            private = data.get("private") or data.get("visibility") == "private"
            hub.repos[name] = {"private": bool(private), "files": {}}
            return self.reply(200, {"url": f"{hub.url}/{name}"})

        def preupload(self, data: Any) -> None:
            large = (".safetensors", ".gguf")
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(large) else "regular",
                    "shouldIgnore": False,
                }
                for one in data["files"]
            ]
            self.reply(200, {"files": modes})

        def batch(self, data: Any) -> None:
            out = []
            for one in data["objects"]:
                answer = {"oid": one["oid"], "size": one["size"]}
                if one["oid"] not in hub.blobs:
                    answer["actions"] = {
                        "upload": {"href": f"{hub.url}/blob/{one['oid']}"},
                        "verify": {"href": f"{hub.url}/verify"},
                    }
                out.append(answer)
            self.reply(200, {"transfer": "basic", "objects": out})

        def do_PUT(self) -> None:
            name = self.path.rsplit("/", 1)[1]
            time.sleep(hub.pause)
            size = int(self.headers.get("Content-Length", 0))
            if name == hub.drop:
                self.rfile.read(size // 2)
                self.close_connection = True
                return self.connection.close()
            content = self.body()
            assert hashlib.sha256(content).hexdigest() == name
            hub.blobs[name] = content
            hub.uploads.append(name)
            return self.reply(200)

        def commit(self, repo: str, lines: list[Any]) -> None:
            files = hub.repos[repo]["files"]
            time.sleep(hub.pause)
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.blobs[value["oid"]]
            hub.commits += 1
            address = f"{hub.url}/{repo}/commit/{COMMIT}"
            self.reply(200, {"success": True, "commitOid": COMMIT, "commitUrl": address})

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            if self.path.startswith("/api/models/"):
                name = "/".join(self.path.split("?")[0].split("/")[3:5])
                tree = f"/api/models/{name}/tree/" in self.path
                repo = hub.repos.get(name)
                if repo is None or (repo["private"] and self.token() not in (WRITER, READER)):
                    return self.reply(404, {"error": "none"}, X_Error_Code="RepoNotFound")
                if tree:
                    return self.reply(200, _tree(repo["files"]))
                names = [{"rfilename": path} for path in repo["files"]]
                data = {"id": name, "private": repo["private"], "sha": COMMIT, "siblings": names}
                return self.reply(200, data)
            owner, name, _, _, *rest = self.path.split("?")[0].strip("/").split("/")
            content = hub.repos[f"{owner}/{name}"]["files"]["/".join(rest)]
            tag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self.reply(200, content, ETag=tag, X_Repo_Commit=COMMIT)

    return Handler
