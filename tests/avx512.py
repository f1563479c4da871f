"""Runs the AVX-512 kernels where the CPU has no AVX-512: in Bochs, an emulator of x86, inside the process of the tests.

A plugin of pytest, for ``make test-avx512``. It has ``_fastproto_C`` believe in AVX-512, and puts a jump here at
the head of each kernel of that set. The emulated CPU's memory is this process's own, page for page, so that it runs
the code that was built on the tensors that were given. System calls (malloc asks for memory) are passed on; one thread
does all tasks. An exception, such as an instruction that the chosen CPU does not have, ends the run.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import struct
import subprocess
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

import pytest

PAGE, GIB = 1 << 12, 1 << 30
# Bochs' numbers of CPUs without and with VNNI, and what libgcc's __cpu_features and __cpu_features2 say of each:
# AVX512F, VL, BW, DQ, CD; AVX512VNNI.
CPUS = {"skylake": (27, 0xF08000, 0), "icelake": (28, 0xF08000, 4)}
HERE_ONLY = 0x14  # AVX512VNNI and AVX512BF16, which the CPU that emulates may have
# wbinvd calls the hook. At 0: a kernel has returned. At 16: a system call, which jumps back to rcx. At 32:
# GOMP_parallel without threads: rdi(rsi).
STUBS = bytes.fromhex("0f09ebfe".ljust(32, "c") + "0f09ffe1".ljust(32, "c") + "4889f84889f7ffe0")

kept: list[Any] = []  # what the compiled code refers to
emulators: list[Emulator] = []
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def memory(size: int) -> int:
    block = mmap.mmap(-1, size, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    kept.append(block)
    return ctypes.addressof(ctypes.c_char.from_buffer(block))


def number(at: int) -> Any:
    return ctypes.c_uint64.from_address(at)


def mappings() -> list[tuple[int, int, str]]:
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    return [(*(int(at, 16) for at in line[0].split("-")), line[-1]) for line in lines]


def import_bochs() -> Any:
    """bochscpu, whose wheel wants two functions that only glibc 2.38 has."""
    alias = '__asm__(".globl __isoc23_%s\\n__isoc23_%s: jmp %s@PLT");'
    source = "".join(alias % (name, name, name) for name in ("sscanf", "strtoull"))
    with tempfile.TemporaryDirectory() as folder:
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", f"{folder}/isoc23.so"]
        subprocess.run(command, input=source, text=True, check=True)
        ctypes.CDLL(f"{folder}/isoc23.so", mode=ctypes.RTLD_GLOBAL)
    import bochscpu.cpu
    import bochscpu.memory

    return bochscpu


class Emulator:
    def __init__(self, model: int) -> None:
        self.bochs, self.calls, self.error = import_bochs(), 0, ""
        lib = ctypes.CDLL(self.bochs._bochscpu.__file__)
        get = lib._ZN13bx_real_sim_c14get_param_enumEPKcP10bx_param_c
        get.restype = ctypes.c_void_p
        parameter = get(ctypes.c_void_p.in_dll(lib, "SIM"), b"cpu.model", None)
        lib._ZN14bx_param_num_c3setEl(ctypes.c_void_p(parameter), ctypes.c_long(model))
        self.session, self.hook = self.bochs.Session(), self.bochs.Hook()
        self.session.missing_page_handler = self.missing_page
        self.hook.cache_cntrl, self.hook.exception = self.wbinvd, self.exception
        # The first GiB of the emulated memory holds the page tables, each of the others one of this process.
        self.gibs, self.copies = [-1], dict[int, int]()  # which ones; pages of which the emulated CPU sees a copy
        self.tables, self.tables_end = memory(16 << 20), PAGE
        self.stack, self.stubs = memory(16 << 20) + (16 << 20), memory(PAGE)
        ctypes.memmove(self.stubs, STUBS, len(STUBS))
        # Kernels run as a thread that waits for ever: malloc keeps state per thread, and the emulator allocates too.
        ready, never = threading.Event(), threading.Event()
        libc.malloc.restype = ctypes.c_void_p
        wait = lambda: (libc.free(ctypes.c_void_p(libc.malloc(64))), ready.set(), never.wait())  # noqa: E731
        self.thread = threading.Thread(target=wait, daemon=True)
        self.thread.start()
        ready.wait()

    def call(self, function: int, *args: int) -> None:
        self.map_memory()
        state = self.bochs.State()
        self.bochs.cpu.set_long_mode(state)
        state.cr3, state.cr4, state.xcr0 = 0, 0x40620, 0xE7  # SSE, AVX and AVX-512 with all their registers
        state.mxcsr, state.rflags = 0x1F80, 2
        state.star, state.lstar = 8 << 32, self.stubs + 16
        for name in ("cs", "ss", "ds", "es", "fs", "gs"):
            segment = self.bochs.Segment()
            segment.present, segment.limit = True, 0xFFFFFFFF
            segment.selector, segment.attr = (8, 0xA09B) if name == "cs" else (16, 0xC093)
            segment.base = self.thread.ident if name == "fs" else 0
            setattr(state, name, segment)
        state.rip, state.rsp, (state.rdi, state.rsi) = function, self.stack - 72, args
        number(state.rsp).value = self.stubs
        self.session.cpu.state = state
        self.session.run([self.hook])
        self.calls += 1
        if self.error:
            raise RuntimeError(self.error)

    def map_memory(self) -> None:
        """Page tables of 2 MiB pages: addresses are this process's; memory appears where they lead (missing_page)."""
        for begin, end, _ in mappings():
            for gib in range(begin // GIB, min((end - 1) // GIB + 1, 1 << 17)):
                if gib not in self.gibs:
                    directory = self.table(self.table(0, gib >> 9), gib & 511)
                    for entry in range(512):
                        number(self.tables + directory + 8 * entry).value = len(self.gibs) * GIB + (entry << 21) | 0x87
                    self.gibs.append(gib)

    def table(self, parent: int, entry: int) -> int:
        place = number(self.tables + parent + 8 * entry)
        if not place.value:
            place.value, self.tables_end = self.tables_end | 7, self.tables_end + PAGE
        return place.value & -PAGE

    def missing_page(self, at: int) -> None:
        gib, rest = divmod(at & -PAGE, GIB)
        page = self.gibs[gib] * GIB + rest if gib else self.tables + rest
        self.bochs.memory.page_insert(at & -PAGE, self.copies.get(page, page))

    def wbinvd(self, session: Any, *_: int) -> None:
        cpu = session.cpu
        if cpu.rip == self.stubs + 2:
            session.stop()
            return
        registers = (cpu.rax, cpu.rdi, cpu.rsi, cpu.rdx, cpu.r10, cpu.r8, cpu.r9)
        result = libc.syscall(*map(ctypes.c_ulong, registers))
        cpu.rax = (-ctypes.get_errno() if result == -1 else result) & (1 << 64) - 1
        self.map_memory()

    def exception(self, session: Any, _: int, vector: int, __: int) -> None:
        self.error = f"exception {vector} just before {session.cpu.rip:#x}, page fault at {session.cpu.cr2:#x}"
        session.stop()

    def take_over(self, kernel: int, openmp: Any) -> None:
        """Puts a jump to `call` at the head of a kernel, of which the emulated CPU sees nothing."""

        def run(args: int, threads: int) -> None:
            try:
                before, openmp.value = openmp.value, self.stubs + 32
                self.call(kernel, args, threads)
                openmp.value = before
            except BaseException:
                traceback.print_exc()
                os._exit(1)

        kept.append(ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_int)(run))
        jump = struct.pack("<2sQ2s", b"\x48\xb8", ctypes.cast(kept[-1], ctypes.c_void_p).value, b"\xff\xe0")
        for page in {kernel & -PAGE, kernel + len(jump) - 1 & -PAGE} - self.copies.keys():
            self.copies[page] = memory(PAGE)
            ctypes.memmove(self.copies[page], page, PAGE)
            libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 7)
        ctypes.memmove(kernel, jump, len(jump))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu", choices=CPUS, default="icelake", help="the emulated CPU")


def pytest_configure(config: pytest.Config) -> None:
    from fastproto._native import cpp

    model, features, features2 = CPUS[config.getoption("--cpu")]
    emulators.append(Emulator(model))
    base = min(begin for begin, _, path in mappings() if path == cpp.__file__)
    listing = subprocess.run(["nm", cpp.__file__], capture_output=True, text=True, check=True).stdout
    symbols = {symbol: base + int(at, 16) for at, symbol in re.findall(r"^([0-9a-f]+) \w (\S+)$", listing, re.M)}
    ctypes.c_uint32.from_address(symbols["__cpu_model"] + 12).value |= features
    word2 = ctypes.c_uint32.from_address(symbols["__cpu_features2"])
    word2.value = word2.value & ~HERE_ONLY | features2
    for symbol, at in symbols.items():
        if re.fullmatch(r"_ZN9fastproto6avx512\d+[a-z_]+ERKNS_\w+Ei", symbol):
            emulators[0].take_over(at, number(symbols["_ZZN9fastproto15openmp_parallelEvE8function"]))
    cpp.set_isa(cpp.supported_isas()[-1])
    assert cpp.isa() == {"skylake": "avx512", "icelake": "avx512_vnni"}[config.getoption("--cpu")]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    terminalreporter.write_line(f"{emulators[0].calls} kernels ran on an emulated {config.getoption('--cpu')}")


def pytest_unconfigure() -> None:
    # bochscpu crashes at the end of the process if its session is still there, and lists what of it is.
    del emulators[0].session, emulators[0].hook
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
