"""csrc/core without torch: tests/core, optimized, under sanitizers, and against kernels broken on purpose."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "csrc/core"

pytestmark = pytest.mark.skipif(
    shutil.which("make") is None or shutil.which(os.environ.get("CXX", "g++")) is None,
    reason="the core test needs make and a C++ compiler",
)


def build(folder: Path, *options: str) -> Path:
    command = ["make", "-C", str(ROOT / "tests/core"), "-j2", f"BUILD={folder}", *options]
    # Not part of an outer make: its flags and its jobs are its own.
    variables = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    variables.setdefault("CXX", "g++")
    result = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "warning:" not in result.stderr, result.stderr
    return folder / "core_test"


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


def assert_passes(result: subprocess.CompletedProcess) -> None:
    print(result.stdout + result.stderr)
    assert result.returncode == 0
    closing = re.fullmatch(r"(\d+) passed, 0 failed, (\d+) skipped", result.stdout.splitlines()[-1])
    assert closing is not None
    assert int(closing[1]) > 0


def test_every_level_is_the_definition():
    assert_passes(run(build(ROOT / "build/core_test")))


def test_under_sanitizers():
    assert_passes(run(build(ROOT / "build/core_test_sanitize", "SANITIZE=1"), "--every", "100"))


# A test that cannot fail proves nothing: one of these is found by comparison, the other by a guard page.
@pytest.mark.parametrize(
    ("right", "wrong", "found"),
    [
        ("a[3] * (c[3]", "a[3] * (c[2]", "not"),
        ("std::memset(sums, 0, rows *", "std::memset(sums, 0, 65 *", "memory fault"),
    ],
)
def test_a_broken_kernel_fails(tmp_path, right, wrong, found):
    # A copy of the objects, so that only the broken file is compiled again.
    shutil.copytree(build(ROOT / "build/core_test").parent, tmp_path / "build")
    shutil.copytree(CORE, tmp_path / "core")
    source = tmp_path / "core/scalar.cpp"
    text = source.read_text()
    assert text.count(right) == 1, "scalar.cpp changed: break another line of it"
    source.write_text(text.replace(right, wrong))
    result = run(build(tmp_path / "build", f"CORE={tmp_path / 'core'}"), "--every", "50")
    assert result.returncode == 1
    assert "FAILED" in result.stdout
    assert found in result.stdout
