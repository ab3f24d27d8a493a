"""Endpoints that write: creating repositories, uploading large files, committing, opening pull requests."""

import base64
import hashlib
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import yaml

from . import views
from .access import HubError, require_token, require_write
from .routing import REPO_ID, REVISION, Call, Reply, route
from .store import Blob, Commit, Repository, Store, stores_as_lfs


@route("POST", "/api/repos/create")
def create_repo(store: Store, call: Call) -> Reply:
    asked = call.json()
    namespace = asked.get("organization") or require_token(call.user).name
    require_write(call.user, namespace)
    repo_id = f"{namespace}/{asked['name']}"
    url = {"url": f"{call.origin}/{repo_id}", "name": repo_id}
    if repo_id in store.repositories:
        return Reply.of_json({**url, "error": "You already created this model repo"}, 409)
    repository = Repository(repo_id, datetime.now(timezone.utc), private=asked.get("visibility") == "private")
    repository.commit({}, title="initial commit")
    store.repositories[repo_id] = repository
    return Reply.of_json(url)


@route("POST", "/api/validate-yaml")
def validate_yaml(store: Store, call: Call) -> Reply:
    try:
        parsed = views.front_matter(call.json()["content"])
    except yaml.YAMLError as error:
        return Reply.of_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
    warnings = [] if parsed else [{"message": "empty or missing yaml metadata in repo card"}]
    return Reply.of_json({"errors": [], "warnings": warnings})


@route("POST", f"/api/models/{REPO_ID}/preupload/{REVISION}")
def preupload(store: Store, call: Call, repo_id: str, revision: str) -> Reply:
    commit = pushable(store, call, repo_id).resolve(revision)
    return Reply.of_json({"files": [upload_mode(commit, asked) for asked in call.json()["files"]]})


def upload_mode(commit: Commit, asked: Mapping[str, Any]) -> dict[str, Any]:
    mode = "lfs" if stores_as_lfs(asked["path"], asked["size"]) else "regular"
    present = {"oid": commit.tree[asked["path"]].etag} if asked["path"] in commit.tree else {}
    return {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, **present}


def pushable(store: Store, call: Call, repo_id: str) -> Repository:
    """The repository a push goes to: anyone with a write token may open a pull request, members may commit."""
    if "create_pr" in call.query:
        require_token(call.user)
        return store.readable(repo_id, call.user)
    return store.writable(repo_id, call.user)


@route("POST", f"/{REPO_ID}\\.git/info/lfs/objects/batch")
def lfs_batch(store: Store, call: Call, repo_id: str) -> Reply:
    require_token(call.user)
    store.readable(repo_id, call.user)
    objects = [
        asked if asked["oid"] in store.uploads else {**asked, "actions": lfs_actions(call.origin, asked["oid"])}
        for asked in call.json()["objects"]
    ]
    return Reply.of_json({"transfer": "basic", "objects": objects})


def lfs_actions(origin: str, oid: str) -> dict[str, dict[str, str]]:
    return {"upload": {"href": f"{origin}/api/lfs/{oid}"}, "verify": {"href": f"{origin}/api/lfs-verify"}}


@route("PUT", "/api/lfs/(?P<oid>[0-9a-f]{64})")
def lfs_upload(store: Store, call: Call, oid: str) -> Reply:
    if hashlib.sha256(call.body).hexdigest() != oid:
        raise HubError(400, "The content does not have the announced sha256")
    store.uploads[oid] = call.body
    return Reply()


@route("POST", "/api/lfs-verify")
def lfs_verify(store: Store, call: Call) -> Reply:
    announced = call.json()
    if len(store.uploads.get(announced["oid"], b"")) != announced["size"]:
        raise HubError(404, "The upload has not arrived in full")
    return Reply.of_json({})


@route("POST", f"/api/models/{REPO_ID}/commit/{REVISION}")
def commit(store: Store, call: Call, repo_id: str, revision: str) -> Reply:
    repository = pushable(store, call, repo_id)
    header, added = read_operations(store, call.body)
    opened = repository.open_pull_request() if "create_pr" in call.query else None
    reference = (opened or revision).removeprefix("refs/heads/")
    sha = repository.commit(added, title=header["summary"], reference=reference).sha
    page = f"{call.origin}/{repo_id}"
    reply = {"success": True, "commitOid": sha, "commitUrl": f"{page}/commit/{sha}", "hookOutput": ""}
    if opened:
        reply["pullRequestUrl"] = f"{page}/discussions/{opened.rsplit('/', 1)[1]}"
    return Reply.of_json(reply)


def read_operations(store: Store, body: bytes) -> tuple[dict[str, Any], dict[str, Blob]]:
    """Header and added files of a commit sent as newline-delimited JSON."""
    header: dict[str, Any] = {}
    added: dict[str, Blob] = {}
    for operation in map(json.loads, body.splitlines()):
        kind, value = operation["key"], operation["value"]
        if kind == "header":
            header = value
        elif kind == "file":
            added[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
        elif kind == "lfsFile":
            added[value["path"]] = Blob(uploaded(store, value["oid"]), lfs=True)
        else:
            raise HubError(400, f"Unknown operation {kind} in commit")
    return header, added


def uploaded(store: Store, oid: str) -> bytes:
    if oid not in store.uploads:
        raise HubError(400, f"LFS object {oid} was never uploaded")
    return store.uploads[oid]
