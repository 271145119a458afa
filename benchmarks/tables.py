"""Every accuracy table with one command: runs accuracy.py, images.py, low_bits.py, calibrated.py, classifiers.py,
ablations.py, search.py and qat.py.

A table that this tree has finished already is not run again, so an interrupted run goes on where it stopped; --again
begins anew. At the end benchmarks/results/report.md and report.json hold all tables, with the time each took. What a
table needs and does not find (a network, a text, Pillow) it says itself and leaves out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TABLES = ("accuracy", "images", "low_bits", "calibrated", "classifiers", "ablations", "search", "qat")


def tree() -> str:
    """What the tables depend on: every source file of the package, its kernels and the benchmarks."""
    digest = hashlib.sha256()
    for folder in (HERE, HERE.parent / "ocsquant", HERE.parent / "csrc"):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".cpp", ".h") and "results" not in path.parts:
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def run(table: str, short: bool) -> dict[str, Any]:
    """One script, its output shown as it comes; what it wrote is kept beside the record."""
    print(f"\n== {table}", flush=True)
    begin = time.monotonic()
    code = subprocess.run(
        [sys.executable, str(HERE / f"{table}.py"), *(["--short"] if short else [])], check=False
    ).returncode
    minutes = (time.monotonic() - begin) / 60
    if code != 0:
        raise SystemExit(f"{table}.py ended with {code}; run this again to go on from here")
    written = {kind: RESULTS / f"{table}.{kind}" for kind in ("md", "json")}
    fresh = all(p.exists() and time.time() - p.stat().st_mtime < 60 * (minutes + 1) for p in written.values())
    return {
        "minutes": minutes,
        "markdown": written["md"].read_text() if fresh else f"# {table}\n\nleft out: what it needs is not here\n",
        "data": json.loads(written["json"].read_text()) if fresh else None,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--short", action="store_true", help="fewer rows and less text: a smoke run, not a result")
    options.add_argument("--again", action="store_true", help="run what is finished, too")
    options.add_argument("--only", choices=TABLES, action="append", help="only this table; may be given again")
    args = options.parse_args()
    RESULTS.mkdir(exist_ok=True)
    record = RESULTS / ("tables_short.json" if args.short else "tables.json")
    done: dict[str, Any] = {"tree": tree(), "tables": {}}
    if record.exists() and not args.again:
        before = json.loads(record.read_text())
        done = before if before["tree"] == done["tree"] else done
    for table in args.only or TABLES:
        if table in done["tables"]:
            print(f"{table}: finished already in {done['tables'][table]['minutes']:.1f} minutes")
            continue
        done["tables"][table] = run(table, args.short)
        record.write_text(json.dumps(done))
    parts = [done["tables"][table] for table in TABLES if table in done["tables"]]
    (RESULTS / "report.md").write_text("\n\n".join(part["markdown"].strip() for part in parts) + "\n")
    data = {table: {k: v for k, v in part.items() if k != "markdown"} for table, part in done["tables"].items()}
    (RESULTS / "report.json").write_text(json.dumps(data, indent=1) + "\n")
    total = sum(part["minutes"] for part in parts)
    print(f"\n{len(parts)} tables in {total:.1f} minutes: {RESULTS / 'report.md'}, report.json")


if __name__ == "__main__":
    main()
