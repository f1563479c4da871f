"""How every benchmark measures: methods of one piece of work alternate in one run, and medians are kept.

A row of a result file is one method on one piece of work. CUDA work is timed with events, CPU work with the wall clock.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastproto import _native

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PART = ".part.json"
PACKAGES = ("torch", "triton", "torchvision", "lightly", "pytorch-metric-learning", "faiss-cpu")


@dataclass(frozen=True)
class Work:
    """One thing to be done, by several methods.

    Attributes:
        name: a short name, unique in its suite.
        shape: the sizes, in words.
        dtype: of the result.
        device: "cpu" or "cuda".
        bytes: the fewest bytes that must move through memory: each input read once, each output written once.
        flop: the floating-point operations that must be done.
    """

    name: str
    shape: str
    dtype: str
    device: str
    bytes: float = 0.0
    flop: float = 0.0


@dataclass(frozen=True)
class Row:
    """One method on one piece of work, as it stands in a result file; by default timed once, beside no floor."""

    work: str
    method: str
    shape: str
    dtype: str
    device: str
    median_ms: float
    spread_ms: float = 0.0  # between the quartiles
    rounds: int = 1
    ours_is_faster: float = 1.0  # median of this method over fastproto's
    floor_ms: float = 0.0
    share_of_floor: float = 0.0
    peak_extra_mib: float = 0.0


@dataclass
class Suite:
    """Collects the rows of one benchmark file and writes them."""

    name: str
    rows: list[Row] = field(default_factory=list)

    def compare(self, work: Work, methods: dict[str, Callable[[], object]], seconds: float = 4.0) -> None:
        """Times the methods in turns until ``seconds`` are over, and writes; the first is ours.

        The order of every round is drawn: none always comes after one that leaves the caches cold.
        Of the others, one that raises at its first call is left out.
        """
        first = next(iter(methods))
        methods = {name: method for name, method in methods.items() if _runs(work, name, method, name != first)}
        times: dict[str, list[float]] = {name: [] for name in methods}
        begin, order = time.perf_counter(), random.Random(0)
        while time.perf_counter() - begin < seconds or len(next(iter(times.values()))) < 5:
            for name in order.sample(list(methods), len(methods)):
                times[name].append(_time_ms(methods[name], work.device))
        medians = {name: statistics.median(values) for name, values in times.items()}
        ours = next(iter(medians.values()))
        floor_ms = max(work.bytes / bandwidth(work.device), work.flop / peak_flops(work.device)) * 1e3
        for name, values in times.items():
            low, _, high = statistics.quantiles(values, n=4)
            row = Row(
                work=work.name, method=name, shape=work.shape, dtype=work.dtype, device=device_name(work.device),
                median_ms=medians[name], spread_ms=high - low, rounds=len(values), ours_is_faster=medians[name] / ours,
                floor_ms=floor_ms, share_of_floor=floor_ms / medians[name],
                peak_extra_mib=peak_extra_mib(methods[name], work.device),
            )  # fmt: skip
            self.rows.append(row)
            print(f"\n{row.work:<24}{row.method:<28}{row.median_ms:10.3f} ms   x{row.ours_is_faster:<8.2f}"
                  f"floor {row.share_of_floor:6.1%}   {row.peak_extra_mib:8.1f} MiB", end="")  # fmt: skip
        self.write()

    def write(self) -> list[Path]:
        """Writes bench/results/MACHINE/SUITE.json, one file per kind of device that was measured.

        What was measured before at the same commit and versions, as by -k or until an interruption, stays. While the
        file has works of another commit that were not measured since, the rows go to SUITE.part.json and do not take
        their place; where a work has a new name, the file is to be removed.
        """
        paths, now = [], environment()
        for device in dict.fromkeys(row.device for row in self.rows):
            path, part = (results_of(device) / f"{self.name}{suffix}" for suffix in (".json", PART))
            rows = [asdict(row) for row in self.rows if row.device == device]
            for file in (part, path):
                before = json.loads(file.read_text()) if file.exists() else {**now, "rows": []}
                works = {row["work"] for row in rows}
                others = [row for row in before["rows"] if row["work"] not in works]
                if all(before[name] == now[name] for name in ("commit", "versions")):
                    rows, others = others + rows, []
            if others:  # of SUITE.json
                path = part
            else:
                part.unlink(missing_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({**now, "rows": rows}, indent=1) + "\n")
            paths.append(path)
        return paths


def peer(module: str, name: str) -> Any:
    """Something of a package that need not be there, or need not work with this torch."""
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError:
        return None
    except Exception as error:
        print(f"\n{module} is left out: {_in_short(error)}", end="")
        return None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile at its best: for the sizes that it meets, not for any, whatever sizes were compiled before."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def results_of(device: str) -> Path:
    """The folder for what was measured on a device of this name."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def device_name(device: str) -> str:
    """What the machine calls its processor. Of a CPU, as guests may not be told the model, also family and threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = platform.processor() or platform.machine()
    if found := re.search(r"model name\s*: (.*)", text):
        model = re.sub(r"\((R|TM)\)| Processor\b| CPU\b", "", found[1])
    family = f" family {found[1]}" if (found := re.search(r"cpu family\s*: (\d+)", text)) else ""
    widest = "baseline" if _native.cpp is None else _native.cpp.supported_isas()[-1]
    isa = widest.partition("_")[0]
    return f"{model}{family} {torch.get_num_threads()} threads {isa}"


_measured: dict[tuple[str, str], float] = {}


def bandwidth(device: str) -> float:
    """Bytes a second of a large copy, bytes read plus bytes written, measured once a run."""
    if (device, "bandwidth") not in _measured:
        source = torch.ones(1 << (29 if device == "cuda" else 26), device=device)
        target = torch.empty_like(source)
        best = min(_time_ms(lambda: target.copy_(source), device) for _ in range(10))
        _measured[device, "bandwidth"] = 2 * source.nbytes / best * 1e3
    return _measured[device, "bandwidth"]


def peak_flops(device: str) -> float:
    """Operations a second, measured once a run: of float32 FMAs on a CPU, which AMX may pass, of bfloat16 on a GPU."""
    if (device, "flops") not in _measured:
        if device == "cuda":
            x = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
            _measured[device, "flops"] = 2 * 8192**3 / min(_time_ms(lambda: x @ x, device) for _ in range(5)) * 1e3
        else:
            _measured[device, "flops"] = max(_native.cpp.peak_flops(torch.get_num_threads()) for _ in range(10))
    return _measured[device, "flops"]


def _runs(work: Work, name: str, method: Callable[[], object], optional: bool) -> bool:
    """Calls it for the first time, and says why it is left out if that fails."""
    try:
        _time_ms(method, work.device)  # waits for the GPU
    except Exception as error:
        if not optional:
            raise
        print(f"\n{work.name:<24}{name:<28}is left out: {_in_short(error)}", end="")
        return False
    return True


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _time_ms(method: Callable[[], object], device: str) -> float:
    if device == "cpu":
        begin = time.perf_counter()
        method()
        return (time.perf_counter() - begin) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    method()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_extra_mib(method: Callable[[], object], device: str) -> float:
    """How far one call raises the memory in use, its result included. On a CPU: peak resident memory."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        method()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    ctypes.CDLL(None).malloc_trim(0)  # gives back what earlier calls left in the allocator
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is in use
    before = _status_kib("VmRSS")
    method()
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


def commit() -> str:
    """FASTPROTO_COMMIT where the tree has no .git, or what git says of it."""
    if given := os.environ.get("FASTPROTO_COMMIT"):
        return given

    def git(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True)

    try:
        described = git("describe", "--always").stdout.strip()
        # The results of the suite before change no code.
        changed = git("diff", "--quiet", "HEAD", "--", ".", ":!bench/results").returncode == 1
    except OSError:  # no git
        return "unknown"
    return described + "-dirty" * changed if described else "unknown"


def environment() -> dict[str, object]:
    """What a result file says of the run beside its rows."""

    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    ceilings = {f"{device}_{what}": value for (device, what), value in _measured.items()}
    return {
        "schema": 1,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {name: of(name) for name in PACKAGES if of(name)},
        "measured_ceilings": ceilings,
    }
