"""What becomes of a hostile adapter or checkpoint: by the way that a run takes, with what it costs."""

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from mashup_callback.candidates import find_candidates, read_source, same_data
from mashup_callback.config import MashupConfig
from mashup_callback.errors import AdapterError
from mashup_callback.formats import load_factors, parse_adapter
from mashup_callback.model import without_adapters
from mashup_callback.trainee import find_trainee
from tests.hostile.cases.case import Case
from tests.hostile.damage import CARD, CONFIG, WEIGHTS
from tests.lora.variants import CONFIGURED, EVERYWHERE, EXPERTS, LORA, save_random
from tests.tiny import llama, lora, save_random_adapter


QV = ["q_proj", "v_proj"]
EXPERT_PARAMETERS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
# What was trained of the good adapters of other kinds.
KINDS = {
    "dora": EVERYWHERE["DoRA"](target_modules=QV),
    "adalora": EVERYWHERE["AdaLoRA"](target_modules=QV),
    "loha": EVERYWHERE["LoHa"](target_modules=QV),
    "lokr": EVERYWHERE["LoKr"](target_modules=QV),
    "embeddings": CONFIGURED["LoRA of embeddings"](),
    "experts": LORA(target_modules=["q_proj"], target_parameters=EXPERT_PARAMETERS),
    "whole": LORA(target_modules=QV, modules_to_save=["lm_head"]),
}
TOKENS = torch.arange(24).reshape(2, 12)


class _Named:
    """A data set with a name on record, which cards are compared with."""

    class info:  # noqa: N801
        dataset_name = "x"


@dataclass(frozen=True)
class Outcome:
    """Why it was rejected, or else what the model computes with it; seconds of processor time, and megabytes."""

    reason: str | None
    logits: torch.Tensor | None
    seconds: float = 0.0
    megabytes: float = 0.0
    warning: str | None = None


class _Nobody:
    """Takes adapters where there is no model, as `merge_adapters` does."""

    model = None

    def check(self, description):
        return description

    def admit(self, candidate):
        adapter = read_source(candidate, self.check)
        return SimpleNamespace(load=lambda: load_factors(adapter))


def good_adapter(directory: Path) -> None:
    save_random_adapter(directory, 0, target_modules=QV)
    (directory / CARD).write_text("---\ndatasets: org/other\n---\n")


class Judge:
    """Good files to damage, and trainees that they are candidates of."""

    def __init__(self, directory: Path) -> None:
        self.directory, self._count = directory, 0
        good_adapter(directory / "good/adapter")
        llama(1).save_pretrained(directory / "good/model", max_shard_size="30KB")
        llama(1, tie_word_embeddings=True).save_pretrained(directory / "good/tied")
        for kind, trained in KINDS.items():
            save_random(directory / "good" / kind, self.base_model(kind), trained)
        models = {
            "adapter": get_peft_model(llama(), lora()),
            "model": llama(),
            "tied": llama(tie_word_embeddings=True),
            "experts": get_peft_model(self.base_model("experts"), lora(target_modules=["q_proj"])),
            "experts' model": self.base_model("experts"),
            "whole": get_peft_model(llama(), lora(modules_to_save=["lm_head"])),
        }
        self.trainees = {
            name: find_trainee(model.eval(), MashupConfig(seed=0), directory / "out" / name)
            for name, model in models.items()
        }
        self.trainees["nobody"] = _Nobody()

    @staticmethod
    def base_model(kind: str) -> torch.nn.Module:
        return EXPERTS["qwen3_moe"]() if kind == "experts" else llama()

    def copy(self, case: Case) -> Path:
        self._count += 1
        directory = self.directory / f"case{self._count}"
        shutil.copytree(self.directory / "good" / case.base, directory)
        case.change(directory)
        return directory

    def outcome(self, case: Case, directory: Path) -> Outcome:
        trainee = self.trainees.get(case.taker or case.base, self.trainees["adapter"])
        memory = _peak_reset()
        started = time.process_time()
        reason, logits, warning = None, None, None
        try:
            if case.size is not None:
                config, weights = ((directory / name).read_bytes() for name in (CONFIG, WEIGHTS))
                trainee.check(parse_adapter(config, weights, case.size))
            [found, *_] = find_candidates(directory, check=trainee.check)
            if found.reason is not None:
                raise AdapterError(found.reason)
            source = trainee.admit(found)
            if case.later:
                case.later(directory)
            update = source.load()
            warning = same_data(found, _Named)
            with torch.no_grad(), without_adapters(trainee.model), update.applied(trainee.model):
                logits = trainee.model(TOKENS).logits
        except AdapterError as error:
            reason = str(error)
        return Outcome(reason, logits, time.process_time() - started, _peak() - memory, warning)

    def expected(self, case: Case, directory: Path) -> torch.Tensor:
        """Returns what peft's or transformers' own model computes."""
        with torch.no_grad():
            if case.base in ("model", "tied"):
                return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()(TOKENS).logits
            if case.own:
                values = json.loads((directory / CONFIG).read_text())
                (directory / CONFIG).write_text(json.dumps(values | case.own))
            if case.later:
                directory = self.directory / "good" / case.base
            return PeftModel.from_pretrained(self.base_model(case.base), directory).eval()(TOKENS).logits

    def failure(self, case: Case, outcome: Outcome, directory: Path) -> str | None:
        """Returns what is wrong with an outcome, None if it is the one expected."""
        if case.reason is None or (case.either and outcome.reason is None):
            if outcome.reason is not None:
                return f"rejected: {outcome.reason}"
            expected = self.expected(case, directory)
            if not torch.allclose(outcome.logits, expected, atol=1e-5, rtol=1e-4):
                return f"differs by {(outcome.logits - expected).abs().max().item():.2g}"
            return None
        if outcome.reason is None:
            return f"taken, expected {case.reason}"
        lines = len(outcome.reason.splitlines()) != 1 or not outcome.reason.isprintable() or len(outcome.reason) > 700
        return f"rejected: {outcome.reason}" if lines or not re.search(case.reason, outcome.reason) else None


def _peak_reset() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    """Returns megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) // 1024


def size(directory: Path) -> float:
    """Returns the megabytes of the files, without their holes."""
    return sum(path.lstat().st_blocks * 512 for path in directory.rglob("*")) / 2**20


def outcomes_table(judged: Iterable[tuple[Case, Outcome]]) -> str:
    """Returns the table of outcomes by kind, as Markdown."""
    counts: dict[str, Counter] = {}
    for case, outcome in judged:
        taken = "taken" if outcome.reason is None else "rejected"
        counts.setdefault(case.kind, Counter())[taken] += 1
    counts["in all"] = sum(counts.values(), Counter())
    rows = [f"| {kind} | {count.total()} | {count['rejected']} | {count['taken']} |" for kind, count in counts.items()]
    head = ["| what was changed | cases | rejected with the reason | harmless: computes what peft computes |"]
    return "\n".join([*head, "|---|---:|---:|---:|", *rows])
