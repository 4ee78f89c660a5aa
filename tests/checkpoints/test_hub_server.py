"""The loopback Hub refuses what is malformed or not allowed; real clients are in `test_hub`."""

import base64
import hashlib
import http.client
import json
from contextlib import closing

import pytest

from tests.checkpoints.hub_server import Hub, Token


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


def ask(hub, method, path, body=b"", token="hf_write", **headers):
    """One request of no client: status, headers, content."""
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    with closing(http.client.HTTPConnection("127.0.0.1", hub.server.server_port)) as connection:
        connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body), headers)
        with connection.getresponse() as answer:
            return answer.status, answer.headers, answer.read()


def commit(hub, *operations, token="hf_write"):
    lines = [json.dumps({"key": key, "value": value}) for key, value in operations]
    return ask(hub, "POST", "/api/models/me/x/commit/main", "\n".join(lines).encode(), token)


HEADER = ("header", {"summary": "a commit"})
LFS_FILE = {"path": "model.safetensors", "algo": "sha256", "oid": hashlib.sha256(b"weights").hexdigest(), "size": 7}
FILE = {"path": "a.txt", "encoding": "base64", "content": base64.b64encode(b"text").decode()}


@pytest.mark.parametrize(
    ("token", "read", "write"),
    [("hf_write", 200, 200), ("hf_read", 200, 403), ("hf_other", 404, 404), ("hf_unknown", 401, 401), (None, 401, 401)],
)
def test_rights(hub, token, read, write):
    hub.tokens["hf_other"] = Token("other")
    hub.create("me/x", private=True)
    assert ask(hub, "GET", "/me/x/resolve/main/.gitattributes", token=token)[0] == read
    assert commit(hub, HEADER, ("file", FILE), token=token)[0] == write
    assert len(hub.commits("me/x")) == 1 + (write == 200)


def test_a_commit_on_another_parent_is_a_conflict(hub):
    hub.create("me/x")
    header = ("header", {"summary": "late", "parentCommit": "0" * 40})
    assert commit(hub, header, ("file", FILE))[0] == 412
    assert hub.failures == []


@pytest.mark.parametrize(
    ("operations", "status", "message"),
    [
        ([HEADER, ("file", FILE | {"content": "no base64!"})], 400, "malformed request"),
        ([HEADER, ("file", FILE | {"content": "YQ"})], 400, "Incorrect padding"),
        ([HEADER, ("file", FILE | {"encoding": "utf-8"})], 400, "unknown encoding"),
        ([HEADER, ("file", FILE | {"path": "model.safetensors"})], 400, "must be an LFS file"),
        ([HEADER, ("file", FILE | {"path": "../a.txt"})], 400, "is no path"),
        ([HEADER, ("lfsFile", LFS_FILE | {"oid": "0" * 64})], 400, "never uploaded"),
        ([HEADER, ("lfsFile", LFS_FILE | {"size": 8})], 400, "has 7 bytes, not 8"),
        ([HEADER, ("file", FILE), ("copyFile", FILE)], 501, "unknown operation"),
        ([("file", FILE)], 400, "no commit header"),
        ([], 400, "malformed request"),
    ],
)
def test_wrong_commits_are_refused(hub, operations, status, message):
    hub.create("me/x")
    hub.repositories["me/x"].objects[LFS_FILE["oid"]] = b"weights"
    assert commit(hub, *operations)[0] == status
    assert len(hub.failures) == 1 and message in hub.failures[0]
    assert len(hub.commits("me/x")) == 1
    assert commit(hub, HEADER, ("file", FILE), ("lfsFile", LFS_FILE))[0] == 200
    assert hub.files("me/x")["a.txt"] == b"text" and hub.files("me/x")["model.safetensors"] == b"weights"


def test_wrong_uploads_are_refused(hub):
    hub.create("me/x")
    objects = [{"oid": LFS_FILE["oid"], "size": 7}]
    request = {"operation": "upload", "transfers": ["basic"], "objects": objects}
    _, _, content = ask(hub, "POST", "/me/x.git/info/lfs/objects/batch", request)
    path = json.loads(content)["objects"][0]["actions"]["upload"]["href"].removeprefix(hub.url)
    assert ask(hub, "PUT", path, b"weight", token=None)[0] == 400
    assert ask(hub, "PUT", path, b"wrongly", token=None)[0] == 400
    assert ask(hub, "PUT", path.replace("size=7", "size=6"), b"weight", token=None)[0] == 403
    assert hub.repositories["me/x"].objects == {}
    assert ask(hub, "PUT", path, b"weights", token=None)[0] == 200
    assert [failure.partition(": ")[2].partition(": ")[2] for failure in hub.failures] == [
        "6 bytes came, 7 were announced",
        "its content has another SHA-256",
    ]
    assert ask(hub, "GET", "/api/datasets/me/x")[0] == 501
    assert "no such route" in hub.failures[-1]
