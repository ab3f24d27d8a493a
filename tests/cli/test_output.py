"""What the command shows: help, lines, and standard output that is the result alone."""

import configparser
import json
import shutil
from dataclasses import replace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mashup_callback import __version__
from mashup_callback.cli import app
from mashup_callback.cli_output import find_table, merge_lines
from mashup_callback.report import CandidateRow
from tests.cli.running import ROOT, failure, mashup, output, process, strict_json
from tests.sharing.mashups import REPORT


COMMANDS = ("find", "rank", "merge", "push", "show")


def test_help_shows_an_example_of_every_command(tmp_path):
    for command in COMMANDS:
        done = mashup(command, "--help", cwd=tmp_path)
        assert (done.exit_code, done.stderr) == (0, "")
        assert f"Example: mashup {command} " in done.stdout
        assert "--json" in done.stdout
    done = mashup("--help", cwd=tmp_path)
    assert all(f"\n  {command} " in done.stdout for command in COMMANDS)


def test_help_does_not_wait_for_torch():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['mashup', '--help']\n"
        "try: runpy.run_module('mashup_callback.cli', run_name='__main__')\n"
        "finally: print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = process("-c", code)
    assert done.returncode == 0 and "Usage: mashup" in done.stdout
    assert "typer" in done.stderr.split()
    assert not {"torch", "transformers", "peft", "trl", "datasets", "mergekit"} & {*done.stderr.split()}


def test_stdout_of_a_process_is_the_result_alone(world):
    arguments = ("rank", world / "base", "--dataset", world / "text.jsonl", world / "runs/a1", "--sample-size=4")
    done = process("-m", "mashup_callback.cli", *map(str, arguments), "--json")
    assert done.returncode == 0, done.stderr
    there, here = strict_json(done.stdout), output(*arguments, cwd=world)
    [row], [expected] = there.pop("candidates"), here.pop("candidates")
    assert there == here
    assert row == expected | {"seconds": row["seconds"]}


def test_version_help_and_short_lines(tmp_path):
    assert mashup("--version", cwd=tmp_path).stdout == f"mashup-callback {__version__}\n"
    short = mashup("-h", cwd=tmp_path).stdout
    assert short == mashup("--help", cwd=tmp_path).stdout and "--install-completion" in short
    lines = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["-h"]).stdout.partition("Commands:")[2].strip().splitlines()
    assert len(lines) == len(COMMANDS) + 1 and all(line.endswith(".") and "..." not in line for line in lines)


def test_names_of_long_paths_are_told_apart_at_80_columns(world, tmp_path):
    for run in ("first", "second"):
        shutil.copytree(world / "runs/a1", tmp_path / "a-directory-of-the-team/with-a-long-name" / run / "final")
    done = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["find", str(world / "base"), str(tmp_path / "*/*/*")])
    assert done.exit_code == 0 and {"…/first/final", "…/second/final"} <= {*done.stdout.split()}


@pytest.mark.parametrize("width", [40, 80])
def test_names_and_reasons_are_readable_beside_a_long_license(width):
    row = {"name": "org/name", "revision": "a" * 40, "rank": 16, "bytes": 10**7, "reason": "broken"}
    with (console := Console(width=width)).capture() as shown:
        console.print(find_table([row | {"license": "x" * 100, "warnings": [], "repo_id": "org/name"}]))
    columns = zip(*(line.split("│")[1:-1] for line in shown.get().splitlines() if "│" in line), strict=True)
    found = ["".join(map(str.strip, cells)) for cells in columns]
    assert found == ["org/name", "aaaaaaa", "16", found[3], "x" * 100, "broken"] and "10.0" in found[3]


def test_a_name_in_what_was_merged_is_one_line_and_no_command_to_the_terminal(tmp_path):
    row = CandidateRow("runs/a\nb\x1b[2J", "unscored", weight=1.0, rank=4)
    shown = merge_lines(replace(REPORT, candidates=(row,)), tmp_path)
    assert shown.splitlines()[1:-1] == ["  100%  runs/a?b?[2J (rank 4)"]


def test_merge_says_what_it_did_and_replaces_only_when_told(world, tmp_path, monkeypatch):
    arguments = ("merge", "runs/a1", "runs/a2", "--weights=3,1", "--rank=1", "-o", tmp_path / "merged")
    text = mashup(*arguments, cwd=world).stdout
    kept = json.loads((tmp_path / "merged/report.json").read_text())["merge"]["kept_energy"]
    assert f"Merged 2 adapters by linear; rank 1 keeps {kept:.1%} of the merge:" in text
    assert " 75%  runs/a1 (rank 4)\n" in text and " 25%  runs/a2 (rank 4)\n" in text
    assert "--overwrite" in failure(*arguments, cwd=world)
    assert mashup(*arguments, "--overwrite", cwd=world).exit_code == 0
    monkeypatch.setenv("HOME", str(tmp_path))
    assert mashup(*arguments[:-1], "~/home", cwd=world).exit_code == 0
    assert (tmp_path / "home/report.json").is_file() and not (world / "~").exists()


def test_entry_point_leads_to_the_command():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options.entry_points"]["console_scripts"].strip().splitlines()
    assert lines == [f"{name} = mashup_callback.cli:app" for name in ("mashup", "hf-mashup")]


def test_wrong_usage_is_told_apart(tmp_path):
    done = mashup("find", cwd=tmp_path)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Missing argument 'MODEL'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("show", "nothing.json"), "nothing.json"),
        (("show", "text.jsonl"), "not a mashup report"),
        (("push", "runs", "acme/x"), "holds no report.json"),
        (("find", "base", "hub:colour=red"), "unknown key 'colour'"),
        (("rank", "base", "--dataset=text.jsonl", "./nothing"), "does not exist"),
        (("merge", "runs/a1", "runs/a2", "-o", "x", "--weights=1"), "Found 1 weights for 2 adapters"),
        (("merge", "runs/a1", "other", "-o", "x"), "other does not fit runs/a1: its model.layers.0."),
        (("merge", "runs/a1", "runs/a2", "-o", "x", "--method=ties", '--parameters={"density": 2}'), "is 2, expected"),
        (("rank", "nowhere", "--dataset=empty.jsonl", "runs/*"), "has no rows in its split 'train'"),
        (("rank", "nowhere", "--dataset=odd.jsonl", "runs/*"), "has the columns question; expected text, messages"),
        (("rank", "nowhere", "--dataset=splits", "--split=dev", "runs/*"), "has no split 'dev', expected one of"),
        (("show", "runs"), "expected a report, the directory of a mashup"),
        # All of these before the model is loaded, and with the words of the command.
        (("rank", "nowhere", "--dataset=missing.jsonl", "runs/*"), "There is no data file 'missing.jsonl'"),
        (("rank", "./nowhere", "--dataset=text.jsonl", "runs/*"), "There is no model directory './nowhere'"),
        (("find", "no/where/near", "runs/*"), "There is no model directory 'no/where/near'"),
        (("rank", "base", "--dataset=text.jsonl", "none/*"), "No adapter was found in none/*."),
        (("find", "base", "none/*"), "No adapter was found in none/*."),
        (("find", "base", "other"), "None of the 1 adapters could be used (other: trained on another base model"),
        (("merge", "runs/a1", "-o", "runs"), "runs is not empty. Choose another directory, or pass --overwrite"),
    ],
)
def test_a_failure_is_one_line_and_a_status(world, arguments, words):
    assert words in failure(*arguments, cwd=world)
    assert not (world / "x").exists()
