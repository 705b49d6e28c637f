"""The demo's dataset in LLaVA-Instruct form: conversations about drawn shapes, and prose.

The prose is on every machine: docstrings of the standard library and of installed packages, with code,
tables and signatures taken out.
"""

import ast
import json
import re
import site
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import shapes

SHORTEST, LONGEST = 200, 900
"""Characters of a piece of prose."""


def write_dataset(folder: Path, n_pictures: int, n_prose: int) -> Path:
    """Write train.jsonl and images/ into `folder`; a dataset that is there already is left as it is."""
    target = folder / "train.jsonl"
    if target.exists():
        return target
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = [picture_row(number, folder) for number in shapes.DEMO[:n_pictures]]
    lines += [prose_row(i, text) for i, text in zip(range(n_prose), prose(), strict=False)]
    partial = folder / "train.jsonl.partial"
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    partial.rename(target)
    return target


def picture_row(number: int, folder: Path) -> dict[str, object]:
    name = f"images/{number}.png"
    shapes.draw(number).save(folder / name)
    talk = []
    for i, turn in enumerate(shapes.turns(number)):
        talk.append({"from": "human", "value": ("<image>\n" if i == 0 else "") + turn.question})
        talk.append({"from": "gpt", "value": turn.answer})
    return {"id": f"shape-{number}", "image": name, "conversations": talk}


def write_unseen(folder: Path, numbers: range) -> Path:
    """Pictures that neither the model's training nor the demo's dataset drew, with their captions."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in numbers:
        name = f"images/{number}.png"
        shapes.draw(number).save(folder / name)
        said = [("human", "<image>\nDescribe the picture."), ("gpt", shapes.caption(number))]
        talk = [{"from": who, "value": what} for who, what in said]
        rows.append({"id": f"shape-{number}", "image": name, "conversations": talk})
    target = folder / f"{numbers.start}-{numbers.stop}.jsonl"
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


def prose_row(number: int, text: str) -> dict[str, object]:
    subject = text.split(".")[0][:60].strip()
    talk = [{"from": "human", "value": f"Go on: {subject}"}, {"from": "gpt", "value": text}]
    return {"id": f"prose-{number}", "conversations": talk}


def prose() -> Iterator[str]:
    """Paragraphs of English from docstrings, each at most once, in a fixed order."""
    roots = [Path(sysconfig.get_paths()["stdlib"]), *map(Path, site.getsitepackages())]
    seen: set[str] = set()
    for root in roots:
        for file in sorted(root.rglob("*.py")):
            if ("site-packages" in file.parts and "site-packages" not in root.parts) or "test" in str(file):
                continue
            for text in docstrings(file):
                for paragraph in re.split(r"\n\s*\n", text):
                    clean = " ".join(paragraph.split())
                    if SHORTEST <= len(clean) <= LONGEST and is_prose(clean) and clean not in seen:
                        seen.add(clean)
                        yield clean


def docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return  # some files of the standard library are broken on purpose
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""


def is_prose(text: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in text)
    return letters > 0.92 * len(text) and text[0].isupper() and text.endswith((".", "?", "!"))
