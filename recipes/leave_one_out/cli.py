"""The command line: prepare the world, run the jobs, write the tables, the figures and the report."""

import argparse
import dataclasses
import os
import time
from pathlib import Path

import torch

from .jobs import read_results, run_jobs
from .outputs import write_outputs
from .protocol import Job, plan, plan_library
from .sweep import plan_tuned
from .worlds import WORLDS, World, load_world
from .worlds.base import EVERY_ARM


def parser(description: str | None) -> argparse.ArgumentParser:
    """Makes the command line's parser."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--world", default="quickstart", choices=[name.replace("_", "-") for name in WORLDS])
    made.add_argument("--full", action="store_true", help="train all weights, from full checkpoints (quickstart only)")
    made.add_argument("--fast", action="store_true", help="small sizes: minutes instead of hours")
    made.add_argument("--output-dir", type=Path, help="default: outputs/leave_one_out/<world>")
    made.add_argument("--jobs", type=int, help="processes; default: one a GPU, else one a core")
    made.add_argument("--ray", action="store_true", help="run on a Ray cluster")
    made.add_argument("--model", help="base model, for the worlds that have a choice")
    made.add_argument("--arms", nargs="+", choices=EVERY_ARM, help="these arms only")
    made.add_argument("--tasks", nargs="+", help="these tasks only")
    made.add_argument("--seeds", nargs="+", type=int, help="these seeds only")
    made.add_argument("--steps", type=int, help="optimizer steps of a run")
    made.add_argument("--no-studies", action="store_true", help="the main table only: no sweep, no rows, no methods")
    made.add_argument("--report-only", action="store_true", help="write the outputs of what is done, run nothing")
    return made


def main(description: str | None = None, arguments: list[str] | None = None) -> None:
    """Runs the experiment."""
    options = parsed(parser(description), arguments)
    output_dir = options.output_dir or Path("outputs/leave_one_out") / (options.world + "-fast" * options.fast)
    started = time.perf_counter()
    home = (output_dir / "world").absolute()
    world = narrowed(load_world(options.world, home, options.fast, options.model), options)
    jobs: list[Job] = []
    if not options.report_only:
        world.prepare()
        _run(list(plan_library(world, options.model)), output_dir, options)
    more = list(plan(world, options.model))
    while more:
        if not options.report_only:
            _run(more, output_dir, options)
        jobs += more
        more = [job for job in plan_tuned(world, read_results(output_dir, jobs), options.model) if job not in jobs]
    paths = write_outputs(read_results(output_dir, jobs), world, output_dir)
    print(f"{time.perf_counter() - started:.0f} s in all. Written: {', '.join(map(str, paths))}")


def _run(jobs: list[Job], output_dir: Path, options: argparse.Namespace) -> None:
    workers = options.jobs or torch.cuda.device_count() or os.cpu_count()
    run_jobs(jobs, output_dir, options.fast, workers, options.ray)


def parsed(made: argparse.ArgumentParser, arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; `--full` names the world in which all weights are trained."""
    options = made.parse_args(arguments)
    if options.full:
        full = f"{options.world.removesuffix('-full')}-full"
        if full.replace("-", "_") not in WORLDS:
            made.error(f"--full: the world {options.world} has no version in which all weights are trained")
        options.world = full
    return options


def narrowed(world: World, options: argparse.Namespace) -> World:
    """Applies the command line's choices to the world's budget."""
    changes = {name: tuple(value) for name in ("arms", "tasks", "seeds") if (value := getattr(options, name))}
    meaningless = [arm for arm in changes.get("arms", ()) if arm not in world.all_arms]
    if meaningless:
        print(f"Skipped, as these arms need a LoRA adapter to initialize: {', '.join(meaningless)}")
        changes["arms"] = tuple(arm for arm in changes["arms"] if arm in world.all_arms)
    changes["tuned"] = tuple(arm for arm in world.budget.tuned if arm in changes.get("arms", world.budget.arms))
    if options.steps:
        changes["steps"] = options.steps
    if options.no_studies:
        changes |= {"learning_rates": (), "sample_sizes": (), "methods": (), "tuned": ()}
    unknown = set(changes.get("tasks", ())) - set(world.library_tasks)
    if unknown:
        raise ValueError(f"unknown tasks {sorted(unknown)}, expected some of {', '.join(world.library_tasks)}.")
    world.budget = dataclasses.replace(world.budget, **changes)
    return world
