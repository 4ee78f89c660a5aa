"""A Hugging Face Hub on the loopback interface that keeps repositories in memory and checks what arrives.

It speaks what `huggingface_hub` 2.4 speaks for models, without Xet and pull requests, with the Hub's own status codes
and error headers. A client reads its endpoint once, when it is imported: run it in a subprocess, with
`Hub.environment`.
"""

import base64
import hashlib
import json
import os
import re
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt")
ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
PLACEHOLDERS = {"{repo}": r"(?P<repo>[^/]+/[^/]+)", "{revision}": r"(?P<revision>[^/]+)", "{path}": r"(?P<path>.+)"}
ROUTES = []


class Token(NamedTuple):
    """Whom a token stands for, and whether it may write to that user's repositories."""

    user: str
    can_write: bool = True


class Response(NamedTuple):
    content: dict | list | bytes  # what is not bytes goes as JSON
    status: int = 200
    headers: dict[str, str] | None = None


class Refusal(Exception):
    """A request answered by an error. 400 and 501 are for what no correct client sends, and count as failures."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        headers |= {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.response = Response({"error": message}, status, headers)


@dataclass(frozen=True)
class File:
    content: bytes
    is_lfs: bool = False

    @property
    def oid(self) -> str:
        """SHA-256 of an LFS file, else git's SHA-1: its ETag, by which a client knows what it has already."""
        return hashlib.sha256(self.content).hexdigest() if self.is_lfs else git_hash(self.content)

    def entry(self, path: str) -> dict:
        """The file's line in a listing."""
        size = len(self.content)
        if not self.is_lfs:
            return {"type": "file", "path": path, "size": size, "oid": self.oid}
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.oid}\nsize {size}\n".encode()
        lfs = {"oid": self.oid, "size": size, "pointerSize": len(pointer)}
        return {"type": "file", "path": path, "size": size, "oid": git_hash(pointer), "lfs": lfs}


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    files: dict[str, File]


@dataclass
class Repository:
    """Commits by sha, branches by name, and the content that was uploaded to LFS by its SHA-256."""

    name: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def at(self, revision: str) -> Commit:
        if (sha := self.branches.get(revision, revision)) in self.commits:
            return self.commits[sha]
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, branch: str, title: str, files: dict[str, File]) -> Commit:
        parent = self.branches.get(branch)
        listing = [(path, file.oid) for path, file in sorted(files.items())]
        sha = hashlib.sha1(repr((self.name, len(self.commits), parent, title, listing)).encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, title, files)
        self.branches[branch] = sha
        return self.commits[sha]


@dataclass
class Fault:
    method: str
    path: str
    status: int
    times: int


class Hub:
    """The server, while entered.

    `failures` says what was wrong with the requests that no correct client sends.
    """

    def __init__(self, tokens: dict[str, Token] | None = None):
        self.tokens = tokens or {"hf_write": Token("me"), "hf_read": Token("me", can_write=False)}
        self.repositories: dict[str, Repository] = {}
        self.failures: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="hub_server")
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("HandlerOfHub", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.folder.cleanup()

    def environment(self, token: str | None = None) -> dict[str, str]:
        """All environment variables of a subprocess that knows no Hub but this one; its cache is empty."""
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
        kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(foreign)}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": token or "",
            "HF_HOME": tempfile.mkdtemp(dir=self.folder.name),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "1",  # which asks huggingface.co
            "HTTPS_PROXY": "http://127.0.0.1:9",  # nobody listens there: what would leave the machine fails at once
            "NO_PROXY": "127.0.0.1",
        }

    def create(self, repo: str, *, private: bool = False):
        self.repositories[repo] = Repository(repo, private)
        self.repositories[repo].commit("main", "initial commit", {".gitattributes": File(ATTRIBUTES)})

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return {path: file.content for path, file in self.repositories[repo].at(revision).files.items()}

    def commits(self, repo: str, revision: str = "main") -> list[Commit]:
        """Newest first."""
        commits = [self.repositories[repo].at(revision)]
        while commits[-1].parent:
            commits.append(self.repositories[repo].commits[commits[-1].parent])
        return commits

    def fail_next(self, method: str, path: str, *, status: int = 500, times: int = 1):
        """Answer the next requests with this method and a path in which `path` is found, both patterns, by `status`."""
        self.faults.append(Fault(method, path, status, times))

    def next_fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and re.fullmatch(fault.method, method) and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None


def git_hash(blob: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()


def is_for_lfs(path: str) -> bool:
    return any(fnmatch(path, pattern) for pattern in LFS_PATTERNS)


def check(condition: bool, message: str):
    if not condition:
        raise Refusal(400, message)


def route(methods: str, path: str, access: str = ""):
    """Register a method of Handler; with access "read" or "write" it receives the repository if its client may."""
    for placeholder, pattern in PLACEHOLDERS.items():
        path = path.replace(placeholder, pattern)

    def register(function):
        ROUTES.append((methods, path, access, function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one segment: the second would wait 40 ms for the client's acknowledgement

    def log_message(self, *_):
        """Keep quiet."""

    def handle(self):
        with suppress(ConnectionError):  # a client may go at any time
            super().handle()

    def do(self):
        self.url = urlsplit(self.path)
        length = int(self.headers.get("Content-Length", 0))
        with self.hub.lock:
            fault = self.hub.next_fault(self.command, self.url.path)
        self.body = self.rfile.read(length)
        with self.hub.lock:
            self.send(self.answer(fault))

    do_GET = do_HEAD = do_POST = do_PUT = do

    def send(self, response: Response):
        content = response.content if isinstance(response.content, bytes) else json.dumps(response.content).encode()
        self.send_response(response.status)
        for name, value in (response.headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer(self, fault: Fault | None) -> Response:
        try:
            if fault:
                raise Refusal(fault.status, "injected fault")
            for methods, path, access, function in ROUTES:
                if (match := re.fullmatch(path, self.url.path)) and self.command in methods.split():
                    arguments = {name: unquote(value) for name, value in match.groupdict().items()}
                    if access:
                        arguments["repo"] = self.authorize(arguments["repo"], access)
                    return function(self, **arguments)
            raise Refusal(501, "this server has no such route")
        except Refusal as error:
            refusal = error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            refusal = Refusal(400, f"malformed request: {error!r}")
        if refusal.response.status in (400, 501) and not fault:
            self.hub.failures.append(f"{self.command} {self.path}: {refusal}")
        return refusal.response

    def token(self) -> Token | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        token = self.hub.tokens.get(header.removeprefix("Bearer "))
        if token is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return token

    def authorize(self, name: str, access: str) -> Repository:
        token, repo = self.token(), self.hub.repositories.get(name)
        is_owner = token is not None and name.startswith(f"{token.user}/")
        if repo is None or (repo.private and not is_owner):
            # The Hub does not tell strangers whether a repository exists. For 401 the client needs no code where the
            # endpoint is https://, which this one is not.
            raise Refusal(404 if token else 401, "Repository not found", "RepoNotFound")
        if access == "write" and token is None:
            raise Refusal(401, "Invalid username or password.")
        if access == "write" and not (is_owner and token.can_write):
            raise Refusal(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    @route("POST", "/api/repos/create")
    def create(self):
        request, token = json.loads(self.body), self.token()
        if not token:
            raise Refusal(401, "Invalid username or password.")
        owner = request["organization"] or token.user
        if owner != token.user or not token.can_write:
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        check(request.get("type", "model") == "model", "only models are kept here")
        name = f"{owner}/{request['name']}"
        exists = name in self.hub.repositories
        if not exists:
            self.hub.create(name, private=request.get("visibility") == "private")
        return Response({"url": f"{self.hub.url}/{name}", "name": name}, 409 if exists else 200)

    @route("POST", "/api/validate-yaml")
    def validate_card(self):
        content = json.loads(self.body)["content"]
        if not content.startswith("---\n"):
            return Response({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        check("\n---\n" in content, "the card's metadata do not end")
        return Response({"errors": [], "warnings": []})

    @route("GET", "/api/models/{repo}", "read")
    @route("GET", "/api/models/{repo}/revision/{revision}", "read")
    def info(self, repo, revision="main"):
        commit = repo.at(revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        owner = repo.name.split("/")[0]
        info = {"id": repo.name, "author": owner, "sha": commit.sha, "private": repo.private, "siblings": siblings}
        return Response(info)

    @route("GET", "/api/models/{repo}/tree/{revision}", "read")
    @route("GET", "/api/models/{repo}/tree/{revision}/{path}", "read")
    def tree(self, repo, revision, path=""):
        """All files below `path`; the Hub gives folders instead of their files, unless asked with recursive=true."""
        folder = f"{path}/" if path else ""
        files = sorted(repo.at(revision).files.items())
        entries = [file.entry(name) for name, file in files if name.startswith(folder)]
        if not entries:
            raise Refusal(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
        return Response(entries)

    @route("GET HEAD", "/{repo}/resolve/{revision}/{path}", "read")
    def resolve(self, repo, revision, path):
        commit = repo.at(revision)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.sha})
        file = commit.files[path]
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.oid}"'}
        return Response(file.content, 200, headers)

    @route("POST", "/api/models/{repo}/branch/{revision}", "write")
    def branch(self, repo, revision):
        start = json.loads(self.body).get("startingPoint", "main")
        if revision in repo.branches:
            raise Refusal(409, f"Reference already exists: {revision}")
        repo.branches[revision] = repo.at(start).sha
        return Response({})

    @route("POST", "/api/models/{repo}/preupload/{revision}", "write")
    def preupload(self, repo, revision):
        commit, answers = repo.at(revision), []
        for file in json.loads(self.body)["files"]:
            path, sample = file["path"], base64.b64decode(file["sample"], validate=True)
            check(len(sample) == min(file["size"], 512), f"{path}: the sample is not the first 512 bytes")
            answer = {"path": path, "uploadMode": "lfs" if is_for_lfs(path) else "regular", "shouldIgnore": False}
            answers.append(answer | ({"oid": commit.files[path].oid} if path in commit.files else {}))
        return Response({"files": answers, "commitOid": commit.sha})

    @route("POST", r"/{repo}\.git/info/lfs/objects/batch", "write")
    def lfs_batch(self, repo):
        request, objects = json.loads(self.body), []
        check(request["operation"] == "upload" and "basic" in request["transfers"], "only basic uploads are served")
        for oid, size in [(item["oid"], item["size"]) for item in request["objects"]]:
            check(re.fullmatch("[0-9a-f]{64}", oid) is not None, f"{oid} is no SHA-256")
            upload = f"{self.hub.url}/lfs/{repo.name}/{oid}?size={size}&signature={self.sign(repo.name, oid, size)}"
            actions = {"upload": {"href": upload}}
            objects.append({"oid": oid, "size": size} | ({} if oid in repo.objects else {"actions": actions}))
        return Response({"transfer": "basic", "objects": objects})

    def sign(self, name: str, oid: str, size: int) -> str:
        """What lets a client without token upload this object: the storage behind LFS knows no users."""
        return hashlib.sha256(f"{id(self.hub)} {name} {oid} {size}".encode()).hexdigest()

    @route("PUT", "/lfs/{repo}/{path}")
    def lfs_upload(self, repo, path):
        query = parse_qs(self.url.query)
        size = int(query["size"][0])
        if query["signature"][0] != self.sign(repo, path, size):
            raise Refusal(403, "SignatureDoesNotMatch")
        check(len(self.body) == size, f"LFS object {path}: {len(self.body)} bytes came, {size} were announced")
        check(hashlib.sha256(self.body).hexdigest() == path, f"LFS object {path}: its content has another SHA-256")
        self.hub.repositories[repo].objects[path] = self.body
        return Response(b"")

    def lfs_object(self, repo: Repository, oid: str, size: int) -> bytes:
        check(oid in repo.objects, f"LFS object {oid} was never uploaded")
        check(len(repo.objects[oid]) == size, f"LFS object {oid} has {len(repo.objects[oid])} bytes, not {size}")
        return repo.objects[oid]

    @route("POST", "/api/models/{repo}/commit/{revision}", "write")
    def commit(self, repo, revision):
        check("create_pr" not in parse_qs(self.url.query), "pull requests are not served")
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        check(header["key"] == "header" and header["value"]["summary"] != "", "the first line is no commit header")
        parent = repo.at(revision)
        if header["value"].get("parentCommit", parent.sha) != parent.sha:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for operation in operations:
            self.apply(repo, files, operation["key"], operation["value"])
        check(revision in repo.branches, f"{revision} is no branch")
        commit = repo.commit(revision, header["value"]["summary"], files)
        url = f"{self.hub.url}/{repo.name}/commit/{commit.sha}"
        return Response({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})

    def apply(self, repo: Repository, files: dict[str, File], key: str, value: dict):
        """Change `files` by one line of a commit."""
        path = value["path"]
        check(not {"", ".", "..", ".git"} & set(path.removesuffix("/").split("/")), f"{path!r} is no path")
        if key == "file":
            check(value["encoding"] == "base64", f"{path}: unknown encoding {value['encoding']!r}")
            content = base64.b64decode(value["content"], validate=True)
            check(not content or not is_for_lfs(path), f"{path} must be an LFS file")
            files[path] = File(content)
        elif key == "lfsFile":
            check(value["algo"] == "sha256", f"{path}: unknown algorithm {value['algo']!r}")
            files[path] = File(self.lfs_object(repo, value["oid"], value["size"]), is_lfs=True)
        else:
            raise Refusal(501, f"unknown operation {key!r}")
