"""A loopback server that speaks enough of the Hub's HTTP for the unmodified `huggingface_hub` client."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType

from .access import User
from .faults import Faults
from .handler import Listener, Request, State
from .store import Blob, Repository, stores_as_lfs
from .views import timestamp


SEED_DATE = datetime(2026, 1, 1, tzinfo=timezone.utc)
INHERITED_SETTINGS = re.compile(r"HF_|HUGGING_?FACE|(https?|all|no)_proxy$", re.IGNORECASE)


class HubServer:
    """A Hub on 127.0.0.1, in a thread, for the length of a `with` block."""

    def __init__(self) -> None:
        self._state = State()
        # Any free one, and the same again after [`HubServer.down`].
        self._port = 0
        self._listener: Listener | None = None

    def __enter__(self) -> "HubServer":
        self._listener = Listener(self._port, self._state)
        self._port = self._listener.server_port
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    @contextmanager
    def down(self) -> Iterator[None]:
        """Close the port for the length of a `with` block; afterwards the same port answers again."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    @property
    def url(self) -> str:
        """Address, for `HF_ENDPOINT`."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def faults(self) -> Faults:
        return self._state.faults

    @property
    def requests(self) -> list[Request]:
        """Requests so far, in the order of their completion."""
        return self._state.log.entries()

    def reset_log(self) -> None:
        """Forget the requests so far."""
        self._state.log.clear()

    def downloaded(self, repo_id: str | None = None) -> int:
        """Bytes of files sent, of one repository or of all."""
        downloads = [request for request in self.requests if request.is_download]
        return sum(request.sent for request in downloads if repo_id in (None, request.repo_id))

    def seed(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        *,
        private: bool = False,
        gated: bool | str = False,
        downloads: int = 0,
    ) -> str:
        """Put files on a repository's main branch, with settings in place of an earlier seed's, and return the sha."""
        blobs = {path: Blob(data, stores_as_lfs(path, len(data))) for path, data in files.items()}
        with self._state.lock:
            store = self._state.store
            store.uploads.update((blob.etag, blob.data) for blob in blobs.values() if blob.lfs)
            repository = store.repositories.setdefault(repo_id, Repository(repo_id, SEED_DATE))
            repository.private, repository.gated = private, gated
            repository.downloads = downloads
            return repository.commit(blobs, title="seed", date=SEED_DATE).sha

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Content by path of what a repository holds at a revision."""
        with self._state.lock:
            commit = self._state.store.repositories[repo_id].resolve(revision)
            return {path: blob.data for path, blob in commit.tree.items()}

    def user(self, name: str, organizations: Sequence[str] = ()) -> str:
        """Sign a user up and return a token."""
        token = f"hf_{name}"
        self._state.store.users[token] = User(name, tuple(organizations))
        return token

    def grant(self, repo_id: str, user: str) -> None:
        """Let a user, by name, into a gated repository."""
        self._state.store.repositories[repo_id].granted.add(user)

    def collection(self, slug: str, repo_ids: Sequence[str], title: str = "Collection") -> None:
        """Publish a collection of models; the slug is `owner/name`."""
        items = [
            {"_id": f"{position:024x}", "type": "model", "id": repo_id, "position": position}
            for position, repo_id in enumerate(repo_ids)
        ]
        self._state.store.collections[slug] = {
            "slug": slug,
            "title": title,
            "owner": {"name": slug.split("/")[0], "type": "user"},
            "items": items,
            "lastUpdated": timestamp(SEED_DATE),
            "position": 0,
            "private": False,
            "theme": "green",
            "upvotes": 0,
        }

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """This process's environment for a client of this server, which reads its settings at import."""
        inherited = {key: value for key, value in os.environ.items() if not INHERITED_SETTINGS.match(key)}
        settings = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return inherited | settings | ({"HF_TOKEN": token} if token else {})
