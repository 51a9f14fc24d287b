"""
A Hub on the loopback interface, as much of it as a model's way there and back takes: repositories, branches, commits,
large files, downloads, and the ways in which they fail. It speaks to the real `huggingface_hub` client.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


WRITER, READER, STRANGER = "hf_writer", "hf_reader", "hf_nobody"
USERS = {WRITER: "user", READER: "user"}


@dataclass
class Repository:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    # By commit: what it holds (path -> SHA-256 of the content) and what it says.
    trees: dict[str, dict[str, str]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, tree: dict[str, str], message: str) -> str:
        content = json.dumps([tree, message, self.branches.get(branch), len(self.messages)])
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.trees[oid], self.branches[branch] = tree, oid
        self.messages.append(message)
        return oid


class LoopbackHub:
    """
    Serves until the `with` block ends.

    Attributes:
        repositories (`dict[str, Repository]`): By their full name.
        faults (`dict[str, str]`): For a repository, what goes wrong: `"quota"`, `"too large"`, `"cut"` (every upload
            breaks off half-way), `"cut once"` (the first one does).
        requests (`list[str]`): Methods and paths so far.
    """

    def __enter__(self) -> "LoopbackHub":
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: dict[str, str] = {}
        self.requests: list[str] = []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str = WRITER) -> dict[str, str]:
        """What makes a fresh process take this for the Hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": token,
            "HF_HUB_OFFLINE": "0",
            # Only this protocol is spoken here.
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "20",
            "HF_HUB_ETAG_TIMEOUT": "20",
            "NO_PROXY": "127.0.0.1",
            "HTTP_PROXY": "",
            "HTTPS_PROXY": "",
            "ALL_PROXY": "",
        }

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """What a branch holds."""
        repository = self.repositories[repo_id]
        tree = repository.trees[repository.branches[branch]]
        return {path: self.blobs[digest] for path, digest in tree.items()}

    def keep(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        self.blobs[digest] = content
        return digest


class _Failure(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".pt", ".png"))


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    timeout = 30

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self):
        path = urlsplit(self.path).path
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
        try:
            for pattern, method in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match:
                    method(self, *(unquote(group) for group in match.groups()))
                    return
            self._body()
            raise _Failure(404, "There is nothing here.", "EntryNotFound")
        except _Failure as failure:
            headers = {"X-Error-Message": failure.message}
            if failure.code:
                headers["X-Error-Code"] = failure.code
            self._send(json.dumps({"error": failure.message}).encode(), failure.status, headers)

    def _send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, content: Any, status: int = 200):
        self._send(json.dumps(content).encode(), status)

    def _body(self, limit: int | None = None) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("Content-Length") or 0)
        return self.rfile.read(length if limit is None else min(limit, length))

    # ---- who may do what ----

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise _Failure(401, "Invalid credentials in Authorization header")
        return USERS.get(token)

    def _may_write(self):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in USERS:
            raise _Failure(401, "Invalid credentials in Authorization header")
        if token == READER:
            raise _Failure(403, "Your token has read access only")

    def _repository(self, repo_id: str) -> Repository:
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and self._user() is None):
            raise _Failure(401 if self._user() is None else 404, "Repository not found", "RepoNotFound")
        return repository

    def _commit_of(self, repo_id: str, revision: str) -> tuple[str, dict[str, str]]:
        repository = self._repository(repo_id)
        oid = repository.branches.get(revision, revision)
        if oid not in repository.trees:
            raise _Failure(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repository.trees[oid]

    # ---- the API ----

    def whoami(self):
        user = self._user()
        if user is None:
            raise _Failure(401, "Invalid username or password.")
        self._json({"name": user, "type": "user", "auth": {"accessToken": {"role": "write"}}, "orgs": []})

    def create(self):
        wanted = json.loads(self._body())
        self._may_write()
        repo_id = f"{wanted.get('organization') or self._user()}/{wanted['name']}"
        if not repo_id.startswith("user/"):
            raise _Failure(403, f"You don't have the rights to create a model under the namespace {repo_id}")
        exists = repo_id in self.hub.repositories
        if not exists:
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            repository = self.hub.repositories[repo_id] = Repository(private)
            repository.commit("main", {".gitattributes": self.hub.keep(b"*.safetensors lfs\n")}, "initial commit")
        self._json({"url": f"{self.hub.url}/{repo_id}", "id": repo_id, "error": "exists"}, 409 if exists else 200)

    def create_branch(self, repo_id: str, branch: str):
        self._body()
        self._may_write()
        repository = self._repository(repo_id)
        if branch in repository.branches:
            raise _Failure(409, "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        self._json({"success": True})

    def validate_yaml(self):
        text = json.loads(self._body())["content"]
        match = re.match(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))", text)
        try:
            content = yaml.safe_load(match.group(2)) if match else {}
            if not isinstance(content, dict):
                raise ValueError("not a mapping")
        except (yaml.YAMLError, ValueError) as error:
            self._json({"errors": [{"message": f"Invalid YAML: {error}"}], "warnings": []}, 400)
            return
        self._json({"errors": [], "warnings": []})

    def preupload(self, repo_id: str, revision: str):
        wanted = json.loads(self._body())
        self._may_write()
        if self.hub.faults.get(repo_id) == "quota":
            raise _Failure(403, "Private repository storage limit reached, please upgrade your plan")
        _, tree = self._commit_of(repo_id, revision)
        answers = []
        for file in wanted["files"]:
            path = file["path"]
            digest = tree.get(path)
            oid = digest if digest is None or _is_large(path) else _git_oid(self.hub.blobs[digest])
            mode = "lfs" if _is_large(path) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def lfs_batch(self, repo_id: str):
        wanted = json.loads(self._body())
        self._may_write()
        if self.hub.faults.get(repo_id) == "too large":
            raise _Failure(413, "Request entity too large")
        objects = []
        for item in wanted["objects"]:
            answer = dict(item)
            if item["oid"] not in self.hub.blobs or repo_id in self.hub.faults:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{repo_id}/{item['oid']}"}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, repo_id: str, oid: str):
        fault = self.hub.faults.get(repo_id)
        if fault in ("cut", "cut once"):
            if fault == "cut once":
                del self.hub.faults[repo_id]
            self._body(limit=int(self.headers.get("Content-Length") or 2048) // 2)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        content = self._body()
        if hashlib.sha256(content).hexdigest() != oid:
            raise _Failure(400, "The content is not what was announced")
        self.hub.blobs[oid] = content
        self._send(b"")

    def commit(self, repo_id: str, branch: str):
        lines = [json.loads(line) for line in self._body().splitlines() if line]
        self._may_write()
        _, tree = self._commit_of(repo_id, branch)
        tree, message = dict(tree), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                tree[value["path"]] = self.hub.keep(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise _Failure(400, f"LFS object {value['oid']} was never uploaded")
                tree[value["path"]] = value["oid"]
            elif line["key"] == "deletedFile":
                del tree[value["path"]]
            elif line["key"] == "deletedFolder":
                tree = {path: oid for path, oid in tree.items() if not path.startswith(value["path"])}
        with self.hub.lock:
            oid = self._repository(repo_id).commit(branch, tree, message)
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}"})

    def info(self, repo_id: str, revision: str = "main"):
        oid, tree = self._commit_of(repo_id, revision)
        repository = self.hub.repositories[repo_id]
        self._json(
            {
                "_id": "0",
                "id": repo_id,
                "modelId": repo_id,
                "sha": oid,
                "private": repository.private,
                "disabled": False,
                "gated": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": [{"rfilename": path} for path in tree],
                "cardData": self._card_data(tree),
            }
        )

    def _card_data(self, tree: dict[str, str]) -> dict[str, Any]:
        text = self.hub.blobs[tree["README.md"]].decode() if "README.md" in tree else ""
        match = re.match(r"\A---\n(.*?)\n---\n", text, re.DOTALL)
        return yaml.safe_load(match.group(1)) if match else {}

    def refs(self, repo_id: str):
        branches = self._repository(repo_id).branches
        listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in branches.items()]
        self._json({"branches": listed, "tags": [], "converts": []})

    def tree(self, repo_id: str, revision: str):
        _, tree = self._commit_of(repo_id, revision)
        entries = []
        for path, digest in sorted(tree.items()):
            content = self.hub.blobs[digest]
            entry = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
            if _is_large(path):
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self._json(entries)

    def resolve(self, repo_id: str, revision: str, path: str):
        oid, tree = self._commit_of(repo_id, revision)
        if path not in tree:
            raise _Failure(404, "Entry not found", "EntryNotFound")
        content = self.hub.blobs[tree[path]]
        etag = tree[path] if _is_large(path) else _git_oid(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        if _is_large(path):
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start:
            first = int(start.group(1))
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            self._send(content[first:], 206, headers)
            return
        headers["Content-Length"] = str(len(content))
        self._send(content, 200, headers)


_REPO = r"([^/]+/[^/]+)"
_ROUTES = [
    (r"/api/whoami-v2", _Handler.whoami),
    (r"/api/repos/create", _Handler.create),
    (r"/api/validate-yaml", _Handler.validate_yaml),
    (rf"/api/models/{_REPO}/branch/([^/]+)", _Handler.create_branch),
    (rf"/api/models/{_REPO}/preupload/([^/]+)", _Handler.preupload),
    (rf"/api/models/{_REPO}/commit/([^/]+)", _Handler.commit),
    (rf"/api/models/{_REPO}/revision/([^/]+)", _Handler.info),
    (rf"/api/models/{_REPO}/refs", _Handler.refs),
    (rf"/api/models/{_REPO}/tree/([^/]+)", _Handler.tree),
    (rf"/api/models/{_REPO}", _Handler.info),
    (rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (rf"/lfs/{_REPO}/([0-9a-f]+)", _Handler.lfs_upload),
    (rf"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
