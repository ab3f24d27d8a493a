"""What was found, what was done and why: as a dataclass, a JSON file and a table."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .checked import from_values, parse_json
from .short_names import told_apart


if TYPE_CHECKING:
    from .guard import Start
    from .scoring import Score

# In a report and in the metadata of an adapter's weights: what peft or a user saves there later lacks it.
MARK = {"producer": "mashup_callback"}
REPORT_NAME = "report.json"
# The report of a run that failed where an earlier one had left a merge.
FAILED_NAME = "failed.json"
SCHEMA = 1
"""Version of the report's JSON; a field that is added does not change it."""
_PACKAGES = ("mashup-callback", "torch", "transformers", "peft", "accelerate", "trl", "mergekit", "huggingface_hub")


@dataclass(frozen=True)
class CandidateRow:
    """
    One candidate in the report.

    Args:
        name (`str`): Path or repository id.
        status (`str`): `"scored"`, `"eliminated"`, `"rejected"`, `"failed"`, or `"unscored"` where there was no data.
        revision (`str`, *optional*): Commit sha of a Hub candidate.
        reason (`str`, *optional*): Why it was not scored to the end.
        loss (`float`, *optional*): Loss per label token on the rows it was scored on; None if never scored.
        accuracy (`float`, *optional*): Token accuracy on these rows.
        probe_loss (`float`, *optional*): Loss per label token after a few steps of training, with `metric="probe"`.
        rows (`int`): Rows it was scored on.
        tokens (`int`): Label tokens in them.
        weight (`float`, *optional*): Its weight in the merge; None if it is not in it.
        rank (`int`, *optional*): Its largest rank.
        license (`str`, *optional*): Its licence.
        bytes (`int`, *optional*): Size of its weights.
        seconds (`float`): Time spent on scoring it.
        warnings (`tuple[str, ...]`): What is odd about it.
        repo_id (`str`, *optional*): Repository of a Hub candidate.
    """

    name: str
    status: str
    revision: str | None = None
    reason: str | None = None
    loss: float | None = None
    accuracy: float | None = None
    probe_loss: float | None = None
    rows: int = 0
    tokens: int = 0
    weight: float | None = None
    rank: int | None = None
    license: str | None = None
    bytes: int | None = None
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    repo_id: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether the name is a path on the machine that made the report."""
        return self.repo_id is None and self.revision is None


@dataclass(frozen=True)
class MergeInfo:
    """
    How the candidates were merged.

    Args:
        method (`str`): mergekit's name of the method.
        space (`str`): `"delta"`, `"core"` or `"factors"`; `"weights"` for full models.
        parameters (`dict`): The method's parameters.
        rank (`int`): Largest rank of the merge.
        kept_energy (`float`): Share of the merge's squared Frobenius norm that the trainee's ranks keep.
        kept_energy_by_module (`dict[str, float]`): The same for each layer.
        lost_energy (`float`): Share of it in layers that the trainee lacks.
        lost_layers (`tuple[str, ...]`): These layers.
        mergekit_version (`str`): Version of mergekit.
    """

    method: str
    space: str
    parameters: dict[str, Any]
    rank: int
    kept_energy: float
    kept_energy_by_module: dict[str, float]
    lost_energy: float
    lost_layers: tuple[str, ...]
    mergekit_version: str


@dataclass(frozen=True)
class RaceRound:
    """
    One comparison of a race.

    Args:
        rows (`int`): Rows on which the candidates were compared.
        entered (`int`): Candidates that were scored on them.
        kept (`int`): Candidates that went on, or are left at the end.
    """

    rows: int
    entered: int
    kept: int


@dataclass(frozen=True)
class MashupReport:
    """
    What a mashup found, did and why.

    Args:
        decision (`str`): What training starts from: `"merged"`, `"single"` (the best candidate alone) or `"scratch"`.
        reason (`str`): Why.
        base_loss (`float`, *optional*): Held-out loss of the fresh initialization.
        merged_loss (`float`, *optional*): Held-out loss of the merge.
        single_loss (`float`, *optional*): Held-out loss of the best single candidate, at the trainee's rank.
        gain (`float`, *optional*): How far below `base_loss` the start is, or the best one that was refused.
        gain_se (`float`, *optional*): Standard error of the gain over the held-out rows; None if it is unknown.
        swapped_loss (`float`, *optional*): Loss on one held-out batch after the swap, with the model as it is trained.
        expected_loss (`float`, *optional*): What the guard found on that batch for what was written.
        candidates (`tuple[CandidateRow, ...]`): One row each, the best first.
        rounds (`tuple[RaceRound, ...]`): Comparisons on growing samples, the first one first.
        merge (`MergeInfo`, *optional*): How the candidates were merged.
        base_model (`str`, *optional*): Name of the base model.
        dry_run (`bool`): Whether the model was left alone whatever the decision.
        timings (`dict[str, float]`): Seconds for each stage, and in all.
        hub (`dict[str, float]`): Traffic with the Hub: requests, bytes received, and seconds that it took.
        config (`dict`): The settings.
        environment (`dict`): Versions and hardware.
        sample (`dict[str, int]`): Rows that selected and were held out, duplicates among them, rows without a label.
        schema (`int`): Version of the JSON.
    """

    decision: str
    reason: str
    base_loss: float | None = None
    merged_loss: float | None = None
    single_loss: float | None = None
    gain: float | None = None
    gain_se: float | None = None
    swapped_loss: float | None = None
    expected_loss: float | None = None
    candidates: tuple[CandidateRow, ...] = ()
    rounds: tuple[RaceRound, ...] = ()
    merge: MergeInfo | None = None
    base_model: str | None = None
    dry_run: bool = False
    timings: dict[str, float] = field(default_factory=dict)
    hub: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    sample: dict[str, int] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def is_full(self) -> bool:
        """Whether full models were merged, and not adapters."""
        return self.merge is not None and self.merge.space == "weights"

    @property
    def seconds(self) -> float:
        """Time that the mashup took in all."""
        return sum(self.timings.values())

    def to_json(self) -> str:
        """Returns the report as JSON, which [`MashupReport.from_json`] reads back."""
        return json.dumps(MARK | asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "MashupReport":
        """
        Reads a report.

        Args:
            text (`str`):
                What [`MashupReport.to_json`] returned.

        Raises:
            ValueError: The text is not a report, or one of another version.
        """
        values = parse_json(text)
        if not isinstance(values, dict) or not {"decision", "reason"} <= set(values):
            raise ValueError("This is not a mashup report: expected a JSON object with `decision` and `reason`.")
        if values.get("schema") != SCHEMA:
            raise ValueError(
                f"This mashup report has `schema` {values.get('schema')!r}, expected {SCHEMA}: another version of "
                "mashup_callback wrote it. Read it with that version, or make the mashup anew."
            )
        return from_values(cls, values, "This mashup report")

    def save(self, path: str | os.PathLike) -> Path:
        """Writes the report as JSON, to a temporary name first."""
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(self.to_json(), encoding="utf-8")
        temporary.replace(path)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "MashupReport":
        """Reads `report.json`, the one in a directory, or in the `mashup` directory of a run's output."""
        path = Path(path)
        inside = [path / REPORT_NAME, path / "mashup" / REPORT_NAME] if path.is_dir() else [path]
        found = next(filter(Path.is_file, inside), None)
        if found is None:
            raise FileNotFoundError(
                f"There is no {' and no '.join(map(str, inside))}, expected a report, the directory of a mashup, or "
                "the output directory of a run that made one."
            )
        return cls.from_json(found.read_text(encoding="utf-8"))

    def logs(self) -> dict[str, float]:
        """Returns the scalars for the Trainer's trackers."""
        values = {"base_loss": self.base_loss, "merged_loss": self.merged_loss, "seconds": self.seconds}
        return {f"mashup/{name}": value for name, value in values.items() if value is not None}

    def short_names(self) -> list[str]:
        """Returns the candidates' names for people: without the directory that all absolute paths among them share."""
        names = [row.name for row in self.candidates]
        parents = [os.path.dirname(name) for name in names if os.path.isabs(name)]
        shared = os.path.commonpath(parents) if parents else ""
        return [os.path.relpath(name, shared) if os.path.isabs(name) else name for name in names]

    def shared_names(self) -> list[str]:
        """Returns the candidates' names for others: of a local path, the last directories that tell it apart."""
        return told_apart([row.name for row in self.candidates], [row.is_local for row in self.candidates])

    def show(self, console: Console | None = None) -> None:
        """Shows the report as one table."""
        (console or Console()).print(self.table())

    def table(self) -> Table:
        """Returns the report as a table: a row for each candidate, the decision below."""
        left = {"title_justify": "left", "caption_justify": "left"}
        table = Table(title=f"mashup: {self.decision}", caption=escape(self.reason), **left)
        for name, justify in (("candidate", "left"), ("loss", "right"), ("rows", "right"), ("weight", "right")):
            table.add_column(name, justify=justify, overflow="fold")
        table.add_column("status", overflow="fold")
        for short, row in zip(self.short_names(), self.candidates, strict=True):
            status = f"{row.status}: {row.reason}" if row.reason else row.status
            if row.probe_loss is not None:
                status += f", loss {row.probe_loss:.4f} after a few steps"
            table.add_row(escape(short), _number(row.loss), str(row.rows or ""), _number(row.weight), escape(status))
        table.add_section()
        if len(self.rounds) > 1:
            steps = (f"{step.entered} on {step.rows} rows" for step in self.rounds)
            table.add_row("race", "", "", "", f"{', '.join(steps)}; {self.rounds[-1].kept} left")
            table.add_section()
        for name, loss in (("fresh initialization", self.base_loss), ("best single", self.single_loss)):
            table.add_row(name, _number(loss), "", "", "held-out rows")
        table.add_row("merge", _number(self.merged_loss), "", "", f"held-out rows, {self.seconds:.1f} s in all")
        return table


def candidate_rows(scores: "Sequence[Score]", weights: Mapping[int, float]) -> tuple[CandidateRow, ...]:
    """Returns the report's rows; `weights` has the weights in the merge by `id` of the score."""
    return tuple(
        CandidateRow(
            name=score.candidate.name,
            status=score.status,
            revision=score.candidate.revision,
            reason=score.reason,
            loss=score.loss,
            accuracy=None if score.losses is None else score.losses.accuracy,
            probe_loss=score.probe_loss,
            rows=score.rows,
            tokens=score.tokens,
            weight=weights.get(id(score)),
            rank=None if score.source is None else score.source.rank,
            license=score.candidate.license,
            bytes=score.candidate.bytes,
            seconds=round(score.seconds, 4),
            warnings=score.warnings,
            repo_id=score.candidate.repo_id,
        )
        for score in scores
    )


def merge_info(start: "Start") -> MergeInfo:
    """Returns what the report says about a merge."""
    merged, fitted = start.merged, start.fitted
    return MergeInfo(
        method=merged.method,
        space=merged.space,
        parameters=dict(merged.parameters),
        rank=merged.rank,
        kept_energy=merged.total_kept_energy,
        kept_energy_by_module=dict(merged.kept_energy),
        lost_energy=fitted.lost_energy,
        lost_layers=fitted.lost_layers,
        mergekit_version=merged.mergekit_version,
    )


def environment() -> dict[str, Any]:
    """Returns the versions and the hardware that a run depends on."""
    # Imported here so that a report can be read and shown without it.
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        device = "cpu" if accelerator is None else torch.get_device_module(accelerator).get_device_name(0)
    except (AttributeError, RuntimeError):
        # torch.mps has no such function, and a report must not fail for a name.
        device = accelerator.type
    return {
        "python": platform.python_version(),
        "device": device,
        **{name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
