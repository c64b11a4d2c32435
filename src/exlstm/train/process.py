"""What a run does to its process: it sets and seeds torch and answers signals, and puts all back as they were."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading

import torch


class Randomness:
    """Seeds torch for a step; the caller's generators come back as they were."""

    def __init__(self, device: torch.device):
        self.generators = [torch.default_generator]
        if device.type == "cuda":
            torch.cuda.init()
            self.generators.append(torch.cuda.default_generators[device.index or 0])

    def __enter__(self):
        self.states = [g.get_state() for g in self.generators]
        return self

    def __exit__(self, *_):
        for generator, state in zip(self.generators, self.states):
            generator.set_state(state)

    def seed(self, seed: int, step: int, micro: int):
        """torch.manual_seed asks every kind of device and takes 0.3 ms; the generators alone take 2 µs."""
        mixed = seed
        for part in (step, micro):
            mixed = _mix(mixed * 0x9E3779B97F4A7C15 + part + 1)
        for generator in self.generators:
            generator.manual_seed(mixed)


@contextlib.contextmanager
def plain_torch():
    """Torch as it is before anyone has set it: float32 on the CPU by default, with gradients; the caller's settings come back
    as they were."""
    dtype, elsewhere = torch.get_default_dtype(), torch.get_default_device().type != "cpu"
    # Where there is nothing to undo: the mode costs something at every call.
    device = torch.device("cpu") if elsewhere else contextlib.nullcontext()
    torch.set_default_dtype(torch.float32)
    try:
        with device, torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(dtype)


def _mix(x: int) -> int:
    """splitmix64's finaliser: neighbouring numbers give unrelated seeds."""
    x &= 2**64 - 1
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
    return (x ^ (x >> 31)) >> 1


class Signals:
    """Notes the first SIGINT or SIGTERM in `received`; the second ends the program at once."""

    def __init__(self):
        self.received: int | None = None
        self.before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # A signal that the parent had ignored (nohup, a background job of a script) stays ignored.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if self.received is not None:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.received = int(number)
        with contextlib.suppress(OSError):
            os.write(2, b"\nfinishes the step and saves; once more ends at once\n")


def keep_freed_memory():
    """Lets glibc keep the large blocks that a step frees, where this process runs on glibc.

    It would give them back and fault them in again at every step, a fifth of the time of a small model on a CPU.
    For a process of our own: it is a setting of the whole process, and memory once used stays with it.
    """
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, size in ((mmap_threshold, 1 << 25), (trim_threshold, (1 << 31) - 1), (top_pad, 1 << 26)):
            mallopt(option, size)
