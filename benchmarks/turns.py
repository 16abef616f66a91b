"""Variants of a benchmark as processes that take turns, so that what disturbs the machine hits all alike."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence


def serve(step: Callable[[], None], synchronize: Callable[[], None] = lambda: None) -> None:
    """Runs as many steps as each line of stdin says; prints their seconds of processor and clock."""
    for line in sys.stdin:
        cpu, clock = time.process_time(), time.perf_counter()
        for _ in range(int(line)):
            step()
        synchronize()
        print(f"seconds {time.process_time() - cpu} {time.perf_counter() - clock}", flush=True)


def take_turns(
    commands: Mapping[str, Sequence[str]], rounds: int, steps: int
) -> dict[str, list[tuple[float, float]]]:
    """Runs a process of `serve` for each variant, one at a time; returns milliseconds a step by turn.

    Each pair is of processor and clock. The first turn warms up and is left out.
    """
    workers = {
        name: subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name, words in commands.items()
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
    names = list(workers)
    for turn in range(rounds):
        at = turn % len(names)
        for name in (*names[at:], *names[:at]):
            process = workers[name]
            assert process.stdin is not None
            assert process.stdout is not None
            print(steps, file=process.stdin, flush=True)
            line = next((line for line in process.stdout if line.startswith("seconds ")), None)
            if line is None:
                raise SystemExit(f"{name} ended with exit status {process.wait()}")
            cpu, clock = map(float, line.split()[1:])
            times[name].append((1000 * cpu / steps, 1000 * clock / steps))
        print(f"round {turn + 1} of {rounds}", file=sys.stderr)
    for process in workers.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    return {name: found[1:] for name, found in times.items()}


def paired_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Computes the median over the turns of one variant's time divided by another's."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))
