"""Every accuracy table with one command, python -m benchmarks.accuracy: each module of this folder that prints one.

Each is a process on one thread, as many at once as there are cores; what it prints goes to benchmarks/results/NAME.log.
A table that this tree has finished already is not run again, so an interrupted run goes on where it stopped; --again
begins anew. The tables of methods that need no training are the default, --full adds the table of training. At the end
benchmarks/results/report.md and report.json hold all tables, with the time each took. What a table needs and does not
find (a network, a text, Pillow) it says itself and leaves out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS

ROOT = Path(__file__).parents[2]
# In the order of the report, with about how many minutes each takes: the longest begin first.
TABLES = {
    "defaults": 2,
    "images": 14,
    "low_bits": 19,
    "calibrated": 28,
    "classifiers": 4,
    "ablations": 21,
    "search": 5,
    "qat": 21,
}
FULL = ("qat",)
# Huge pages, kept: half of what networks in float spend in the system is new memory (glibc; others do not read this).
MEMORY = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=2000000000"


def tree() -> str:
    """What the tables depend on: every source file of the package, its kernels and the benchmarks."""
    digest = hashlib.sha256()
    for folder in ("benchmarks", "ocsquant", "csrc"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h") and "results" not in path.parts:
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def run(table: str, short: bool) -> dict[str, Any]:
    """One script, beside others; what it wrote is kept beside the record."""
    print(f"{table}: begun\n", end="", flush=True)  # in one piece, beside other threads
    begin, since = time.monotonic(), time.time()
    log = RESULTS / f"{table}.log"
    with log.open("w") as printed:
        command = [sys.executable, "-u", "-m", f"{__package__}.{table}", *(["--short"] if short else [])]
        code = subprocess.run(
            command,
            check=False,
            stdout=printed,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={"GLIBC_TUNABLES": MEMORY, **os.environ},
        ).returncode
    if code != 0:
        raise RuntimeError(f"{table} ended with {code}, see {log}; run this again to go on from here")
    written = {kind: RESULTS / f"{table}.{kind}" for kind in ("md", "json")}
    fresh = all(path.exists() and path.stat().st_mtime >= since for path in written.values())
    return {
        "minutes": (time.monotonic() - begin) / 60,
        "markdown": written["md"].read_text() if fresh else f"# {table}\n\nleft out: what it needs is not here\n",
        "data": json.loads(written["json"].read_text()) if fresh else None,
    }


def run_all(tables: list[str], short: bool, jobs: int, done: dict[str, Any], record: Path) -> None:
    """`jobs` of the tables at once; each is recorded when it ends. The first failure is raised when all have ended."""
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(run, table, short): table for table in tables}
        try:
            for job in as_completed(running):
                if job.exception() is not None:
                    print(job.exception(), flush=True)
                    continue
                done["tables"][running[job]] = job.result()
                print(f"{running[job]}: finished in {job.result()['minutes']:.1f} minutes", flush=True)
                record.write_text(json.dumps(done))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
        for job in running:
            job.result()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--short", action="store_true", help="fewer rows and less text: a smoke run, not a result")
    options.add_argument("--full", action="store_true", help="also the tables that train: " + ", ".join(FULL))
    options.add_argument("--again", action="store_true", help="run what is finished, too")
    options.add_argument("--only", choices=TABLES, action="append", help="only this table; may be given again")
    options.add_argument("--jobs", type=int, default=os.cpu_count(), help="tables at once (default: one for each core)")
    args = options.parse_args()
    RESULTS.mkdir(exist_ok=True)
    record = RESULTS / ("tables_short.json" if args.short else "tables.json")
    done: dict[str, Any] = {"tree": tree(), "tables": {}}
    if record.exists() and not args.again:
        before = json.loads(record.read_text())
        done = before if before["tree"] == done["tree"] else done
    wanted = sorted(
        args.only or [t for t in TABLES if args.full or t not in FULL], key=TABLES.__getitem__, reverse=True
    )
    for table in wanted:
        if table in done["tables"]:
            print(f"{table}: finished already in {done['tables'][table]['minutes']:.1f} minutes")
    begin = time.monotonic()
    run_all([table for table in wanted if table not in done["tables"]], args.short, args.jobs, done, record)
    parts = [done["tables"][table] for table in TABLES if table in done["tables"]]
    (RESULTS / "report.md").write_text("\n\n".join(part["markdown"].strip() for part in parts) + "\n")
    data = {table: {k: v for k, v in part.items() if k != "markdown"} for table, part in done["tables"].items()}
    (RESULTS / "report.json").write_text(json.dumps(data, indent=1) + "\n")
    took = (time.monotonic() - begin) / 60
    print(f"\n{len(parts)} tables, {took:.1f} minutes this time: {RESULTS / 'report.md'}, report.json")


if __name__ == "__main__":
    main()
