"""The description of a candidate."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Candidate:
    """
    An adapter or model that a mashup may use.

    Args:
        name (`str`): Path as given and expanded, or Hub repository (with folder).
        kind (`str`, *optional*, defaults to `"adapter"`): `"adapter"` or `"model"` (a full checkpoint).
        path (`Path`, *optional*): Local directory; None until downloaded.
        repo_id (`str`, *optional*): Hub repository.
        subfolder (`str`, *optional*): Folder in the repository.
        revision (`str`, *optional*): Commit of the repository, 40 hexadecimal digits.
        run (`str`, *optional*): Identity of the training run, which a run's checkpoints share.
        license (`str`, *optional*): License that the repository states.
        bytes (`int`, *optional*): Size of the weights.
        rank (`int`, *optional*): Largest rank of an adapter of the Hub, as its header states.
        reason (`str`, *optional*): Why it cannot be used; None while it can.
        files (`tuple[str, ...]`): Its files on the Hub, in its folder.
        datasets (`tuple[str, ...]`): Data sets that the repository states.
    """

    name: str
    kind: str = "adapter"
    path: Path | None = None
    repo_id: str | None = None
    subfolder: str | None = None
    revision: str | None = None
    run: str = ""
    license: str | None = None
    bytes: int | None = None
    rank: int | None = None
    reason: str | None = None
    files: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str | None]:
        """What tells it from other candidates: two revisions of a repository share the name."""
        return self.name, self.revision
