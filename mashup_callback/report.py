"""What was found, what was done and why: as a dataclass, a JSON file and a table."""

import json
import os
import platform
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.jupyter import JupyterMixin

from . import display
from .names import short_names
from .typed_json import made


# In a report and in the metadata of an adapter's weights: what peft or a user saves there later lacks it.
MARK = {"producer": "mashup_callback"}
REPORT_NAME = "report.json"
# The report of a run that failed where an earlier one had left a merge.
FAILED_NAME = "failed.json"
DECISIONS = ("scratch", "single", "merged")
SCHEMA = 1
"""Version of the report's JSON; a field that is added does not change it."""
_PACKAGES = ("mashup-callback", "torch", "transformers", "peft", "accelerate", "trl", "mergekit", "huggingface_hub")


@dataclass(frozen=True)
class CandidateRow:
    """One candidate in the report, with its loss, accuracy, rows and label tokens on the sample it was scored on."""

    name: str
    # "scored", "eliminated", "rejected", "failed", or "unscored" where there was no data.
    status: str
    revision: str | None = None
    reason: str | None = None
    loss: float | None = None
    accuracy: float | None = None
    rows: int = 0
    tokens: int = 0
    # None where it is not in the merge.
    weight: float | None = None
    rank: int | None = None
    license: str | None = None
    bytes: int | None = None
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    repo_id: str | None = None
    # Whether it is in the merge that was judged, which may have lost.
    in_merge: bool = False
    # What its model card says that it was trained on.
    datasets: tuple[str, ...] = ()
    # "adapter", or "model" for a full checkpoint.
    kind: str = "adapter"

    @property
    def is_local(self) -> bool:
        """Whether the name is a path on the machine that made the report."""
        # A search or a collection that failed has neither.
        return self.repo_id is None and self.revision is None and not self.name.startswith(("hub:", "collection:"))


@dataclass(frozen=True)
class MergeInfo:
    """
    How the candidates were merged (in the space `"weights"` for full models), and the shares of the merge's squared
    Frobenius norm that the trainee's ranks keep, over all modules and in each, and that was in layers that it lacks.
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
    """One comparison of a race: on how many rows, how many candidates were scored on them, and how many went on."""

    rows: int
    entered: int
    kept: int


@dataclass(frozen=True, repr=False)
class MashupReport(JupyterMixin):
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
        rounds (`tuple[RaceRound, ...]`): Comparisons on growing samples that the race went through.
        merge (`MergeInfo`, *optional*): How the candidates were merged.
        base_model (`str`, *optional*): Name of the base model.
        dry_run (`bool`): Whether the model was left alone whatever the decision.
        timings (`dict[str, float]`): Seconds for each stage, and in all.
        hub (`dict[str, float]`): Traffic with the Hub: requests, bytes received, and seconds that it took.
        config (`dict`): The settings.
        environment (`dict`): Versions and hardware.
        sample (`dict[str, int]`): Rows that selected and were held out, duplicates among them, rows without a label.
        share (`float`, *optional*): Forward passes that scoring and guarding stand for, as a share of the run's own
            forward and backward work, a row that is trained counted as two passes.
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
    share: float | None = None
    schema: int = SCHEMA

    @property
    def seconds(self) -> float:
        """Time that the mashup took in all."""
        return sum(self.timings.values())

    def to_json(self) -> str:
        """Returns the report as JSON, which [`MashupReport.from_json`] reads back."""
        return json.dumps(MARK | asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "MashupReport":
        """Reads a report; raises `ValueError` where the text is none, or one of another version."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict) or not {"decision", "reason"} <= set(values):
            raise ValueError("This is not a mashup report: expected a JSON object with `decision` and `reason`.")
        if values.get("schema") != SCHEMA:
            raise ValueError(
                f"This mashup report has `schema` {values.get('schema')!r}, expected {SCHEMA}: another version of "
                "mashup_callback wrote it. Read it with that version, or make the mashup anew."
            )
        report: MashupReport = made(cls, values, "This mashup report")
        try:
            report.to_json()
        except (ValueError, RecursionError) as error:
            raise ValueError(f"This mashup report holds what no report holds: {error}.") from None
        return report

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the report as JSON, to a temporary name first."""
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(self.to_json(), encoding="utf-8")
        temporary.replace(path)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "MashupReport":
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
        """Returns the scalars for trackers; the decision is 0 for scratch, 1 for single and 2 for merged."""
        values = {
            "base_loss": self.base_loss,
            "single_loss": self.single_loss,
            "merged_loss": self.merged_loss,
            "decision": DECISIONS.index(self.decision),
            "k": sum(row.weight is not None for row in self.candidates) if self.decision != "scratch" else 0,
            "kept_energy": None if self.merge is None else self.merge.kept_energy,
            "seconds": self.seconds,
        }
        return {f"mashup/{name}": value for name, value in values.items() if value is not None}

    def short_names(self) -> list[str]:
        """Returns the candidates' names, local paths cut to what tells them apart."""
        return short_names(self.candidates)

    def shares(self) -> list[float | None]:
        """Returns the candidates' weights as shares of their sum; None for what is not merged."""
        weights = [row.weight for row in self.candidates]
        total = sum(abs(weight) for weight in weights if weight is not None)
        return [weight / total if weight is not None and total else weight for weight in weights]

    def summary(self) -> str:
        """Returns in one sentence what training starts from, what that gains and what it cost."""
        return display.summary(self)

    def show(self, console: Console | None = None) -> None:
        """Shows the sentence, what to watch out for, and a table of the candidates."""
        (console or Console()).print(self)

    def __rich__(self) -> RenderableType:
        return display.shown(self)

    def __repr__(self) -> str:
        return f"<MashupReport: {self.summary()}>"


def environment() -> dict[str, Any]:
    """Returns the versions and the hardware that a run depends on."""
    # Imported here so that a report can be read and shown without it.
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        device = "cpu" if accelerator is None else torch.get_device_module(accelerator).get_device_name(0)
    except (AttributeError, RuntimeError):
        # torch.mps has no such function, and a report must not fail for a name.
        device = getattr(accelerator, "type", "cpu")
    versions: dict[str, str | None] = dict.fromkeys(_PACKAGES)
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {"python": platform.python_version(), "device": device, **versions}
