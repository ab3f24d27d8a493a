"""Running jobs: each writes its own file, whole or not at all; what is there already is not run again."""

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from joblib import Parallel, delayed

from .arms import begin
from .protocol import LIBRARY, Begin, Job, Point, train
from .worlds import World, load_world


def run_jobs(jobs: Sequence[Job], output_dir: Path, fast: bool = False, workers: int = 1, ray: bool = False) -> None:
    """Runs the jobs that have no result yet: in processes on this machine, one a GPU, or on a Ray cluster."""
    missing = [job for job in jobs if not result_path(output_dir, job).is_file()]
    print(f"{len(jobs)} jobs, {len(jobs) - len(missing)} of them done", flush=True)
    # Trained adapters are made in the parent's world: its workers only read it.
    function = partial(run_job, output_dir=output_dir.absolute(), fast=fast)
    if ray:
        _run_on_ray(function, missing)
    else:
        Parallel(n_jobs=workers, batch_size=1, pre_dispatch="all")(delayed(function)(job) for job in missing)


def run_job(job: Job, output_dir: Path, fast: bool = False) -> None:
    """Runs one job and writes its result."""
    path = result_path(output_dir, job)
    if path.is_file():
        return
    claim_gpu()
    # A user has no scores of the target yet, so every run pays for its own. Workers have an environment each.
    os.environ["MASHUP_CACHE"] = ""
    world = load_world(job.world, output_dir / "world", fast, job.model)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory, _logged(output_dir / "logs" / f"{job.key}.txt"):
        start = begin(world, job, Path(directory))
        points, model = train(world, job, start)
        if job.arm == LIBRARY:
            _save(world, job, model)
        final = {} if job.arm == LIBRARY else world.final(model, job.task)
    write(path, result(job, start, points, final))
    print(f"{path.stem}: {points[-1].value:.4f}, {time.perf_counter() - started:.0f} s", flush=True)


def result_path(output_dir: Path, job: Job) -> Path:
    """Where a job's result is."""
    return Path(output_dir) / "jobs" / f"{job.key}.json"


def result(job: Job, start: Begin, points: Sequence[Point], final: dict[str, float]) -> dict:
    """What is kept of a job: its settings, its curve, what it chose and what that cost, what was measured last."""
    reports = [mashup.report for mashup in start.mashups]
    last = reports[-1] if reports else None
    names = [row.name for row in last.candidates if row.weight] if last and last.decision != "scratch" else []
    return {
        "job": asdict(job),
        "curve": [asdict(point) for point in points],
        "final": final,
        "overhead": start.overhead,
        "decision": last.decision if last else "",
        "chosen": list(start.chosen) or [Path(name).name for name in names],
    }


def write(path: Path, values: dict) -> None:
    """Writes JSON under a name that appears only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(values, indent=1), encoding="utf-8")
    temporary.replace(path)


def read_results(output_dir: Path, jobs: Sequence[Job]) -> list[dict]:
    """Reads the results of those jobs that are done."""
    paths = [result_path(output_dir, job) for job in jobs]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def claim_gpu() -> None:
    """Gives a joblib worker the GPU of its own number. Ray does this itself."""
    number = re.fullmatch(r"LokyProcess-(\d+)", multiprocessing.current_process().name)
    # Counting devices through the driver does not initialize CUDA, which would fix the choice.
    if number and "CUDA_VISIBLE_DEVICES" not in os.environ and (count := torch.cuda.device_count()):
        os.environ["CUDA_VISIBLE_DEVICES"] = str((int(number[1]) - 1) % count)


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Sends what a job prints to a file: the tables and progress bars of many jobs would overwrite each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


def _save(world: World, job: Job, model: torch.nn.Module) -> None:
    target = world.adapter(job.task)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    world.save_adapter(model, draft)
    draft.replace(target)


def _run_on_ray(function: Callable[[Job], None], jobs: Sequence[Job]) -> None:
    try:
        import ray
    except ImportError as error:
        raise ImportError('--ray needs Ray, from a clone: pip install -e ".[cluster]".') from error
    # The directory that holds the package `recipes`, for nodes where the clone is not installed.
    root = Path(__file__).resolve().parents[2]
    ray.init(ignore_reinit_error=True, runtime_env={"env_vars": {"PYTHONPATH": str(root)}})
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    remote = ray.remote(num_gpus=gpus, max_retries=2)(lambda job: function(job))
    ray.get([remote.remote(job) for job in jobs])
