"""
A Hub on the loopback interface, with only the HTTP routes that `huggingface_hub` uses to push and to load a model.

Large files are uploaded through LFS (basic transfers), as on the Hub. Commits are atomic. Requests that match no route
get a 404 and are listed in `HubServer.unknown`.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


TOKEN = "hf_token_of_org"  # may write to repositories of `org`
LFS_SUFFIXES = (".safetensors", ".png")
ID = r"(?P<repo>[\w.-]+/[\w.-]+)"
SPACE = r"(?P<repo>spaces/[\w.-]+/[\w.-]+)"  # a Space is listed as "spaces/organization/name"


class Repository:
    """A list of commits, newest last: the sha and all files of each."""

    def __init__(self, private: bool):
        self.private = private
        self.commits: list[tuple[str, dict[str, bytes]]] = []
        self.commit({".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits.append((sha, files))
        return sha

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class HubServer(ThreadingHTTPServer):
    """
    Attributes:
        repositories (`dict[str, Repository]`): by id.
        fail_at (`str`, *optional*): `"upload"` refuses large files; `"commit"` closes the connection during a commit.
        requests (`list[str]`): method and path of each, in order.
        unknown (`list[str]`): requests that match no route.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.fail_at: str | None = None
        self.requests: list[str] = []
        self.unknown: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def oid(name: str, content: bytes) -> str:
    """The id by which the Hub knows a file: SHA-256 of large files, git's blob id of others."""
    if name.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *arguments: Any) -> None:
        pass

    # --- requests and responses --------------------------------------------------------------------------------------

    def do_HEAD(self) -> None:
        self.route()

    do_GET = do_POST = do_PUT = do_HEAD

    def route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.query = parse_qs(urlsplit(self.path).query)
        self.server.requests.append(f"{self.command} {path}")
        for method, pattern, action in ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, path)):
                return action(self, **match.groupdict())
        self.server.unknown.append(f"{self.command} {path}")
        self.refuse(404, None, "no such route")

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().strip(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, content: bytes | dict | list, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str | None, message: str, **headers: str) -> None:
        if code is not None:
            headers["X_Error_Code"] = code
        self.answer({"error": message}, status, X_Error_Message=message, **headers)

    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def repository(self, repo: str, write: bool = False) -> Repository | None:
        """The repository if it exists and the token may read (or write) it; else `None`, after the error is sent."""
        found = self.server.repositories.get(repo)
        allowed = self.token() == TOKEN
        if found is None or (not allowed and (write or found.private)):
            return self.refuse(404 if allowed else 401, "RepoNotFound", "Repository not found")
        return found

    # --- reading ------------------------------------------------------------------------------------------------------

    def model_info(self, repo: str, revision: str | None = None) -> None:
        if (found := self.repository(repo)) is None:
            return
        sha, files = found.at(revision or "main")
        siblings = [{"rfilename": name} for name in files]
        self.answer({"id": repo, "modelId": repo, "sha": sha, "private": found.private, "siblings": siblings})

    def tree(self, repo: str, revision: str, path: str | None = None) -> None:
        if (found := self.repository(repo)) is None:
            return
        _, files = found.at(revision)
        if path:  # no repository here has folders
            return self.refuse(404, "EntryNotFound", "Entry not found")
        self.answer([{"type": "file", "path": name, "size": len(files[name]), "oid": ""} for name in files])

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if (found := self.repository(repo)) is None:
            return
        if (commit := found.at(revision)) is None:
            return self.refuse(404, "RevisionNotFound", "Revision not found")
        sha, files = commit
        if path not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found", X_Repo_Commit=sha)
        self.answer(files[path], X_Repo_Commit=sha, ETag=f'"{oid(path, files[path])}"')

    # --- writing ------------------------------------------------------------------------------------------------------

    def create(self) -> None:
        wanted = json.loads(self.body())
        repo = f"{wanted['organization']}/{wanted['name']}"
        if wanted.get("type") == "space":
            if wanted.get("sdk") not in ("gradio", "docker", "static"):
                return self.refuse(400, None, "a Space needs an sdk")
            repo = f"spaces/{repo}"
        if self.token() != TOKEN:
            return self.refuse(401, None, "Invalid username or password.")
        if wanted["organization"] != "org":
            return self.refuse(403, None, f"You don't have the rights to create a model under {wanted['organization']}")
        url = f"{self.server.endpoint}/{repo}"
        if repo in self.server.repositories:
            return self.answer({"error": "You already created this model repo", "url": url}, 409)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.server.repositories[repo] = Repository(private)
        self.answer({"url": url})

    def validate_yaml(self) -> None:
        self.body()
        self.answer({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        files = json.loads(self.body())["files"]
        if (found := self.repository(repo, write=True)) is None:
            return
        present = {name: oid(name, content) for name, content in found.files.items()}
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": present.get(file["path"]),
            }
            for file in files
        ]
        self.answer({"files": modes})

    def lfs_batch(self, repo: str) -> None:
        wanted = json.loads(self.body())
        if self.repository(repo, write=True) is None:
            return
        objects = []
        for entry in wanted["objects"]:
            upload = {"upload": {"href": f"{self.server.endpoint}/lfs/{entry['oid']}"}}
            present = entry["oid"] in self.server.blobs
            objects.append({**entry, **({} if present else {"actions": upload})})
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, blob: str) -> None:
        content = self.body()
        if self.server.fail_at == "upload" or hashlib.sha256(content).hexdigest() != blob:
            return self.refuse(400, None, "upload refused")
        self.server.blobs[blob] = content
        self.answer(b"")

    def commit(self, repo: str, revision: str) -> None:
        if self.server.fail_at == "commit":
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.close_connection = True
            return self.connection.close()
        header, *operations = [json.loads(line) for line in self.body().splitlines()]
        if (found := self.repository(repo, write=True)) is None:
            return
        files = dict(found.files)
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
            else:
                return self.refuse(400, None, f"unknown operation {kind}")
        sha = found.commit(files)
        self.answer(
            {
                "success": True,
                "commitOid": sha,
                "commitUrl": f"{self.server.endpoint}/{repo}/commit/{sha}",
                "hookOutput": header["value"]["summary"],
            }
        )


ROUTES = [
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("POST", rf"/api/models/{ID}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<blob>[0-9a-f]{64})", Handler.lfs_upload),
    ("POST", rf"/api/models/{ID}/commit/(?P<revision>[^/]+)", Handler.commit),
    ("GET", rf"/api/models/{ID}(?:/revision/(?P<revision>[^/]+))?", Handler.model_info),
    ("GET", rf"/api/models/{ID}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", Handler.tree),
    ("POST", rf"/api/{SPACE}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", rf"/{SPACE}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("POST", rf"/api/{SPACE}/commit/(?P<revision>[^/]+)", Handler.commit),
    ("GET", rf"/api/{SPACE}", Handler.model_info),
    (("GET", "HEAD"), rf"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]
