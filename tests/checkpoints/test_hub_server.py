"""The loopback Hub: a real client pushes, pulls and meets faults in a subprocess; what is malformed is refused."""

import base64
import hashlib
import http.client
import json
import subprocess
import sys
from contextlib import closing

import pytest

from tests.checkpoints.hub_server import Hub, Token

# Retries do not wait.
MODEL = """
import time
import torch
from huggingface_hub import ModelCard
from transformers import AutoModel, BertConfig, BertForSequenceClassification, BertModel, Trainer, TrainingArguments

CONFIG = BertConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)

time.sleep = lambda seconds: None

def build(seed, model_class=BertModel):
    torch.manual_seed(seed)
    return model_class(CONFIG)

def equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

def error_of(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
"""

# Waits are recorded instead of waited for.
CLIENT = """
import os
import time
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download

api = HfApi()
waits = []
time.sleep = waits.append

def attempt(function, *arguments, **options):
    "What came of a call, and the seconds the client waited before each retry."
    waits.clear()
    try:
        function(*arguments, **options)
    except Exception as error:
        while isinstance(error, RuntimeError) and error.__cause__:  # what the upload of a file raises
            error = error.__cause__
        response = getattr(error, "response", None)
        return [f"{type(error).__name__} {response.status_code}" if response else type(error).__name__, list(waits)]
    return ["done", list(waits)]

def push(repo, size=200_000, **options):
    api.create_repo(repo, exist_ok=True)
    operation = CommitOperationAdd("model.safetensors", os.urandom(size))
    return api.create_commit(repo, [operation], commit_message="weights", **options)

def pull(repo, **options):
    return hf_hub_download(repo, "model.safetensors", **options)
"""

BACKOFF = [1, 2, 4, 8, 8]  # huggingface_hub's five retries, 23 s in all


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


def run(hub, *script, token="hf_write"):
    """What the script leaves in `result`."""
    program = "\n".join((*script, "import json; print(json.dumps(result))"))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=hub.environment(token),
        cwd=hub.folder.name,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def ask(hub, method, path, body=b"", token="hf_write", **headers):
    """One request of no client: status, headers, content."""
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    with closing(http.client.HTTPConnection("127.0.0.1", hub.server.server_port)) as connection:
        connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body), headers)
        with connection.getresponse() as answer:
            return answer.status, answer.headers, answer.read()


def commit(hub, *operations):
    lines = [json.dumps({"key": key, "value": value}) for key, value in operations]
    return ask(hub, "POST", "/api/models/me/x/commit/main", "\n".join(lines).encode())


def test_models_are_pushed_and_pulled(hub):
    hub.tokens["hf_other"] = Token("other")
    hub.reset_next("PUT", "/lfs/me/x/")
    hub.fail_next("POST", "/preupload/", status=503)
    hub.reset_next("GET", "/resolve/.*/model.safetensors")
    result = run(
        hub,
        MODEL,
        """
first, second = build(1), build(2)
shas = [model.push_to_hub("me/x", commit_message="weights", private=True).oid for model in (first, second, second)]
on_branch = first.push_to_hub("me/x", revision="trial/1").oid
result = {
    "anonymous": error_of(AutoModel.from_pretrained, "me/x", token=False),
    "other": error_of(AutoModel.from_pretrained, "me/x", token="hf_other"),
    "invalid": error_of(AutoModel.from_pretrained, "me/x", token="hf_invalid"),
    "read only": error_of(first.push_to_hub, "me/x", token="hf_read"),
    "revision": error_of(AutoModel.from_pretrained, "me/x", revision="gone"),
    "newest": equal(AutoModel.from_pretrained("me/x", token="hf_read"), second),
    "first": equal(AutoModel.from_pretrained("me/x", revision=shas[0]), first),
    "branch": equal(AutoModel.from_pretrained("me/x", revision="trial/1"), first),
    "shas": shas,
    "on branch": on_branch,
}
""",
    )
    first, second, again = result["shas"]
    assert result["newest"] and result["first"] and result["branch"]
    assert again == second != first  # what has not changed makes no commit
    assert [commit.sha for commit in hub.commits("me/x")][:2] == [second, first]
    assert [commit.title for commit in hub.commits("me/x")] == ["weights", "weights", "initial commit"]
    assert hub.commits("me/x", "trial/1")[0].sha == result["on branch"]
    assert set(hub.files("me/x")) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    for name in ("anonymous", "other"):
        assert "not a valid model identifier" in result[name] and "pass a token" in result[name]
    assert "401" in result["invalid"] and "Invalid credentials" in result["invalid"]
    assert "403 Forbidden" in result["read only"]
    assert "gone is not a valid git identifier" in result["revision"]
    uploads = [status for method, _, status in hub.requests if method == "PUT"]
    assert uploads == [None, 200, 200]  # reset, again; the second; the branch's content is there already
    downloads = [s for method, path, s in hub.requests if method == "GET" and path.endswith("model.safetensors")]
    assert downloads[:2] == [None, 200]
    assert hub.failures == []


def test_trainer_pushes_model_and_card(hub):
    result = run(
        hub,
        MODEL,
        """
model = build(1, BertForSequenceClassification)
data = [{"input_ids": [1, 2, 3], "labels": index % 2} for index in range(4)]
args = TrainingArguments(
    "out", push_to_hub=True, hub_model_id="me/x", max_steps=1, use_cpu=True, disable_tqdm=True, report_to=[]
)
trainer = Trainer(model, args, train_dataset=data)
trainer.train()
trainer.push_to_hub(tags=["tiny"])
pulled = BertForSequenceClassification.from_pretrained("me/x")
result = {"equal": equal(pulled, model), "tags": ModelCard.load("me/x").data.tags}
""",
    )
    assert result == {"equal": True, "tags": ["tiny", "generated_from_trainer"]}
    assert hub.commits("me/x")[0].title == "End of training"
    assert hub.repositories["me/x"].at("main").files["training_args.bin"].is_lfs
    assert hub.failures == []


# Of each request: what comes of one 500, of 500 as long as the client asks, and of one connection that breaks.
ONCE, GIVES_UP, AT_ONCE = ["done", [1]], ["HfHubHTTPError 500", BACKOFF], ["HfHubHTTPError 500", []]
BROKEN = ["RemoteProtocolError", []]
REQUESTS = {
    "preupload": ("POST", "/preupload/", ONCE, GIVES_UP, ONCE),
    "batch": ("POST", "/batch", ONCE, GIVES_UP, ONCE),
    "upload": ("PUT", "", ONCE, GIVES_UP, ONCE),
    "verify": ("POST", "/verify", ONCE, GIVES_UP, ONCE),
    "commit": ("POST", "/commit/", AT_ONCE, AT_ONCE, BROKEN),
    "head": ("HEAD", "/resolve/", ["done", []], ["LocalEntryNotFoundError", BACKOFF], BROKEN),
    "get": ("GET", "/resolve/", AT_ONCE, AT_ONCE, ONCE),
}


def test_faults_reach_the_client(hub):
    expected = {"me/create": AT_ONCE}
    hub.fail_next("POST", "/repos/create")
    for name, (method, path, *outcomes) in REQUESTS.items():
        repos = [f"me/{name}-{fault}" for fault in ("once", "always", "reset")]
        hub.fail_next(method, f"{repos[0]}.*{path}")
        hub.fail_next(method, f"{repos[1]}.*{path}", times=99)
        hub.reset_next(method, f"{repos[2]}.*{path}")
        expected |= dict(zip(repos, outcomes, strict=True))
    script = """
result = {}
for repo in REPOS:
    if repo.startswith(("me/head", "me/get")):
        push(repo)
        result[repo] = attempt(pull, repo)
    else:
        result[repo] = attempt(push, repo)
"""
    assert run(hub, CLIENT, f"REPOS = {list(expected)}", script) == expected
    for repo, (outcome, _) in expected.items():  # all or nothing
        is_pushed = outcome == "done" or repo.startswith(("me/head", "me/get"))
        assert repo == "me/create" or len(hub.commits(repo)) == 1 + is_pushed, repo
    assert hub.failures == []


def test_folders_rights_and_conflicts(hub):
    hub.tokens["hf_other"] = Token("other")
    hub.create("me/secret", private=True)
    hub.create("me/folder")
    result = run(
        hub,
        CLIENT,
        """
from pathlib import Path
Path("folder/sub").mkdir(parents=True)
Path("folder/sub/model.safetensors").write_bytes(b"weights")
Path("folder/notes.txt").write_text("notes")
first = api.upload_folder(repo_id="me/folder", folder_path="folder").oid
Path("folder/notes.txt").unlink()
api.upload_folder(repo_id="me/folder", folder_path="folder", delete_patterns="*.txt")
push("me/secret")
wrong = CommitOperationAdd("model.safetensors", b"right")
wrong.upload_info.sha256 = bytes(32)
result = {
    "files": api.list_repo_files("me/folder"),
    "earlier": Path(hf_hub_download("me/folder", "notes.txt", revision=first)).read_text(),
    "deleted": attempt(hf_hub_download, "me/folder", "notes.txt")[0],
    "conflict": attempt(push, "me/folder", parent_commit=first)[0],
    "corrupt": attempt(api.create_commit, "me/folder", [wrong], commit_message="wrong")[0],
    "read anonymously": attempt(pull, "me/secret", token=False)[0],
    "read by another": attempt(pull, "me/secret", token="hf_other")[0],
    "read": attempt(pull, "me/secret", token="hf_read")[0],
    "write anonymously": attempt(push, "me/folder", token=False)[0],
    "write by another": attempt(push, "me/folder", token="hf_other")[0],
    "write with a token for reading": attempt(push, "me/folder", token="hf_read")[0],
    "create for another": attempt(api.create_repo, "other/x")[0],
}
""",
    )
    assert result == {
        "files": [".gitattributes", "sub/model.safetensors"],
        "earlier": "notes",
        "deleted": "RemoteEntryNotFoundError 404",
        "conflict": "HfHubHTTPError 412",
        "corrupt": "BadRequestError 400",
        "read anonymously": "RepositoryNotFoundError 401",
        "read by another": "RepositoryNotFoundError 404",
        "read": "done",
        "write anonymously": "HfHubHTTPError 401",
        "write by another": "HfHubHTTPError 403",
        "write with a token for reading": "HfHubHTTPError 403",
        "create for another": "HfHubHTTPError 403",
    }
    assert len(hub.commits("me/folder")) == 3
    (failure,) = hub.failures
    assert "its content has another SHA-256" in failure


HEADER = ("header", {"summary": "a commit"})
LFS_FILE = {"path": "model.safetensors", "algo": "sha256", "oid": hashlib.sha256(b"weights").hexdigest(), "size": 7}
FILE = {"path": "a.txt", "encoding": "base64", "content": base64.b64encode(b"text").decode()}


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


def test_a_download_continues_where_it_broke(hub):
    hub.create("me/x")
    path, whole = "/me/x/resolve/main/.gitattributes", hub.files("me/x")[".gitattributes"]
    status, headers, content = ask(hub, "GET", path, Range="bytes=5-")
    assert (status, content) == (206, whole[5:])
    assert headers["Content-Range"] == f"bytes 5-{len(whole) - 1}/{len(whole)}"
    assert ask(hub, "GET", path, Range=f"bytes={len(whole)}-")[0] == 416
    hub.reset_next("GET", path)
    with pytest.raises(http.client.IncompleteRead) as broken:
        ask(hub, "GET", path)
    assert broken.value.partial == whole[: len(whole) // 2]
