"""The `mashup` command: what the package does, without a Trainer."""

import contextlib
import functools
import inspect
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

# Everything heavy is imported by the command that needs it: `mashup --help` must not wait for torch.
from .cli_output import find_table, merge_lines, one_line, rank_table, show_result


logger = logging.getLogger(__name__)

Result = tuple[Any, ...]
app = typer.Typer(
    help="Find, rank, merge and share LoRA adapters of one base model.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mashup-callback {import_module(__package__).__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = (
        False
    ),
) -> None:
    pass


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Base model: Hub name or local directory.")]
Specs = Annotated[
    list[str],
    typer.Argument(
        metavar="SPEC...",
        help="Adapters: directories and globs, org/name[/folder][@revision], hub:author=..,search=..,limit=.. or "
        "collection:org/slug.",
    ),
]
BaseName = Annotated[str | None, typer.Option(help="Hub name of the base model, where MODEL is a local directory.")]
MaxCandidates = Annotated[int, typer.Option(min=1, help="Adapters looked at.")]
MaxDownload = Annotated[float | None, typer.Option(help="Bound on downloads, in 10^9 bytes.")]
_AS_JSON = inspect.Parameter(
    "as_json",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")],
)
Licenses = Annotated[list[str] | None, typer.Option(help="License that an adapter of the Hub may have; repeatable.")]
Authors = Annotated[list[str] | None, typer.Option(help="User or organization it may come from; repeatable.")]


def _command(example: str) -> Callable[[Callable[..., Result]], Callable[..., None]]:
    """Registers a command that returns its result, as JSON and for people; a failure is one line and exit status 1."""

    def register(function: Callable[..., Result]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, as_json: bool, **kwargs: Any) -> None:
            logging.basicConfig(stream=sys.stderr, format="%(levelname)s: %(message)s")
            try:
                # Libraries print now and then, and stdout is for the result alone.
                with contextlib.redirect_stdout(sys.stderr):
                    value, shown, *problems = function(*args, **kwargs)
                show_result(value, shown, as_json)
                if any(problems):
                    raise ValueError(*problems)
            except Exception as error:
                # The last resort of a command line: whatever went wrong becomes one line.
                logger.debug("The command failed.", exc_info=error)
                typer.echo(f"mashup: error: {one_line(error)}", err=True)
                raise typer.Exit(1) from None

        signature = inspect.signature(function)
        run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), _AS_JSON])  # type: ignore
        return app.command(epilog=f"Example: {example}")(run)

    return register


@_command("mashup find acme/base 'runs/*' hub:author=acme,limit=50")
def find(
    model: Model,
    specs: Specs,
    base_model: BaseName = None,
    max_candidates: MaxCandidates = 64,
    allow_license: Licenses = None,
    allow_author: Authors = None,
) -> Result:
    """List the adapters that fit a base model."""
    from .candidates import Hub, check_specs, find_candidates

    check_specs(specs)
    from .without_trainer import base_of, describe_candidate

    base, hub = base_of(model, base_model), Hub()
    limits: Any = {"max_candidates": max_candidates, "allow_licenses": allow_license, "allow_authors": allow_author}
    found = find_candidates(specs, base.name, check=base.check, hub=hub, **limits)
    rows = [describe_candidate(candidate, base.check) for candidate in found]
    problem = None if any(row["reason"] is None for row in rows) else _none_fits(specs, rows)
    return {"model": model, "candidates": rows, "hub": hub.traffic()}, find_table(rows), problem


@_command("mashup rank acme/base --dataset train.jsonl 'runs/*' acme/adapter@main")
def rank(
    model: Model,
    specs: Specs,
    dataset: Annotated[str, typer.Option(help="File (json, jsonl, csv, parquet), directory or Hub data set.")],
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    subset: Annotated[str | None, typer.Option(help="Configuration of a Hub data set.")] = None,
    sample_size: Annotated[int, typer.Option(min=1, help="Rows to score on.")] = 256,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a forward pass.")] = 8,
    metric: Annotated[str, typer.Option(help="loss or token_accuracy.")] = "loss",
    search: Annotated[str, typer.Option(help="racing or exhaustive.")] = "racing",
    assistant_only_loss: Annotated[bool, typer.Option(help="Chats: score the assistant's turns only.")] = False,
    dtype: Annotated[str, typer.Option(help="Data type of the model, such as bfloat16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 42,
    base_model: BaseName = None,
    max_candidates: MaxCandidates = 64,
    max_download_gb: MaxDownload = 10.0,
    allow_license: Licenses = None,
    allow_author: Authors = None,
) -> Result:
    """
    Rank adapters by their loss on your data.

    The data are tokenized as TRL's SFTTrainer does.
    """
    from .candidates import Hub, check_specs, find_candidates

    check_specs(specs)
    from transformers import AutoModelForCausalLM

    from .cli_rows import load_rows, sft_rows
    from .config import MashupConfig
    from .pipeline import candidate_rows
    from .without_trainer import base_of, score

    MashupConfig.from_texts({"metric": metric, "search": search})
    # What can be wrong comes before the model is loaded: the data, the model's name, the adapters.
    drawn, base, hub = load_rows(dataset, split, subset, sample_size, seed), base_of(model, base_model), Hub()
    limits: Any = {"max_candidates": max_candidates, "allow_licenses": allow_license, "allow_authors": allow_author}
    limits["max_download_gb"] = max_download_gb
    found = find_candidates(specs, base.name, check=base.check, hub=hub, **limits)
    if all(candidate.reason for candidate in found):
        raise ValueError(_none_fits(specs, [*map(asdict, found)]))
    net = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    rows = sft_rows(net, drawn, max_length, batch_size, assistant_only_loss)
    scores, base_loss = score(net, found, rows, metric, search=search, keep=3, base_model=base.name, hub=hub)
    ranked = candidate_rows(scores, {})
    values = [*map(asdict, ranked)]
    problem = None if any(row.loss is not None for row in ranked) else _none_fits(specs, values)
    value = {"model": model, "base_loss": base_loss, "candidates": values, "hub": hub.traffic()}
    return value, rank_table(ranked, base_loss), problem


@_command("mashup merge runs/a runs/b --weights 0.7,0.3 -o merged")
def merge(
    specs: Specs,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    weights: Annotated[str, typer.Option(help="equal, or one number for each adapter.")] = "equal",
    method: Annotated[str, typer.Option(help="Any method of mergekit.")] = "linear",
    parameters: Annotated[str, typer.Option(help="The method's parameters, as JSON.")] = "{}",
    space: Annotated[str, typer.Option(help="delta, core or factors.")] = "delta",
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the merge; the largest of the adapters'.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of methods that draw random numbers.")] = 42,
    base_model: Annotated[str | None, typer.Option(help="Hub name of the base model to record.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier merge.")] = False,
) -> Result:
    """
    Merge adapters into one.

    A PEFT adapter is written, with model card, report and mergekit configuration. A run's checkpoints are left out
    where its final adapter is found with them.
    """
    from .candidates import Hub, check_specs, download_candidate, find_candidates

    check_specs(specs)
    # A shell leaves `--output=~/merged` as it is.
    output = output.expanduser()
    if not overwrite and output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty. Choose another directory, or pass --overwrite for an earlier merge.")
    from .config import MashupConfig
    from .without_trainer import finished, save_merge, usable

    hub = Hub()
    found = finished(find_candidates(specs, base_model, hub=hub))
    adapters = usable([download_candidate(candidate, hub) for candidate in found])
    settings = {"weights": weights, "merge_method": method, "merge_parameters": parameters, "merge_space": space}
    config = MashupConfig.from_texts(settings | {"top_k": len(adapters), "seed": seed, "base_model": base_model})
    report = save_merge(output, adapters, config, rank=rank)
    return json.loads(report.to_json()) | {"path": str(output)}, merge_lines(report, output)


@_command("mashup push runs/new/mashup acme/start --private")
def push(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a mashup.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="Hub repository, org/name.")],
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a new repository.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    base_model: Annotated[str | None, typer.Option(help="Hub name of the base model to record.")] = None,
    license: Annotated[str | None, typer.Option(help="License for the model card, such as apache-2.0.")] = None,
) -> Result:
    """Push a mashup to the Hub, with its model card."""
    from .sharing import push_mashup

    logging.getLogger("mashup_callback.sharing.push").setLevel(logging.INFO)
    url = push_mashup(directory, repo_id, private, create_pr, base_model=base_model, license=license)
    return {"url": url}, url


@_command("mashup show runs/new/mashup/report.json")
def show(
    report: Annotated[Path, typer.Argument(metavar="REPORT", help="report.json, a mashup's directory or a run's.")],
) -> Result:
    """Show what a mashup found, did and why."""
    from .report import FAILED_NAME, MashupReport

    loaded = MashupReport.load(report)
    for failed in filter(Path.is_file, (report / FAILED_NAME, report / "mashup" / FAILED_NAME)):
        logger.warning("A later run made no mashup: `mashup show %s` says why.", failed)
    return json.loads(loaded.to_json()), loaded


@_command("mashup cache --clear")
def cache(clear: Annotated[bool, typer.Option("--clear", help="Remove all scores.")] = False) -> Result:
    """Show or remove the scores that are kept between runs."""
    from .scoring import ScoreCache

    scores = ScoreCache()
    removed = scores.clear() if clear else 0
    info = scores.info()
    kept = f"Removed {removed} scores from" if clear else f"{info.scores} scores, {info.bytes:,} bytes in"
    shown = f"{kept} {info.directory}" if info.directory else "Nothing is kept."
    return asdict(info) | {"removed": removed}, shown


def _none_fits(specs: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return f"No adapter was found in {', '.join(specs)}."
    reasons = "; ".join(f"{row['name']}: {row['reason']}" for row in rows[:3])
    return f"None of the {len(rows)} adapters could be used ({reasons})."


if __name__ == "__main__":
    app(prog_name="mashup")
