"""Endpoints that read: listings, model info, trees, files, collections."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs

from . import views
from .access import HubError, require_token
from .routing import REPO_ID, REVISION, Call, Reply, paginate, ranged, route
from .store import Store, may_see, require_granted


READABLE_WHILE_GATED = ("README.md", ".gitattributes")


@route("GET", "/api/whoami-v2")
def whoami(store: Store, call: Call) -> Reply:
    user = require_token(call.user)
    organizations = [{"type": "org", "id": name, "name": name} for name in user.organizations]
    token = {"accessToken": {"displayName": "test", "role": "write"}}
    return Reply.of_json({"type": "user", "id": user.name, "name": user.name, "orgs": organizations, "auth": token})


@route("GET", "/api/models")
def list_models(store: Store, call: Call) -> Reply:
    infos = [
        views.model_info(repository, repository.head)
        for repository in store.repositories.values()
        if may_see(repository, call.user)
    ]
    infos = [info for info in infos if matches_query(info, call)]
    if order := call.first("sort"):
        infos.sort(key=lambda info: info.get(order) or 0, reverse=True)
    page, headers = paginate(infos, call)
    return Reply.of_json([views.listing_row(info, call.query) for info in page], **headers)


def matches_query(info: Mapping[str, Any], call: Call) -> bool:
    wanted = set(call.query.get("filter", []))
    return (
        wanted.issubset(info["tags"])
        and call.first("author", info["author"]) == info["author"]
        and call.first("search").lower() in info["id"].lower()
        and call.first("gated", str(bool(info["gated"])).lower()) == str(bool(info["gated"])).lower()
    )


@route("GET", f"/api/models/{REPO_ID}(?:/revision/{REVISION})?")
def model_info(store: Store, call: Call, repo_id: str, revision: str) -> Reply:
    repository = store.readable(repo_id, call.user)
    info = views.model_info(repository, repository.resolve(revision or "main"), blobs="blobs" in call.query)
    return Reply.of_json(views.select(info, call.query["expand"]) if "expand" in call.query else info)


@route("GET", f"/api/models/{REPO_ID}/tree/{REVISION}(?:/(?P<folder>.+))?")
def tree(store: Store, call: Call, repo_id: str, revision: str, folder: str) -> Reply:
    commit = store.readable(repo_id, call.user).resolve(revision)
    prefix = f"{folder}/" if folder else ""
    recursive = call.first("recursive").lower() == "true"
    below = [entry for path, entry in sorted(views.tree_entries(commit).items()) if path.startswith(prefix)]
    if folder and not below:
        raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    return Reply.of_json([entry for entry in below if recursive or "/" not in entry["path"][len(prefix) :]])


@route("POST", f"/api/models/{REPO_ID}/paths-info/{REVISION}")
def paths_info(store: Store, call: Call, repo_id: str, revision: str) -> Reply:
    entries = views.tree_entries(store.readable(repo_id, call.user).resolve(revision))
    is_json = "json" in call.headers.get("Content-Type", "")
    paths = (call.json() if is_json else parse_qs(call.body.decode())).get("paths", [])
    return Reply.of_json([entries[path.rstrip("/")] for path in paths if path.rstrip("/") in entries])


@route("GET", f"/{REPO_ID}/resolve/{REVISION}/(?P<path>.+)")
def resolve(store: Store, call: Call, repo_id: str, revision: str, path: str) -> Reply:
    repository = store.readable(repo_id, call.user)
    commit = repository.resolve(revision)
    headers = {"X-Repo-Commit": commit.sha}
    if path not in READABLE_WHILE_GATED:
        require_granted(repository, call.user, headers)
    if path not in commit.tree:
        raise HubError(404, "Entry not found", "EntryNotFound", headers)
    blob = commit.tree[path]
    headers |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    if blob.lfs:
        headers |= {"X-Linked-Size": str(blob.size), "X-Linked-Etag": f'"{blob.etag}"'}
    return ranged(blob.data, call.headers.get("Range", ""), headers)


@route("GET", "/api/collections/(?P<slug>.+)")
def get_collection(store: Store, call: Call, slug: str) -> Reply:
    if slug not in store.collections:
        raise HubError(404, "Collection not found")
    return Reply.of_json(store.collections[slug])
