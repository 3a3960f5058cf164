"""A small Hub on the loopback interface: the HTTP calls of huggingface_hub 2.4, in memory; it can be told to fail."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".safetensors", ".bin", ".png")  # files that go to the large file storage, as .gitattributes has it

# The Hub's own words in May 2026, from issue 4218 of huggingface_hub.
LICENSE_REFUSED = (
    '"license" must be one of [apache-2.0, mit, openrail, bigscience-openrail-m, creativeml-openrail-m, '
    "bigscience-bloom-rail-1.0, bigcode-openrail-m, afl-3.0, artistic-2.0, bsl-1.0, bsd, bsd-2-clause, bsd-3-clause, "
    "bsd-3-clause-clear, c-uda, cc, cc0-1.0, cc-by-2.0, cc-by-2.5, cc-by-3.0, cc-by-4.0, cc-by-sa-3.0, cc-by-sa-4.0, "
    "cc-by-nc-2.0, cc-by-nc-3.0, cc-by-nc-4.0, cc-by-nd-4.0, cc-by-nc-nd-3.0, cc-by-nc-nd-4.0, cc-by-nc-sa-2.0, "
    "cc-by-nc-sa-3.0, cc-by-nc-sa-4.0, cdla-sharing-1.0, cdla-permissive-1.0, cdla-permissive-2.0, wtfpl, ecl-2.0, "
    "epl-1.0, epl-2.0, etalab-2.0, eupl-1.1, eupl-1.2, agpl-3.0, gfdl, gpl, gpl-2.0, gpl-3.0, lgpl, lgpl-2.1, "
    "lgpl-3.0, isc, h-research, intel-research, lppl-1.3c, ms-pl, apple-ascl, apple-amlr, mpl-2.0, odc-by, odbl, "
    "openmdw-1.0, openrail++, osl-3.0, postgresql, ofl-1.1, ncsa, unlicense, zlib, pddl, lgpl-lr, "
    "deepfloyd-if-license, fair-noncommercial-research-license, llama2, llama3, llama3.1, llama3.2, llama3.3, llama4, "
    "grok2-community, gemma, unknown, other, array]"
)
LICENSES = LICENSE_REFUSED.partition("[")[2].removesuffix(", array]").split(", ")


@dataclasses.dataclass
class Failure:
    """Answer requests badly.

    `status` is answered with `headers` and `message`, once `hold` is set; `cut` reads half of the request's body, then
    closes the connection without an answer.
    """

    method: str
    path: str  # regular expression, searched in the path
    status: int = 500
    message: str = "no luck"
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    times: int = 1_000_000
    cut: bool = False
    hold: threading.Event | None = None
    also_do: bool = False  # does what was asked before the connection is cut
    hits: int = 0


@dataclasses.dataclass
class Commit:
    """Files are path -> content; a content's key in the large file storage is its sha256."""

    oid: str
    title: str
    files: dict[str, bytes]


@dataclasses.dataclass
class Repository:
    """Branches are lists of commits, oldest first."""

    private: bool
    branches: dict[str, list[Commit]]
    pulls: list[str] = dataclasses.field(default_factory=list)

    def at(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        found = [commit for log in self.branches.values() for commit in log if commit.oid == revision]
        return found[0] if found else None


class Hub:
    """What the server holds, and what it was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.users: dict[str, dict[str, Any]] = {}  # token -> answer of whoami
        self.repositories: dict[str, Repository] = {}
        self.storage: dict[str, bytes] = {}
        self.failures: list[Failure] = []
        self.requests: list[str] = []
        self.damaged = ""  # a path that downloads come out of with another content
        self.lock = threading.Lock()
        self.add_user("me", "hf_mine", orgs=("club",))
        self.add_user("other", "hf_others")

    def add_user(self, name: str, token: str, role: str = "write", orgs: tuple[str, ...] = ()) -> str:
        self.users[token] = {
            "type": "user",
            "name": name,
            "orgs": [{"name": org, "roleInOrg": "write"} for org in orgs],
            "auth": {"accessToken": {"role": role, "displayName": "test"}},
        }
        return token

    def add_repository(self, repo_id: str, *, private: bool = False, **files: bytes) -> Repository:
        found = Repository(private, {"main": []})
        content = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", **files}
        found.branches["main"].append(Commit(_oid(repo_id), "initial commit", content))
        self.repositories[repo_id] = found
        return found

    def fail(self, method: str, path: str, **how: Any) -> Failure:
        failure = Failure(method, path, **how)
        self.failures.append(failure)
        return failure

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repositories[repo_id].at(revision)
        assert found is not None
        return {path: content for path, content in found.files.items() if path != ".gitattributes"}

    def titles(self, repo_id: str, branch: str = "main") -> list[str]:
        return [commit.title for commit in self.repositories[repo_id].branches[branch]]

    def asked(self, pattern: str) -> list[str]:
        return [request for request in self.requests if re.search(pattern, request)]

    def environment(self, home: Any, token: str | None = "hf_mine") -> dict[str, str]:
        """For a process that talks to this Hub, with a cache of its own."""
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            "NO_PROXY": "127.0.0.1",
        }
        return variables if token is None else {**variables, "HF_TOKEN": token}


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub with the user `me`, of the organisation `club`, and the user `other`."""
    hub = Hub()

    class Handler(_Handler):
        world = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def connect(hub: Hub, monkeypatch: Any, home: Any, token: str | None = "hf_mine") -> None:
    """Point this process's huggingface_hub, which has read its environment already, at the Hub."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    cache = str(home / "hub")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    close_session()


def _oid(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


def _blob_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_lfs(path: str, size: int) -> bool:
    return (path.endswith(LFS) or size > 10 * 2**20) and size > 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    world: Hub

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        path = address.path
        self._body: bytes | None = None
        with self.world.lock:
            self.world.requests.append(f"{self.command} {path}")
            failure = next(
                (one for one in self.world.failures if one.method == self.command and re.search(one.path, path)), None
            )
            if failure is not None:
                failure.hits += 1
                failure.times -= 1
                if failure.times <= 0:
                    self.world.failures.remove(failure)
        if failure is not None:
            self._fail(failure, path)
        else:
            self._route(path)

    def _fail(self, failure: Failure, path: str) -> None:
        if failure.cut and failure.also_do:
            self.wfile = _Nowhere()
            self._route(path)
        elif failure.cut:
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
        else:
            self._read()
            if failure.hold is not None:
                failure.hold.wait()
            self._reply({"error": failure.message}, failure.status, failure.headers)
            return
        self.close_connection = True

    def _route(self, path: str) -> None:
        for method, pattern, name in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found is not None and self.command in method:
                self._read()
                getattr(self, name)(*(unquote(group) for group in found.groups()))
                return
        self._read()
        self._reply({"error": "no such page"}, 404)

    def _read(self) -> bytes:
        if self._body is None:
            self._body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return self._body

    def _json(self) -> Any:
        return json.loads(self._read() or b"{}")

    def _reply(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str, message: str) -> None:
        self._reply({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})

    # who asks, and what they may

    def _user(self) -> dict[str, Any] | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        return self.world.users.get(token) if scheme == "Bearer" else None

    def _may_write(self, owner: str) -> bool:
        user = self._user()
        if user is None or user["auth"]["accessToken"]["role"] == "read":
            return False
        return owner in (user["name"], *(org["name"] for org in user["orgs"]))

    def _find(self, repo_id: str, *, write: bool = False) -> Repository | None:
        """The repository, if it may be seen or written by who asks; else answers why not."""
        if self.headers.get("Authorization") and self._user() is None:
            self._error(401, "", "Invalid credentials in Authorization header")
            return None
        found = self.world.repositories.get(repo_id)
        owner = repo_id.partition("/")[0]
        if found is None or (found.private and not self._reads_private(owner)):
            self._error(404 if self._user() else 401, "RepoNotFound", "Repository not found")
            return None
        if write and not self._may_write(owner):
            self._reply({"error": f"you have no write access to {repo_id}"}, 403)
            return None
        return found

    def _reads_private(self, owner: str) -> bool:
        user = self._user()
        return user is not None and owner in (user["name"], *(org["name"] for org in user["orgs"]))

    def _commit_at(self, repo_id: str, revision: str) -> Commit | None:
        found = self._find(repo_id)
        if found is None:
            return None
        commit = found.at(revision)
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # pages

    def whoami(self) -> None:
        user = self._user()
        self._reply({"error": "Invalid username or password."}, 401) if user is None else self._reply(user)

    def create(self) -> None:
        asked, user = self._json(), self._user()
        if user is None:
            self._reply({"error": "Invalid username or password."}, 401)
            return
        owner = asked.get("organization") or user["name"]
        repo_id = f"{owner}/{asked['name']}"
        if not self._may_write(owner):
            self._reply({"error": f"You don't have the rights to create a model under the namespace {owner}"}, 403)
        elif repo_id in self.world.repositories:
            content = {"error": "You already created this model repo", "url": f"{self.world.url}/{repo_id}"}
            self._reply(content, 409)
        else:
            private = asked.get("visibility") == "private" or asked.get("private") is True
            self.world.add_repository(repo_id, private=private)
            self._reply({"url": f"{self.world.url}/{repo_id}", "name": repo_id})

    def validate_yaml(self) -> None:
        import yaml  # comes with huggingface_hub

        _, _, rest = self._json()["content"].partition("---\n")
        try:
            metadata = yaml.safe_load(rest.partition("\n---\n")[0]) or {}
            refused = "" if metadata.get("license", "unknown") in LICENSES else LICENSE_REFUSED
        except yaml.YAMLError as error:
            refused = str(error)
        self._reply({"errors": [{"message": refused}] if refused else [], "warnings": []}, 400 if refused else 200)

    def info(self, repo_id: str, revision: str = "main") -> None:
        commit = self._commit_at(repo_id, revision)
        if commit is not None:
            found = self.world.repositories[repo_id]
            siblings = [{"rfilename": path} for path in commit.files]
            content = {"id": repo_id, "sha": commit.oid, "private": found.private, "tags": [], "siblings": siblings}
            self._reply({**content, "pipeline_tag": "image-classification"})

    def check_access(self, repo_id: str) -> None:
        if self._find(repo_id) is not None:
            self._reply({})

    def check_write(self, repo_id: str) -> None:
        if self._find(repo_id, write=True) is not None:
            self._reply({})

    def tree(self, repo_id: str, revision: str, folder: str = "") -> None:
        commit = self._commit_at(repo_id, revision)
        if commit is None:
            return
        rows = []
        for path, content in sorted(commit.files.items()):
            if path.startswith(folder):
                row = {"type": "file", "path": path, "size": len(content), "oid": _blob_oid(content)}
                if _is_lfs(path, len(content)):
                    oid = hashlib.sha256(content).hexdigest()
                    row["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
                rows.append(row)
        self._reply(rows)

    def refs(self, repo_id: str) -> None:
        found = self._find(repo_id)
        if found is not None:
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": log[-1].oid}
                for name, log in found.branches.items()
            ]
            self._reply({"branches": branches, "converts": [], "tags": []})

    def log(self, repo_id: str, revision: str) -> None:
        found = self._find(repo_id)
        if found is not None:
            date = "2026-01-01T00:00:00.000Z"
            rows = [
                {"id": commit.oid, "title": commit.title, "message": "", "date": date, "authors": []}
                for commit in reversed(found.branches[revision])
            ]
            self._reply(rows)

    def discussions(self, repo_id: str) -> None:
        found = self._find(repo_id)
        if found is not None:
            rows = [
                {
                    "num": number,
                    "title": title,
                    "status": "open",
                    "author": {"name": "me"},
                    "isPullRequest": True,
                    "createdAt": "2026-01-01T00:00:00.000Z",
                    "repo": {"name": repo_id, "type": "model"},
                }
                for number, title in enumerate(found.pulls, start=1)
            ]
            self._reply({"discussions": rows, "start": 0, "count": len(rows)})

    def branch(self, repo_id: str, name: str) -> None:
        found = self._find(repo_id, write=True)
        if found is None:
            return
        start = found.at(self._json().get("startingPoint") or "main")
        if name in found.branches:
            self._reply({"error": f"Reference already exists: {name}"}, 409)
        elif name.startswith("refs/") or start is None:
            self._reply({"error": f"Invalid reference for a branch: {name}"}, 400)
        else:
            found.branches[name] = [start]
            self._reply({})

    def preupload(self, repo_id: str, revision: str) -> None:
        found = self._find(repo_id, write="create_pr" not in self.query)
        if found is None:
            return
        commit = found.at(revision)
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        rows = []
        for file in self._json()["files"]:
            mode = "lfs" if _is_lfs(file["path"], file["size"]) else "regular"
            there = commit.files.get(file["path"])
            oid = None
            if there is not None:
                oid = hashlib.sha256(there).hexdigest() if mode == "lfs" else _blob_oid(there)
            rows.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._reply({"files": rows, "commitOid": commit.oid})

    def batch(self, repo_id: str) -> None:
        objects = []
        for entry in self._json()["objects"]:
            oid = entry["oid"]
            if oid not in self.world.storage:
                upload = f"{self.world.url}/storage/{oid}?X-Signature=signed"
                verify = f"{self.world.url}/storage-verify/{repo_id}"
                entry = {**entry, "actions": {"upload": {"href": upload}, "verify": {"href": verify}}}
            objects.append(entry)
        self._reply({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        content = self._read()
        if hashlib.sha256(content).hexdigest() != oid:
            self._reply({"error": "content has another hash"}, 400)
            return
        self.world.storage[oid] = content
        self._reply(b"")

    def verify(self, repo_id: str) -> None:
        asked = self._json()
        there = self.world.storage.get(asked["oid"])
        is_whole = there is not None and len(there) == asked["size"]
        self._reply({} if is_whole else {"error": "not stored"}, 200 if is_whole else 404)

    def commit(self, repo_id: str, revision: str) -> None:
        opens_pull = "create_pr" in self.query
        found = self._find(repo_id, write=not opens_pull)
        if found is None:
            return
        if revision not in found.branches:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        files, title = dict(found.branches[revision][-1].files), ""
        for line in self._read().splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                title = value["summary"]
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.world.storage:
                    self._reply({"error": f"LFS object {value['oid']} was never uploaded"}, 400)
                    return
                files[value["path"]] = self.world.storage[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
            else:
                self._reply({"error": f"unknown entry {kind}"}, 400)
                return
        with self.world.lock:
            oid = _oid(f"{repo_id} {revision} {title} {len(self.world.requests)}")
            done = Commit(oid, title, files)
            address = f"{self.world.url}/{repo_id}/commit/{oid}"
            if opens_pull:
                found.pulls.append(title)
                number = len(found.pulls)
                found.branches[f"refs/pr/{number}"] = [*found.branches[revision], done]
                pull = f"{self.world.url}/{repo_id}/discussions/{number}"
                self._reply({"commitUrl": address, "commitOid": oid, "pullRequestUrl": pull})
            else:
                found.branches[revision].append(done)
                self._reply({"commitUrl": address, "commitOid": oid})

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        commit = self._commit_at(repo_id, revision)
        if commit is None:
            return
        if path not in commit.files:
            self._error(404, "EntryNotFound", f"{path} does not exist")
            return
        content = commit.files[path]
        if path == self.world.damaged:
            content = bytes([content[0] ^ 1]) + content[1:]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{_blob_oid(content)}"'}
        if _is_lfs(path, len(content)):
            headers |= {"X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            headers |= {"X-Linked-Size": str(len(content))}
        self._reply(content, 200, headers)


class _Nowhere:
    """A stream for an answer that gets lost."""

    def write(self, content: bytes) -> int:
        return len(content)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    closed = False


_REPO = r"([^/]+/[^/]+)"
_ROUTES = (
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", rf"/api/models/{_REPO}", "info"),
    ("GET", rf"/api/models/{_REPO}/revision/([^/]+)", "info"),
    ("GET", rf"/api/models/{_REPO}/auth-check", "check_access"),
    ("GET", rf"/api/models/{_REPO}/auth-check/write", "check_write"),
    ("GET", rf"/api/models/{_REPO}/tree/([^/]+)", "tree"),
    ("GET", rf"/api/models/{_REPO}/tree/([^/]+)/(.+)", "tree"),
    ("GET", rf"/api/models/{_REPO}/refs", "refs"),
    ("GET", rf"/api/models/{_REPO}/commits/([^/]+)", "log"),
    ("GET", rf"/api/models/{_REPO}/discussions", "discussions"),
    ("POST", rf"/api/models/{_REPO}/branch/([^/]+)", "branch"),
    ("POST", rf"/api/models/{_REPO}/preupload/([^/]+)", "preupload"),
    ("POST", rf"/api/models/{_REPO}/commit/([^/]+)", "commit"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/storage/([0-9a-f]{64})", "store"),
    ("POST", rf"/storage-verify/{_REPO}", "verify"),
    ("GET HEAD", rf"/{_REPO}/resolve/([^/]+)/(.+)", "resolve"),
)
