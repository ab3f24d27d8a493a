"""The Python standard library's own sources: text that every machine has."""

import ast
import random
import sysconfig
import zlib
from collections.abc import Iterable
from pathlib import Path


# In every Python from 3.10 on, and large enough to keep some files for the test.
PACKAGES = ("asyncio", "email", "http", "importlib", "multiprocessing", "unittest", "urllib", "xml")
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data", "__pycache__"}
STDLIB = Path(sysconfig.get_paths()["stdlib"])


def source_files(package: str | None = None) -> list[Path]:
    """Returns the source files of one of `PACKAGES`, or of the rest of the library; no tests and no tables of data."""
    files = (STDLIB / package if package else STDLIB).rglob("*.py")
    found = sorted(path for path in files if not LEFT_OUT & set(path.relative_to(STDLIB).parts))
    return found if package else [path for path in found if path.relative_to(STDLIB).parts[0] not in PACKAGES]


def split_files(package: str, split: str) -> list[Path]:
    """Returns the files to train on, or every fourth one (by size, the second largest first) to test on."""
    files = largest_first(source_files(package))
    unseen = files[1::4]
    return unseen if split == "test" else [path for path in files if path not in unseen]


def largest_first(files: Iterable[Path]) -> list[Path]:
    """Sorts files by size."""
    return sorted(files, key=lambda path: (-path.stat().st_size, path.name))


def read(path: Path) -> str:
    """Reads a source file."""
    return path.read_text(encoding="utf-8", errors="replace")


def documented_functions(source: str) -> list[tuple[str, str]]:
    """Returns the documented functions of a source file: the docstring's first paragraph, and the body without it."""
    functions = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    pairs = []
    for node in functions:
        text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        code = ast.unparse(ast.Module(node.body[1:], []))
        if len(text) >= 20 and len(code) >= 40:
            pairs.append((text[:200], code[:400]))
    return pairs


def function_pairs(package: str, split: str) -> list[tuple[str, str]]:
    """Returns the documented functions of a package in a fixed order; a docstring's checksum fixes its split."""
    pairs = dict.fromkeys(pair for path in source_files(package) for pair in documented_functions(read(path)))
    found = [pair for pair in pairs if (zlib.crc32(pair[0].encode()) % 3 == 0) == (split == "test")]
    random.Random(0).shuffle(found)
    return found
