"""What ships: every package of the tree, the format's specification, and a reason for each dependency."""

import re
import tomllib
from importlib.resources import files as files_of
from pathlib import Path

import clt.train

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_pyproject_lists_every_package() -> None:
    """A package that is not listed would work in a checkout and be missing from the wheel."""
    names = ("analysis", "cache_format", "commands", "export", "harvest", "planning", "remote", "train")
    tree = {
        f"clt.{path.parent.relative_to(ROOT).as_posix().replace('/', '.')}"
        for name in names
        for path in (ROOT / name).rglob("__init__.py")
    }
    assert tree | {"clt"} == set(PROJECT["tool"]["setuptools"]["packages"])


def test_training_needs_no_model_libraries() -> None:
    """transformers and datasets are an extra, not a dependency."""
    names = " ".join(PROJECT["project"]["dependencies"])
    assert not any(word in names for word in ("transformers", "datasets", "pillow"))
    assert "transformers" in " ".join(PROJECT["project"]["optional-dependencies"]["harvest"])


def test_each_dependency_says_why() -> None:
    """One comment a line in pyproject.toml."""
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    start = lines.index("dependencies = [") + 1
    for line in lines[start : lines.index("]", start)]:
        assert "# " in line, line


def test_format_document_ships() -> None:
    assert "FORMAT.md" in PROJECT["tool"]["setuptools"]["package-data"]["clt.cache_format"]
    assert (ROOT / "cache_format" / "FORMAT.md").exists()


def test_what_the_report_page_needs_ships() -> None:
    """Style and script of report.html are files beside the modules."""
    files = {path.name for kind in ("css", "js") for path in (ROOT / "train").glob(f"*.{kind}")}
    shipped = set(PROJECT["tool"]["setuptools"]["package-data"]["clt.train"])
    assert files <= shipped
    assert all((files_of(clt.train) / name).is_file() for name in files)


def headers_of(source: Path) -> set[str]:
    """What a C file includes from its own folder, and what those include."""
    if not source.is_file():
        return set()
    found = [source.parent / name for name in re.findall(r'#include "(.+)"', source.read_text())]
    named = {f"{path.parent.name}/{path.name}" for path in found}
    return named.union(*(headers_of(path) for path in found))


def test_every_c_file_is_built_if_it_can_be() -> None:
    """An extension may fail to build, is described to mypy, and needs no other Python than the wheel's."""
    built = {source: ext for ext in PROJECT["tool"]["setuptools"]["ext-modules"] for source in ext["sources"]}
    sources = {f"{path.parent.name}/{path.name}" for path in ROOT.glob("*/*.c")}
    assert built.keys() == sources or not (ROOT / ".ci").is_dir()  # beside an installed wheel lie no sources
    for source, extension in built.items():
        package, module = extension["name"].rsplit(".", 1)
        assert package == f"clt.{Path(source).parent}"
        assert (files_of(package) / f"{module}.pyi").is_file()
        assert extension["optional"] is extension["py-limited-api"] is True
        assert set(extension.get("depends", ())) == headers_of(ROOT / source) or not (ROOT / ".ci").is_dir()
        fused = "fast" if package == "clt.train" else "off"  # a cache has the same bits on every processor
        assert f"-ffp-contract={fused}" in extension["extra-compile-args"]


def test_only_the_known_modules_lie_at_the_root() -> None:
    """Every .py at the root ships inside `clt`."""
    assert {path.name for path in ROOT.glob("*.py")} == {
        "cli.py",
        "devices.py",
        "heap.py",
        "progress.py",
        "stopping.py",
        "stopwatch.py",
    }
