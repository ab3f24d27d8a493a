import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from .server import HubServer


REPOSITORY_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A running, empty Hub."""
    with HubServer() as server:
        yield server


@pytest.fixture
def run_client(hub: HubServer, tmp_path: Path) -> Callable[..., Any]:
    """Run Python in a process of its own, against `hub` unless told otherwise, and return the JSON it prints last.

    The returned function takes source code or the path of a script, its arguments (as strings), and `env`
    (defaults to an anonymous client with an empty cache) and `timeout` in seconds (defaults to 60).
    """

    def run(source: str | Path, *args: object, env: Mapping[str, str] | None = None, timeout: float = 60) -> Any:
        env = dict(env or hub.environment(tmp_path / "hf_home"))
        env["PYTHONPATH"] = str(REPOSITORY_ROOT)
        program = [str(source)] if isinstance(source, Path) else ["-c", source]
        command = [sys.executable, *program, *map(str, args)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)
        assert done.returncode == 0, f"The client failed with code {done.returncode}:\n{done.stderr}"
        return json.loads(done.stdout.splitlines()[-1])

    return run
