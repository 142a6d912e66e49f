"""A stand-in for the Hugging Face hub on this machine: what creating, uploading to and fetching a model ask of it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".pth")
"""Files that go by git-lfs, as the hub's own rules have it."""


@dataclass
class HubServer:
    """What the stand-in holds."""

    token: str
    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Name -> path -> content of the newest commit."""
    private: dict[str, bool] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    """SHA-256 -> content that was uploaded by git-lfs."""
    requests: list[str] = field(default_factory=list)

    def commit_of(self, name: str) -> str:
        """A commit's number is that of its contents."""
        files = self.repositories[name]
        return hashlib.sha1(repr(sorted((k, hashlib.sha1(v).digest()) for k, v in files.items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, content: Any, code: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, code: int, error: str, message: str) -> None:
        self._answer({"error": message}, code, X_Error_Code=error, X_Error_Message=message)

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {path}")
        if self.command == "PUT":  # a signed URL: without a token
            self.hub.blobs[path.rpartition("/")[2]] = body
            self._answer(b"", ETag=path.rpartition("/")[2])
        elif self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._refuse(401, "", "Invalid username or password.")
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            self._answer({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(\w+/[\w-]+)/(\w+)/[^/]+", path):
            self._about(match[1], match[2], body)
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body)["objects"])
        elif match := re.fullmatch(r"/(\w+/[\w-]+)/resolve/[^/]+/(.+)", path):
            self._resolve(match[1], match[2])
        else:
            self._refuse(404, "RepoNotFound", "Repository not found")

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        known = name in self.hub.repositories
        self.hub.repositories.setdefault(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.hub.private.setdefault(name, asked.get("visibility") == "private" or bool(asked.get("private")))
        self._answer({"url": f"{self.hub.url}/{name}", "name": name}, 409 if known else 200)

    def _about(self, name: str, what: str, body: bytes) -> None:
        if name not in self.hub.repositories:
            self._refuse(404, "RepoNotFound", "Repository not found")
            return
        files = self.hub.repositories[name]
        if what == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "lfs" if p.endswith(LARGE) else "regular"} for p in paths]
            self._answer({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        elif what == "commit":
            for line in body.splitlines():
                value = json.loads(line)["value"]
                if json.loads(line)["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif json.loads(line)["key"] == "lfsFile":
                    files[value["path"]] = self.hub.blobs[value["oid"]]
            commit = self.hub.commit_of(name)
            self._answer({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})
        elif what == "revision":
            siblings = [{"rfilename": path} for path in files]
            self._answer({"id": name, "modelId": name, "sha": self.hub.commit_of(name), "siblings": siblings})
        elif what == "tree":
            self._answer([self._entry(path, content) for path, content in files.items()])

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def _batch(self, objects: list[dict[str, Any]]) -> None:
        made = [{**o, "actions": {"upload": {"href": f"{self.hub.url}/blobs/{o['oid']}"}}} for o in objects]
        self._answer({"transfer": "basic", "objects": made})

    def _resolve(self, name: str, path: str) -> None:
        files = self.hub.repositories.get(name, {})
        if path not in files:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        digest = hashlib.sha256 if path.endswith(LARGE) else hashlib.sha1
        self._answer(files[path], ETag=f'"{digest(files[path]).hexdigest()}"', X_Repo_Commit=self.hub.commit_of(name))


@contextmanager
def hub_server(token: str) -> Iterator[HubServer]:
    """Serve a hub without repositories; only requests with this token are answered."""
    hub = HubServer(token)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
