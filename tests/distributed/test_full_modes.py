"""Full fine-tuning on several processes: what training starts from is what the merge on disk holds."""

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.distributed.launching import ROOT, _environment, torchrun
from tests.distributed.modes import SHIMMED
from tests.full import save_models
from tests.tiny import llama


has_deepspeed = importlib.util.find_spec("deepspeed") is not None
MODES = ["ddp", "native", "fsdp2", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("fsdp1", "zero3"))]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def world(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    save_models(directory, 2, tied=request.param)
    llama(tie_word_embeddings=request.param).save_pretrained(directory / "base")
    return directory


def run(directory: Path, mode: str, count: int, base: Path, candidates: str | None, **callback) -> list[dict]:
    directory.mkdir()
    values = {
        "mode": mode,
        "world": count,
        "shim": count > 1 and mode in SHIMMED,
        "directory": str(directory),
        "base": str(base),
        "candidates": candidates,
        "callback": callback,
    }
    command = torchrun(values, count, "full_worker")
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **_environment()}, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(count)]


def skip_without_deepspeed(mode):
    if mode == "zero3" and not has_deepspeed:
        pytest.skip("deepspeed is not installed")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_first_loss_is_that_of_the_merge_on_disk(tmp_path, world, mode, method):
    skip_without_deepspeed(mode)
    candidates = str(world / "model-*")
    ranks = run(tmp_path / "run", mode, 2, world / "base", candidates, guard=False, merge_method=method, top_k=2)
    assert {rank["decision"] for rank in ranks} == {"merged"}
    [alone] = run(tmp_path / "alone", "ddp", 1, tmp_path / "run/out/mashup", None)
    # The Trainer logs the same rows' mean; two processes each see half of them.
    assert ranks[0]["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert ranks[0]["losses"][0] == pytest.approx(alone["losses"][0], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fsdp1", "fsdp2", "zero3"])
def test_scoring_leaves_the_sharded_weights_as_they_were(tmp_path, world, mode):
    skip_without_deepspeed(mode)
    looked = run(tmp_path / "looked", mode, 2, world / "base", str(world / "model-*"), guard=False, dry_run=True)
    plain = run(tmp_path / "plain", mode, 2, world / "base", None)
    assert looked[0]["decision"] == "merged"
    assert [rank["losses"] for rank in looked] == [rank["losses"] for rank in plain]
