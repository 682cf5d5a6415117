"""A small local Hub that stores pushes: the part of the Hub's HTTP interface that our tests use.

    with HubServer(folder, users={"hf_token": "user"}) as hub:
        ...  # a process with HF_ENDPOINT=hub.url and HF_HUB_DISABLE_XET=1 pushes to it and loads from it

It has no Xet storage, which clients with hf_xet use by default: hence HF_HUB_DISABLE_XET.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import transformers.utils.hub
from huggingface_hub import constants

LFS_SUFFIXES, LFS_BYTES = (".safetensors", ".png"), 1_000_000  # such files are uploaded before the commit
API = r"/api/(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"
PAGE = r"/((?P<kind>datasets|spaces)/)?(?P<name>[^/]+/[^/]+)"
REVISION, PATH = r"(?P<revision>[^/]+)", r"(?P<path>.+)"
# Method of the handler: HTTP method and path.
ROUTES = {
    "whoami": ("GET", "/api/whoami-v2"),
    "validate": ("POST", "/api/validate-yaml"),
    "create": ("POST", "/api/repos/create"),
    "branch": ("POST", f"{API}/branch/{REVISION}"),
    "preupload": ("POST", f"{API}/preupload/{REVISION}"),
    "batch": ("POST", rf"{PAGE}\.git/info/lfs/objects/batch"),
    "upload": ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})"),
    "commit": ("POST", f"{API}/commit/{REVISION}"),
    "info": ("GET", f"{API}(/revision/{REVISION})?"),
    "tree": ("GET", f"{API}/tree/{REVISION}(/{PATH})?"),
    "resolve": ("GET", f"{PAGE}/resolve/{REVISION}/{PATH}"),
}


@dataclass
class Repo:
    """Branch -> revision, and revision -> path -> hash: git's of a regular file, sha256 of an LFS file."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    revisions: dict[str, dict[str, str]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, str], message: str) -> str:
        """Make a revision; as in git its name depends on its files, its parent and its message."""
        content = json.dumps([sorted(files.items()), self.branches.get(branch), message])
        revision = hashlib.sha1(content.encode()).hexdigest()
        self.revisions[revision], self.branches[branch] = files, revision
        return revision


class Refusal(Exception):
    """An error response: status, message and, if the client reads it, the Hub's error code."""


class HubServer(ThreadingHTTPServer):
    """A context manager that runs the server in a thread.

    Args:
        folder: Folder for the contents, one file each, named by its hash.
        users: User name by token; a user may write to the repositories of that name.
    """

    def __init__(self, folder: Path, users: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.users, self.url = folder, users, f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[str] = []
        self.break_commit = False  # drop the connection in the middle of the next commit
        folder.mkdir(parents=True)

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def files(self, name: str, kind: str = "models", revision: str = "main") -> dict[str, bytes]:
        """Contents of a revision by path."""
        repo = self.repos[kind, name]
        files = repo.revisions[repo.branches.get(revision, revision)]
        return {path: (self.folder / oid).read_bytes() for path, oid in files.items()}

    @contextmanager
    def used_here(self) -> Iterator[pytest.MonkeyPatch]:
        """Let this process, which is offline otherwise, load from the server and push to it."""
        settings = {"ENDPOINT": self.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        settings["HUGGINGFACE_CO_URL_TEMPLATE"] = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        with pytest.MonkeyPatch.context() as patch:
            for name, value in settings.items():
                patch.setattr(constants, name, value)
            patch.setattr(transformers.utils.hub, "_hf_api", None)  # it remembers an endpoint
            yield patch

    def store(self, content: bytes, lfs: bool = False) -> str:
        oid = hashlib.sha256(content) if lfs else hashlib.sha1(b"blob %d\0%b" % (len(content), content))
        (self.folder / oid.hexdigest()).write_bytes(content)
        return oid.hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request. Each method in `ROUTES` returns the JSON of the answer, or None if it has sent one."""

    server: HubServer
    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        path, _, self.query = self.path.partition("?")
        length = int(self.headers.get("Content-Length") or 0)
        if self.server.break_commit and "/commit/" in path:
            self.server.break_commit, self.close_connection = False, True
            self.rfile.read(length // 2)
            return
        self.body = self.rfile.read(length)
        try:
            answer = self.call(path, "GET" if self.command == "HEAD" else self.command)
            if answer is not None:
                self.answer(200, json.dumps(answer).encode())
        except Refusal as refusal:
            status, message, *code = refusal.args
            headers = {"X-Error-Message": message, **({"X-Error-Code": code[0]} if code else {})}
            self.answer(status, json.dumps({"error": message}).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def call(self, path: str, method: str) -> Any:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.server.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        self.user = self.server.users.get(token)
        for name, (route_method, pattern) in ROUTES.items():
            if method == route_method and (found := re.fullmatch(pattern, path)):
                groups = {key: value and unquote(value) for key, value in found.groupdict().items()}
                return getattr(self, name)(**groups)
        raise Refusal(404, f"There is no {method} {path}")

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Print nothing; `requests` lists the requests."""

    def check_owner(self, owner: str) -> None:
        if self.user != owner:
            raise Refusal(403 if self.user else 401, f"You don't have the rights to write to {owner}")

    def find(self, kind: str | None, name: str, revision: str | None = None, write: bool = False) -> tuple:
        """The repository, the hash of the revision and its files."""
        repo, owner = self.server.repos.get((kind or "models", name)), name.split("/")[0]
        if write:
            self.check_owner(owner)
        if repo is None or (repo.private and self.user != owner):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        revision = repo.branches.get(revision or "main", revision)
        if revision not in repo.revisions:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, revision, repo.revisions[revision]

    def whoami(self) -> dict:
        self.check_owner(self.user or "anybody")
        return {"type": "user", "name": self.user, "orgs": []}

    def validate(self) -> dict:
        return {"errors": [], "warnings": []}

    def create(self) -> dict | None:
        asked = json.loads(self.body)
        owner, kind = asked.get("organization") or self.user, asked.get("type", "model") + "s"
        self.check_owner(owner)
        name = f"{owner}/{asked['name']}"
        answer = {"url": f"{self.server.url}/{'' if kind == 'models' else kind + '/'}{name}"}
        if (kind, name) in self.server.repos:
            return self.answer(409, json.dumps(answer).encode())
        self.server.repos[kind, name] = repo = Repo(asked.get("visibility") == "private")
        repo.commit("main", {".gitattributes": self.server.store(b"*.safetensors filter=lfs\n")}, "initial commit")
        return answer

    def branch(self, kind: str, name: str, revision: str) -> dict | None:
        branches = self.find(kind, name, write=True)[0].branches
        if revision in branches:
            return self.answer(409, b"{}")
        branches[revision] = branches["main"]
        return {}

    def preupload(self, kind: str, name: str, revision: str) -> dict:
        old = self.find(kind, name, revision, write=True)[2]
        files = json.loads(self.body)["files"]
        for file in files:
            lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_BYTES
            mode = "lfs" if lfs else "regular"
            file |= {"uploadMode": mode, "shouldIgnore": False, "oid": old.get(file["path"])}
        return {"files": files}

    def batch(self, kind: str | None, name: str) -> dict:
        self.find(kind, name, write=True)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if not (self.server.folder / item["oid"]).exists():
                item["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def upload(self, oid: str) -> dict:
        if self.server.store(self.body, lfs=True) != oid:
            raise Refusal(400, "The content does not have this hash")
        return {}

    def commit(self, kind: str, name: str, revision: str) -> dict:
        repo, _, old = self.find(kind, name, revision, write=True)
        header, *operations = map(json.loads, self.body.splitlines())
        files = dict(old)
        for key, value in ((operation["key"], operation["value"]) for operation in operations):
            if key == "deletedFile":
                del files[value["path"]]
            elif key == "file":
                files[value["path"]] = self.server.store(base64.b64decode(value["content"]))
            elif key == "lfsFile" and (self.server.folder / value["oid"]).exists():
                files[value["path"]] = value["oid"]
            else:
                raise Refusal(400, f"{value['path']} was not uploaded")
        oid = repo.commit(revision, files, header["value"]["summary"])
        return {"commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"}

    def info(self, kind: str, name: str, revision: str | None) -> dict:
        repo, revision, files = self.find(kind, name, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        return {"id": name, "sha": revision, "private": repo.private, "tags": [], "siblings": siblings}

    def tree(self, kind: str, name: str, revision: str, path: str | None) -> list[dict]:
        files, prefix = self.find(kind, name, revision)[2], f"{path}/" if path else ""
        inside = {path: oid for path, oid in files.items() if path.startswith(prefix)}
        if not inside:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        deep = "recursive=true" in self.query.lower()
        folders = {path.rpartition("/")[0] for path in inside if "/" in path[len(prefix) :]}
        return [{"type": "directory", "path": folder, "oid": ""} for folder in folders] + [
            {"type": "file", "path": path, "oid": oid, "size": (self.server.folder / oid).stat().st_size}
            for path, oid in inside.items()
            if deep or "/" not in path[len(prefix) :]
        ]

    def resolve(self, kind: str | None, name: str, revision: str, path: str) -> None:
        _, revision, files = self.find(kind, name, revision)
        headers, status = {"X-Repo-Commit": revision, "Accept-Ranges": "bytes"}, 200
        if path not in files:
            return self.answer(404, b"", {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": path})
        content, headers["ETag"] = (self.server.folder / files[path]).read_bytes(), f'"{files[path]}"'
        if len(files[path]) == 64:
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": headers["ETag"]}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end, size = int(wanted[1]), int(wanted[2] or len(content)) + 1, len(content)
            content, status = content[start:end], 206
            headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{size}"
        return self.answer(status, content, headers)
