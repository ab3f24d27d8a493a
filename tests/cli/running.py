"""Runs the command in this process, or in one of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mashup_callback.cli import app


ROOT = Path(__file__).parents[2]


def mashup(*arguments, cwd):
    """Runs the command offline and returns what it left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        return CliRunner(env={"COLUMNS": "200"}).invoke(app, [*map(str, arguments)], prog_name="mashup")


def process(*command):
    """Runs Python in a process of its own and returns what it left."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120)


def output(*arguments, **settings):
    """The JSON that a successful command prints: all of stdout, and nothing that JSON does not know."""
    done = mashup(*arguments, "--json", **settings)
    assert done.exit_code == 0, done.stderr
    return strict_json(done.stdout)


def strict_json(text):
    return json.loads(text, parse_constant=lambda constant: pytest.fail(constant))


def failure(*arguments, **settings):
    """The one line in which a command fails."""
    done = mashup(*arguments, **settings)
    assert isinstance(done.exception, SystemExit), done.exception
    return error_line(done.exit_code, done.stderr)


def error_line(code, stderr):
    assert (code, "Traceback" in stderr) == (1, False), stderr
    line = stderr.splitlines()[-1]
    assert line.startswith("mashup: error: ")
    return line
