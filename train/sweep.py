"""Many configurations from one read of the cache: tokens are decoded once, and every run takes its own step.

checkpoints/NAME/sweep.json       its runs, and which have diverged
checkpoints/NAME/report.html      the table, the frontier and the curves of all
checkpoints/NAME/<label>/         a run's folder, as `clt train` would have written it alone
"""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..cache_format.files import write_file
from .announcement import announce_sweep, sink_warning
from .config import TrainConfig
from .evaluate import Evaluation
from .finite import DivergedError
from .job import started_by_torchrun
from .loop import Loop, held_out_numbers, new_reader, open_source, require_held_out
from .run import Run, new_run, say
from .source import Source
from .sweep_file import Entry
from .sweep_report import SweepReport, SweepRun, write_sweep_page
from .wandb_run import require_wandb

FILE = "sweep.json"


class Sweep:
    """The folder of a sweep, and its runs by label."""

    def __init__(self, folder: Path, entries: list[Entry], configs: list[TrainConfig]) -> None:
        self.folder, self.entries = folder, entries
        self.configs = {entry.label: config for entry, config in zip(entries, configs, strict=True)}
        self.diverged: dict[str, str] = {}
        """By label, why."""

    def begin(self, resume: bool) -> None:
        """Take the folder, or check that the one to resume is this sweep."""
        path = self.folder / FILE
        if resume:
            if not path.exists():
                raise ValueError(f"{self.folder} holds no sweep to resume; leave out --resume to begin one")
            runs, self.diverged = parse_sweep(json.loads(path.read_text()), path)
            if runs != list(self.configs):
                raise ValueError(
                    f"{self.folder} is a sweep of other runs: {', '.join(runs)}; now "
                    f"{', '.join(self.configs)}; use the same file or another --run-name"
                )
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} exists; choose another --run-name, or go on with --resume")

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        data = {"runs": list(self.configs), "diverged": self.diverged}
        write_file(self.folder / FILE, (json.dumps(data, indent=1) + "\n").encode())

    def note_diverged(self, run: Run, fault: DivergedError) -> None:
        """The run goes; the others go on."""
        label = run.config.run.name
        run.log.close(failed=True)
        del run.model, run.optimizer, run.placement  # their memory is the others' to use
        self.diverged[label] = str(fault)
        self.write()
        say(f"{label} is dropped: {fault}")
        if len(self.diverged) == len(self.configs):
            raise ValueError(
                f"all {len(self.configs)} runs of the sweep have diverged, the last one at {fault}"
            )


def parse_sweep(data: object, path: Path) -> tuple[list[str], dict[str, str]]:
    """Of sweep.json: its runs, and why some have diverged."""
    found = data if isinstance(data, dict) else {}
    runs, diverged = found.get("runs"), found.get("diverged")
    if not isinstance(runs, list) or not isinstance(diverged, dict):
        raise ValueError(f"{path}: expected a list of runs and those that diverged, found {data!r}")
    return [str(label) for label in runs], {str(label): str(reason) for label, reason in diverged.items()}


def sweep(folder: Path, entries: list[Entry], configs: list[TrainConfig], resume: bool) -> SweepReport:
    """Train all; with `resume`, each goes on from its latest checkpoint."""
    if started_by_torchrun():
        raise ValueError("--sweep: expected one process, found torchrun; start `clt train` without it")
    if configs[0].log_to_wandb:
        require_wandb()
    found = Sweep(folder, entries, configs)
    found.begin(resume)
    source = open_source(configs[0], "train")
    if configs[0].save_best:
        require_held_out(configs[0])
    alive = [config for label, config in found.configs.items() if label not in found.diverged]
    if not alive:
        raise ValueError(f"all {len(configs)} runs of {folder} have diverged; begin another with lower --lr")
    runs = [new_run(config, source, resume) for config in alive]
    found.write()
    # a kill may have come before a run had its folder, or its first checkpoint
    states = [run.begin(resume and (run.config.run / "config.json").exists()) for run in runs]
    say(announce_sweep(runs, source, folder))
    if warning := sink_warning(source):
        say(warning)
    return _train(found, runs, states, source)


def _train(found: Sweep, runs: list[Run], states: list[dict[str, Any] | None], source: Source) -> SweepReport:
    with new_reader(runs[0].config, source) as reader, ExitStack() as stack:
        start = reader.state()
        # the reader checks each, and goes on from the last it is given: that of the run which is least far
        for run, state in sorted(zip(runs, states, strict=True), key=lambda pair: -pair[0].step):
            stack.enter_context(run)
            reader.restore(state or start)
        loop = Loop(runs, reader, found.note_diverged)
        seconds = loop.go()
        held_out = held_out_numbers(loop.runs)
        for run, evaluation in zip(loop.runs, held_out, strict=True):
            run.write_report(evaluation)
    report = SweepReport(
        folder=found.folder,
        runs=_results(found, loop.runs, held_out),
        steps=loop.plan.steps,
        tokens=loop.plan.tokens,
        seconds=seconds,
        stall=reader.waited / seconds,
    )
    write_sweep_page(report)
    return report


def _results(found: Sweep, runs: list[Run], held_out: list[Evaluation | str]) -> list[SweepRun]:
    """In the order of the file, those that diverged among them."""
    done = {run.config.run.name: (run, held) for run, held in zip(runs, held_out, strict=True)}
    results = []
    for entry in found.entries:
        if entry.label in done:
            results.append(SweepRun.of(entry, *done[entry.label]))
        else:
            folder, reason = found.folder / entry.label, found.diverged[entry.label]
            results.append(SweepRun.of_diverged(entry, folder, reason))
    return results
