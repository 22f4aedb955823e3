"""How long functions that do the same in different ways take, measured in turn."""

import gc
import math
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

SAMPLE = 1e-3    # seconds: shorter calls are repeated until a sample lasts about this long


def in_turn(functions: dict[str, Callable[[], object]], rounds: int, *, warmup: int = 3,
            device: str = "cpu", graph: bool = False) -> dict[str, np.ndarray]:
    """Seconds a call, (rounds,) for each function.

    Round i of one lies beside round i of the others, each round in another order, so that a machine
    whose speed drifts is fast or slow for all alike, and none always finds the cache as the same
    other one left it: compare medians, or ratios round by round. Garbage is collected before, not
    while, it is timed. On a GPU (`device` "cuda") CUDA events measure; with `graph` each function
    is captured once as a CUDA graph and its replay is timed, without Python.
    """
    if device == "cuda" and graph:
        functions = {name: _graph(function) for name, function in functions.items()}
    clock = _events if device == "cuda" else _seconds
    repeats = {}
    for name, function in functions.items():
        for _ in range(warmup):
            function()
        repeats[name] = max(1, math.ceil(SAMPLE / max(clock(function, 1), 1e-9)))
    times, names = {name: [] for name in functions}, list(functions)
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for name in names[i % len(names):] + names[:i % len(names)]:
                times[name].append(clock(functions[name], repeats[name]))
    finally:
        if enabled:
            gc.enable()
    return {name: np.array(taken) for name, taken in times.items()}


def _seconds(function, repeats):
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def _events(function, repeats):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def _graph(function):
    """`function` as a captured CUDA graph, after three calls on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def hardware(device: str = "cpu") -> str:
    """The name of the processor, or of the GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text("utf8"))
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
