"""What every command costs as the model grows from 10 M to 7 B parameters: seconds, peak memory.

    python benchmarks/growth.py 10M 100M 1B 7B

LLaVAs in bfloat16 with random weights, written file by file to a temporary folder (twice their
size must be free there). Each command is a process of its own, imports included; ``resident`` is
the most memory that it held, pages of mapped files included.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from streaming import Size, make

SIZES = {
    "10M": Size(6, width=256, hidden=704, vocabulary=4000, tower=6, tower_width=256),
    "100M": Size(8, width=768, hidden=2048, vocabulary=16000, tower=6, tower_width=512),
    "1B": Size(16, width=2048, hidden=5632, vocabulary=32000, tower=24, tower_width=1024),
    "7B": Size(32, width=4096, hidden=11008, vocabulary=32000, tower=24, tower_width=1024),
}
LOAD = "import sys, vlprune; vlprune.load(sys.argv[1])"


def commands(place: Path) -> dict[str, list[str]]:
    """Every command that needs neither labels nor training, in an order that can be run."""
    dense, small = str(place / "dense"), str(place / "small")
    run = [sys.executable, "-c", "from vlprune.commands.main import main; main()"]
    return {
        "inspect --config-only": [*run, "inspect", dense, "--config-only"],
        "inspect": [*run, "inspect", dense],
        "compress --method magnitude": [
            *run, "compress", dense, "--budget", "params=0.6", "--method", "magnitude",
            "--attention", "head", "-o", small,
        ],
        "cut --no-verify": [
            *run, "cut", dense, f"{small}/plan.json", "--no-verify", "-o", str(place / "again"),
        ],
        "cut": [*run, "cut", dense, f"{small}/plan.json", "-o", str(place / "proved")],
        "vlprune.load of the small model": [sys.executable, "-c", LOAD, small],
    }  # fmt: skip


def run(command: list[str], log: Path) -> tuple[float, float, int]:
    """Seconds, peak resident bytes and exit code of a process."""
    began = time.monotonic()
    with log.open("w") as file:
        flags = [(os.POSIX_SPAWN_DUP2, file.fileno(), stream) for stream in (1, 2)]
        process = os.posix_spawn(command[0], command, os.environ, file_actions=flags)
        _, status, usage = os.wait4(process, 0)
    return time.monotonic() - began, usage.ru_maxrss * 1024, os.waitstatus_to_exitcode(status)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="+", choices=list(SIZES))
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print("| model | on disk | command | seconds | peak resident |")
    print("|---|---:|---|---:|---:|", flush=True)
    for name in given.sizes:
        with tempfile.TemporaryDirectory(prefix="vlprune-growth-") as folder:
            place = Path(folder)
            size = make(place, SIZES[name])
            for label, command in commands(place).items():
                seconds, peak, code = run(command, place / "log")
                said = (place / "log").read_text().strip().splitlines()[-1:] if code else []
                cells = said or [f"{seconds:.1f}", f"{peak / 1e9:.2f} GB"]
                print(
                    f"| {name} | {size / 1e9:.2f} GB | {label} | {' | '.join(cells)} |", flush=True
                )


if __name__ == "__main__":
    main()
