"""What the loopback Hub holds: repositories, commits, files and users, all in memory."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property

from .access import HubError, User, require_write


LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack")
LFS_MINIMUM_BYTES = 10 * 1024 * 1024


def stores_as_lfs(path: str, size: int) -> bool:
    """Whether the Hub keeps a file of this name and size (bytes) in large file storage."""
    return path.endswith(LFS_SUFFIXES) or size > LFS_MINIMUM_BYTES


def git_blob_oid(data: bytes) -> str:
    """SHA-1 that git gives to a blob with this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class Blob:
    """Content of one file, and whether it is kept in large file storage."""

    data: bytes
    lfs: bool

    @property
    def size(self) -> int:
        return len(self.data)

    @cached_property
    def pointer(self) -> bytes:
        lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.etag}", f"size {self.size}", "")
        return "\n".join(lines).encode()

    @cached_property
    def etag(self) -> str:
        return hashlib.sha256(self.data).hexdigest() if self.lfs else git_blob_oid(self.data)

    @cached_property
    def oid(self) -> str:
        return git_blob_oid(self.pointer) if self.lfs else self.etag


@dataclass(frozen=True)
class Commit:
    """A tree of files; never changes, so everything derived from it is computed once."""

    sha: str
    title: str
    date: datetime
    tree: Mapping[str, Blob]

    @cached_property
    def derived(self) -> dict[str, object]:
        """Cache for the JSON views of this commit."""
        return {}


@dataclass
class Repository:
    """A model repository with its history; what is private is seen by members of its namespace only."""

    id: str
    created: datetime
    private: bool = False
    gated: bool | str = False
    downloads: int = 0
    granted: set[str] = field(default_factory=set)
    references: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    @property
    def head(self) -> Commit:
        return self.commits[self.references["main"]]

    def commit(
        self,
        added: Mapping[str, Blob],
        *,
        title: str,
        reference: str = "main",
        date: datetime | None = None,
    ) -> Commit:
        """Add a commit on top of a reference; equal seeds give equal shas."""
        parent = self.references.get(reference)
        tree = dict(self.commits[parent].tree) if parent else {}
        tree.update(added)
        identity = [self.id, parent, title, sorted((path, blob.oid) for path, blob in tree.items())]
        sha = hashlib.sha1(json.dumps(identity).encode()).hexdigest()
        commit = Commit(sha, title, date or datetime.now(timezone.utc), tree)
        self.commits[sha], self.references[reference] = commit, sha
        return commit

    def resolve(self, revision: str) -> Commit:
        """Commit of a branch, a `refs/...` name, or a full or abbreviated sha."""
        sha = self.references.get(revision.removeprefix("refs/heads/"), revision)
        matches = [known for known in self.commits if known.startswith(sha)] if len(sha) >= 7 else []
        if len(matches) != 1:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[matches[0]]

    def open_pull_request(self) -> str:
        """Branch a new `refs/pr/<n>` off main and return its name."""
        number = 1 + sum(name.startswith("refs/pr/") for name in self.references)
        reference = f"refs/pr/{number}"
        self.references[reference] = self.references["main"]
        return reference


@dataclass
class Store:
    """Everything that outlives a request, and who may see or change it."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    collections: dict[str, dict] = field(default_factory=dict)
    users: dict[str, User] = field(default_factory=dict)

    def readable(self, repo_id: str, user: User | None) -> Repository:
        """The repository, if this user may know of it; without a token it is a 401, as on the real Hub."""
        repository = self.repositories.get(repo_id)
        if repository is None or not may_see(repository, user):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        return repository

    def writable(self, repo_id: str, user: User | None) -> Repository:
        """The repository, if this user may push to it."""
        repository = self.readable(repo_id, user)
        require_write(user, repository.namespace)
        return repository


def may_see(repository: Repository, user: User | None) -> bool:
    """Private repositories are seen by members of their namespace only."""
    return not repository.private or (user is not None and user.belongs_to(repository.namespace))


def require_granted(repository: Repository, user: User | None, headers: Mapping[str, str]) -> None:
    """Refuse the files of a gated repository to everyone who has not been let in, with 401 or 403."""
    if not repository.gated:
        return
    if user is None:
        message = f"Access to model {repository.id} is restricted. You must have access to it and be authenticated."
        raise HubError(401, message, "GatedRepo", headers)
    if not user.belongs_to(repository.namespace) and user.name not in repository.granted:
        message = f"Access to model {repository.id} is restricted and you are not in the authorized list."
        raise HubError(403, message, "GatedRepo", headers)
