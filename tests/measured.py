"""What a command really took, in a process of its own."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import re, sys
from pathlib import Path
from clt.cli import main
import clt.train.loop
def status(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
try:
    main()
except SystemExit as end:
    assert not end.code
print(before, status("VmHWM"))
"""


def train_peak(cache: Path, out: Path, *options: object) -> tuple[int, int]:
    """(resident bytes after all imports, peak) of `clt train`; pread, so that no page of a file counts."""
    arguments = ["train", cache, "--run-name", "m", "--out", out, "--io", "pread", *options]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    before, peak = done.stdout.splitlines()[-1].split()
    return int(before), int(peak)
