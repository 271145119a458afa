"""The house rules that a machine can check."""

import inspect
import subprocess
from pathlib import Path

import pytest

import ocsquant

ROOT = Path(__file__).parents[1]


def sources() -> list[Path]:
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    names = [name for name in listed.splitlines() if name.endswith((".py", ".cpp", ".h"))]
    assert len(names) > 30
    return [ROOT / name for name in names if (ROOT / name).exists()]


def test_files_are_short():
    for path in sources():
        lines = path.read_text().splitlines()
        assert len(lines) <= 400, path
        assert all(len(line) <= 120 for line in lines), path
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_every_public_name_is_documented():
    for name in ocsquant.__all__:
        thing = getattr(ocsquant, name)
        if inspect.isclass(thing) or inspect.isfunction(thing) or inspect.ismodule(thing):
            assert thing.__doc__, name
            assert not thing.__doc__.startswith(f"{name}("), f"{name} has only the docstring dataclass wrote"
    for name, function in inspect.getmembers(ocsquant.ops, inspect.isfunction):
        if not name.startswith("_"):
            assert function.__doc__, name
    for name in ocsquant.qat.__all__:
        assert getattr(ocsquant.qat, name).__doc__, name


def test_core_knows_no_torch():
    for path in (ROOT / "csrc/core").iterdir():
        assert "torch/" not in path.read_text(), path


def test_optional_packages_are_not_imported_at_the_top():
    optional = ("transformers", "tqdm", "numpy", "matplotlib", "hypothesis")
    for path in (ROOT / "ocsquant").rglob("*.py"):
        for line in path.read_text().splitlines():
            assert not line.startswith(tuple(f"{verb} {name}" for verb in ("import", "from") for name in optional)), (
                path
            )
