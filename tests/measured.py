"""What a command really took, in a process of its own."""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

PROGRAM = """
import re, sys, threading, time
from pathlib import Path
from clt.cli import main
import clt.train.loop
def status(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before, own = status("VmRSS"), status("RssAnon")
most = own
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
def watch():
    global most
    while True:
        most = max(most, status("RssAnon"))
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
try:
    main()
except SystemExit as end:
    assert not end.code
print(before, status("VmHWM"), most - own)
"""


class TrainPeak(NamedTuple):
    """Bytes of `clt train` in a process of its own."""

    before: int
    """Resident, after all imports"""
    peak: int
    """Resident; the system may have taken back pages of libraries meanwhile"""
    growth: int
    """Of memory that belongs to no file, at its peak"""


def train_peak(cache: Path, out: Path, *options: object) -> TrainPeak:
    """What it took; pread where nothing else is asked for, so that no page of a cache's file counts."""
    arguments = ["train", cache, "--run-name", "m", "--out", out, "--io", "pread", *options]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    return TrainPeak(*map(int, done.stdout.splitlines()[-1].split()))


ANONYMOUS = """
import re, sys, threading, time
from pathlib import Path
from clt.cli import main
import clt.analysis.features
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = peak = anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
try:
    main()
except SystemExit as end:
    assert not end.code
print(peak - before)
"""


def features_peak(run: Path, *options: object) -> int:
    """Bytes that `clt features` took at its peak beside what its imports did; pages of files do not count."""
    done = subprocess.run(
        [sys.executable, "-c", ANONYMOUS, "features", str(run), *map(str, options)],
        capture_output=True,
        text=True,
        env={
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_MMAP_THRESHOLD_": "1048576",
            "PATH": "",
        },
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])
