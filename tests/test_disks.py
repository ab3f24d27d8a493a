"""A full disk, and one that may not be written to, cost the mashup and nothing else."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.runs import TRAINERS, build, contents, forked, hidden, losses_without, train


@contextlib.contextmanager
def disk(directory, kilobytes):
    """A file system of its own, as root may have one."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(directory)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.parametrize("kind", TRAINERS)
def test_no_space_for_the_mashup(tmp_path, candidates, kind, monkeypatch, caplog):
    specs = candidates / f"{kind}/*"
    whole, expected = train(kind, tmp_path / "whole", specs)
    # Full weights are merged beside the mashup, with a look at the space before: it is gone after that.
    monkeypatch.setattr("mashup_callback.full.merge.check_space", lambda *args: None)
    monkeypatch.setattr("mashup_callback.full.trainee.check_space", lambda *args: None)
    fresh = losses_without(kind, tmp_path)
    with disk(tmp_path / "disk", 24) as small:
        report, found = train(kind, tmp_path / "out", specs, report_dir=str(small / "mashup"))
        # Why there is no mashup is said on the disk too, where there is space enough for that.
        assert not hidden(small) and not list(small.rglob("*.safetensors"))
        with pytest.raises(Exception, match="No space left"):
            train(kind, tmp_path / "out", specs, report_dir=str(small / "other"), on_error="raise")
        assert not (small / "other").exists() and not hidden(small)
    if kind == "lora":
        assert report.decision == whole.decision == "merged" and found == expected
        assert "could not be saved" in caplog.text
    else:
        assert report.decision == "scratch" and "No space left" in report.reason and found == fresh


def test_no_space_for_an_earlier_mashup_s_successor(tmp_path, candidates):
    with disk(tmp_path / "disk", 80) as small:
        train("lora", tmp_path / "out", candidates / "lora/*", report_dir=str(small / "mashup"))
        before = contents(small / "mashup")
        (small / "ballast").write_bytes(b"0" * (shutil.disk_usage(small).free - 4096))
        report, _ = train("lora", tmp_path / "out", candidates / "lora/*", report_dir=str(small / "mashup"))
        assert report.decision == "merged" and contents(small / "mashup") == before
        assert len(list(small.iterdir())) == 2


def test_no_space_for_scores(tmp_path, candidates, monkeypatch):
    expected = train("lora", tmp_path / "out", candidates / "lora/*")[1]
    # Room for one file.
    with disk(tmp_path / "disk", 4) as small:
        monkeypatch.setenv("MASHUP_CACHE", str(small))
        report, found = train("lora", tmp_path / "out", candidates / "lora/*")
        files = [path for path in small.rglob("*") if path.is_file()]
        assert report.decision == "merged" and found == expected and len(files) <= 1 and not hidden(small)


def test_no_right_to_write(candidates, caplog):
    home = Path(tempfile.mkdtemp())
    home.chmod(0o755)
    try:
        shutil.copytree(candidates / "lora", home / "library")
        for path in (home / "library").rglob("*"):
            path.chmod(0o755)
        (home / "closed").mkdir(mode=0o555)
        trainer, callback = build("lora", home / "out", home / "library/*", report_dir=str(home / "closed/mashup"))

        def as_nobody():
            os.setuid(65534)
            trainer.train()
            assert callback.report.decision == "merged"
            assert "could not be saved" in caplog.text and "Permission denied" in caplog.text

        assert forked(as_nobody) == 0
        assert not list((home / "closed").iterdir())
    finally:
        shutil.rmtree(home)
