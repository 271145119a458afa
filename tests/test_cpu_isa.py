import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import ocsquant

ROOT = Path(ocsquant.__file__).parents[1]


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    variables = dict(os.environ, PYTHONPATH=str(ROOT), **environment)
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)


def test_environment_names_level_and_reason():
    e = ocsquant.env()
    assert e.isa in ("scalar", "avx2", "avx_vnni", "avx512_vnni", "amx_int8")
    assert e.isa in str(e)
    assert e.isa_reason in str(e)
    assert torch.__version__ in str(e)


def test_a_lower_level_can_be_forced():
    result = run("import ocsquant; print(ocsquant.env().isa)", OCSQUANT_ISA="scalar")
    assert result.stdout.strip() == "scalar"


def test_an_unknown_level_is_an_error_at_import():
    result = run("import ocsquant", OCSQUANT_ISA="sse9")
    assert result.returncode != 0
    assert "OCSQUANT_ISA=sse9" in result.stderr
    assert "expected amx_int8, avx512_vnni, avx_vnni, avx2 or scalar" in result.stderr


def test_a_second_copy_in_one_process_is_refused(tmp_path):
    shutil.copytree(ROOT / "ocsquant", tmp_path / "ocsquant")
    code = (
        "import sys, ocsquant\n"
        "for name in [n for n in sys.modules if n.startswith('ocsquant')]: del sys.modules[name]\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import ocsquant"
    )
    result = run(code)
    assert result.returncode == 1, result.stderr
    assert "BuildMismatchError" in result.stderr
    assert "another copy" in result.stderr


def test_a_missing_library_is_named(tmp_path):
    shutil.copytree(ROOT / "ocsquant", tmp_path / "ocsquant", ignore=shutil.ignore_patterns("*.so"))
    variables = dict(os.environ, PYTHONPATH=str(tmp_path))
    result = subprocess.run(
        [sys.executable, "-c", "import ocsquant"],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert "BuildMismatchError" in result.stderr
    assert "_C.so" in result.stderr
