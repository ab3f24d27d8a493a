"""A directory for what a mashup needs on disk while it is made, gone when it is done."""

import shutil
import tempfile
from pathlib import Path

from .distributed import decided, is_main_process


class Workspace:
    """
    A temporary directory beside the mashup's, so that what is made there can be renamed into its place.

    It is made when first asked for; every process must ask at the same point.

    Args:
        directory (`Path`):
            Where the mashup will be.
    """

    def __init__(self, directory: Path) -> None:
        self._target = directory
        self._path: Path | None = None

    def path(self) -> Path:
        """Returns the directory."""
        if self._path is None:
            self._path = decided(self._make)
        return self._path

    def new(self, prefix: str) -> Path:
        """Returns a name in the directory that nothing has yet."""
        path = self.path()
        return decided(lambda: Path(tempfile.mkdtemp(prefix=f"{prefix}-", dir=path)) / "model")

    def close(self) -> None:
        """Removes the directory with all that is left in it."""
        if self._path is not None and is_main_process():
            shutil.rmtree(self._path, ignore_errors=True)

    def _make(self) -> Path:
        self._target.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{self._target.name}-", dir=self._target.parent)).resolve()
