"""The README's commands work as they stand, its tree is the tree, and its options are known."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import tiny

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.S)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_make_targets_exist() -> None:
    targets = [command.split()[1] for command in commands() if command.startswith("make ")]
    assert targets == ["demo", "test"]
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_commands_run_as_written(tmp_path: Path) -> None:
    """harvest, train and eval, letter by letter, with a tiny LLaVA under the model's name."""
    tiny.save_llava(tmp_path / "llava-hf" / "llava-1.5-7b-hf")
    tiny.write_dataset(tmp_path, n_pictures=20, n_texts=250)
    ours = [command for command in commands() if command.startswith("clt ")]
    assert [command.split()[1] for command in ours] == ["harvest", "train", "eval"]
    for command in ours:
        arguments = [sys.executable, "-m", "clt.cli", *shlex.split(command)[1:]]
        done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)


def test_the_python_example_names_what_exists() -> None:
    code = re.search(r"```python\n(.*?)```", TEXT, re.S)[1]
    imports = "\n".join(line for line in code.splitlines() if line.startswith("from "))
    exec(imports, {})


def test_the_tree_is_the_tree() -> None:
    """Every module is named, and every name is a file."""
    tree = TEXT.split("## The tree")[1].split("## Development")[0]
    named = set(re.findall(r"\b[a-z0-9_]+\.py\b", tree)) - {"test_.py"}
    folders = (".", "commands", "harvest", "cache_format", "train", "export", "analysis", "planning")
    folders += ("remote",)
    modules = {
        path.name
        for folder in (
            ".",
            "commands",
            "harvest",
            "cache_format",
            "train",
            "export",
            "analysis",
            "planning",
            "remote",
        )
        for path in (ROOT / folder).glob("*.py")
        if path.name not in ("__init__.py", "config.py")
    }
    if (ROOT / "harvest" / "run.py").exists():  # on the installed wheel, the tree lies elsewhere
        assert modules - {"errors.py", "files.py"} <= named
    assert "predecessor's command" in TEXT
