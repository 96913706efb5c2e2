"""A Hub on the loopback address: it serves local folders, takes uploads, and can refuse or fail."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


@dataclass
class Hub:
    """What the Hub holds, and how it behaves; may be changed while it answers."""

    repos: dict[str, dict[str, Path]] = field(default_factory=dict)
    """Repository (``ORG/NAME``, or ``datasets/ORG/NAME``) -> commit -> folder with its files."""
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    """Repository -> branch or tag -> commit."""
    gated: set[str] = field(default_factory=set)
    token: str = "hf_loopback"
    """Who uploads shows this one."""
    home: Path = Path()
    """Where uploads are kept."""
    read_only: set[str] = field(default_factory=set)
    """Organisations in which the token may not write."""
    breaks_off: str = ""
    """Files with this in their name are sent by half."""
    seen: list[str] = field(default_factory=list)
    """The requests, in order."""
    url: str = ""

    def add(self, repo: str, folder: Path, commit: str = "a" * 40, ref: str = "main") -> None:
        """Put a folder into the Hub as a commit that a branch or tag points to."""
        self.repos.setdefault(repo, {})[commit] = folder
        self.refs.setdefault(repo, {})[ref] = commit

    def use(self, patch: pytest.MonkeyPatch, home: Path) -> None:
        """Let this be the Hub, here and in processes started from here; it is kept in ``home``."""
        from huggingface_hub import constants

        self.home = home
        places = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        for key, value in places.items():
            patch.setenv(key, value)
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        template = f"{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for key, value in {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": str(home / "token"),
        }.items():
            patch.setattr(constants, key, value)

    def answer(self, path: str) -> tuple[int, bytes, Mapping[str, str]]:
        """Return status, body and headers of the answer to a request."""
        path = path.partition("?")[0]
        api = path.startswith("/api/")
        name = path.removeprefix("/api").removeprefix("/models").lstrip("/")
        repo = next((r for r in self.repos if name == r or name.startswith(f"{r}/")), None)
        if repo is None:
            return 401, b"{}", {"X-Error-Code": "RepoNotFound"}
        if repo in self.gated and not api:
            return 403, b"{}", {"X-Error-Code": "GatedRepo"}
        what, _, rest = name.removeprefix(repo).lstrip("/").partition("/")
        ref, _, file = rest.partition("/")
        commit = self.refs[repo].get(ref or "main", ref)
        if commit not in self.repos[repo]:
            return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
        folder, headers = self.repos[repo][commit], {"X-Repo-Commit": commit}
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        if not api:
            if file not in files:
                return 404, b"", {**headers, "X-Error-Code": "EntryNotFound"}
            data = (folder / file).read_bytes()
            return 200, data, {**headers, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        if what == "tree":
            listed = [name for name in files if name.startswith(f"{file}/" if file else "")]
            sizes = {name: (folder / name).stat().st_size for name in listed}
            rows = [
                {"type": "file", "path": name, "size": size, "oid": "0" * 40}
                for name, size in sizes.items()
            ]
            return 200, json.dumps(rows).encode(), headers
        row = {"id": repo.removeprefix("datasets/"), "sha": commit, "private": False, "tags": []}
        row |= {"siblings": [{"rfilename": file} for file in files], "gated": False}
        row["cardData"] = {"license": "mit"}
        return 200, json.dumps(row).encode(), headers

    def take(self, path: str, token: str, body: bytes) -> tuple[int, bytes]:
        """Return status and body of the answer to what an upload sends."""
        if path == "/api/validate-yaml":
            return 200, b"{}"
        if token != f"Bearer {self.token}":
            return 401, b'{"error": "Invalid username or password."}'
        if path == "/api/repos/create":
            asked = json.loads(body)
            kind = "datasets/" if asked.get("type") == "dataset" else ""
            repo = f"{kind}{asked['organization'] or 'me'}/{asked['name']}"
            if asked["organization"] in self.read_only:
                return 403, b'{"error": "You don\'t have the rights to create a model here"}'
            if repo not in self.repos:
                folder = self.home / "uploads" / repo
                folder.mkdir(parents=True)
                self.add(repo, folder, "0" * 40)
            return 200, json.dumps({"url": f"{self.url}/{repo}"}).encode()
        repo, _, what = (
            path.removeprefix("/api/")
            .removeprefix("models/")
            .rpartition("/main")[0]
            .rpartition("/")
        )
        if what == "preupload":
            files = [{**each, "uploadMode": "regular"} for each in json.loads(body)["files"]]
            return 200, json.dumps(
                {"files": [{**f, "shouldIgnore": False} for f in files]}
            ).encode()
        assert what == "commit", path
        lines = [json.loads(line) for line in body.splitlines()]
        folder = self.repos[repo][self.refs[repo]["main"]]
        for file in [line["value"] for line in lines if line["key"] == "file"]:
            (folder / file["path"]).parent.mkdir(parents=True, exist_ok=True)
            (folder / file["path"]).write_bytes(base64.b64decode(file["content"]))
        commit = hashlib.sha1(body).hexdigest()
        self.add(repo, folder, commit)
        url = f"{self.url}/{repo}/commit/{commit}"
        return 200, json.dumps({"commitUrl": url, "commitOid": commit}).encode()


@contextmanager
def loopback_hub() -> Iterator[Hub]:
    """Yield a Hub that answers at its ``url``."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            hub.seen.append(f"{self.command} {self.path}")
            status, body, headers = hub.answer(self.path)
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if hub.breaks_off and hub.breaks_off in self.path:
                body, self.close_connection = body[: len(body) // 2], True
            self.wfile.write(body)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            hub.seen.append(f"{self.command} {self.path}")
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                raise NotImplementedError("chunks")
            sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.partition("?")[0]
            status, body = hub.take(path, self.headers.get("Authorization", ""), sent)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def down(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    """Let the Hub be out of reach."""
    patch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


def offline(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    """Forbid huggingface_hub the network."""
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
