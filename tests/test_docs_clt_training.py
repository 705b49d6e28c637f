"""docs/clt-training.md names eighteen defects, tests that exist, and options that exist."""

import re
from pathlib import Path

from typer.main import get_command

from clt.cli import app

HERE = Path(__file__).parent
TEXT = (HERE.parent / "docs" / "clt-training.md").read_text()


def test_every_defect_has_a_test_that_exists() -> None:
    rows = re.findall(r"^\| (B\d+) .*`(test_\w+\.py)(?:::(test_\w+))?` \|$", TEXT, re.M)
    assert [number for number, _, _ in rows] == [f"B{n}" for n in range(1, 19)]
    for _, file, name in rows:
        assert f"def {name or 'test_'}" in (HERE / file).read_text(), (file, name)


def test_every_option_exists() -> None:
    """Those of the right column of the first table."""
    table = TEXT.split("## Defects")[0]
    right = [row.split(" | ")[-1] for row in table.splitlines() if row.startswith("| `")]
    named = {option for cell in right for option in re.findall(r"--[a-z0-9-]+", cell)}
    train = get_command(app).commands["train"]  # type: ignore[attr-defined]
    known = {option for parameter in train.params for option in parameter.opts}
    assert len(named) > 15
    assert named <= known, named - known
