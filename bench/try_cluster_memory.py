"""Peak memory of ``fastproto cluster`` on a generated file, into bench/results/MACHINE/cluster_memory.json:

    python bench/try_cluster_memory.py --rows 1000000 --k 1000 --iterations 10

Anonymous memory is what counts: pages of a mapped file can be dropped at any time. The command on a file of K rows says
what the interpreter and its libraries take. Linux only; the peak is sampled every 5 ms.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from harness import Row, Suite, device_name


def generate(path: Path, rows: int, dim: int) -> None:
    """Float32 rows around 100 centres, written piece by piece."""
    draws = np.random.default_rng(0)
    centers = draws.normal(size=(100, dim)).astype(np.float32)
    x = np.lib.format.open_memmap(path, "w+", np.float32, (rows, dim))
    for start in range(0, rows, 10000):
        part = x[start : start + 10000]
        part[:] = centers[draws.integers(100, size=len(part))] + draws.normal(size=part.shape)
    x.flush()


def peak_mib(path: Path, k: int, iterations: int) -> tuple[float, float]:
    """The most anonymous memory that the command had on this file, and its seconds."""
    with tempfile.TemporaryDirectory() as out:
        options = ["--k", str(k), "--iterations", str(iterations), "--device", "cpu", "--out", out]
        began, peak = time.perf_counter(), 0
        process = subprocess.Popen(
            [sys.executable, "-m", "fastproto", "cluster", path, *options], stdout=subprocess.DEVNULL
        )
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
            peak = max(peak, int(found[1]) if found else 0)
            time.sleep(0.005)
    if process.returncode:
        raise SystemExit(process.returncode)
    return peak / 1024, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 200_000), ("dim", 256), ("k", 200), ("iterations", 2)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default %(default)s")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder, "small.npy"), Path(folder, "large.npy")
        generate(small, given.k, given.dim)
        generate(large, given.rows, given.dim)
        before, _ = peak_mib(small, given.k, 1)
        peak, seconds = peak_mib(large, given.k, given.iterations)
        size = large.stat().st_size / 2**20
    print(f"file {size:.0f} MiB; anonymous memory {peak:.0f} MiB, {peak - before:.0f} above that of {given.k} rows")
    print(f"{seconds:.1f} s")
    suite = Suite("cluster_memory")
    shape = f"{given.rows} x {given.dim}, K {given.k}, {given.iterations} iterations, a file of {size:.0f} MiB"
    row = Row(
        work="cluster a file", method="fastproto", shape=shape, dtype="float32", device=device_name("cpu"),
        median_ms=1e3 * seconds, peak_extra_mib=peak - before,
    )  # fmt: skip
    suite.rows.append(row)
    suite.write()


if __name__ == "__main__":
    main()
