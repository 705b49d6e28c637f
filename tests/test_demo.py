"""The demo model: the shipped weights still see, and the pictures are what their captions say."""

import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

DEMO = Path(__file__).parents[1] / "demo"
sys.path.insert(0, str(DEMO))  # the demo's modules are scripts beside each other, not a package

import data  # noqa: E402
import llava  # noqa: E402
import shapes  # noqa: E402
import train_eyes  # noqa: E402


@pytest.mark.parametrize("pictures", [15, pytest.param(60, marks=pytest.mark.slow)])
def test_shipped_weights_caption_unseen_pictures(pictures: int) -> None:
    """At least 0.9 exact captions on pictures that training never drew, with the shipped weights."""
    tokenizer = llava.make_tokenizer()
    model, processor = llava.make_llava(tokenizer), llava.make_processor(tokenizer)
    assert train_eyes.caption_score(model, processor, shapes.UNSEEN[1000 : 1000 + pictures]) >= 0.9


def test_the_score_is_stored_with_the_weights() -> None:
    with safe_open(llava.EYES, "numpy") as file:
        assert float(file.metadata()["caption_exact_match"]) >= 0.9
    assert llava.EYES.stat().st_size < 10e6


def test_training_and_demo_pictures_are_apart() -> None:
    assert shapes.TRAINING.stop <= shapes.UNSEEN.start
    assert shapes.UNSEEN.stop <= shapes.DEMO.start


@pytest.mark.parametrize("number", range(20))
def test_a_picture_shows_its_scene(number: int) -> None:
    """The centre has the shape's colour (nearest of the eight), a far corner the background's."""
    what, pixels = shapes.scene(number), np.asarray(shapes.draw(number), float)
    palette = np.array(list(shapes.COLOURS.values()), float)

    def nearest(pixel: np.ndarray) -> str:
        return list(shapes.COLOURS)[np.abs(palette - pixel).sum(axis=1).argmin()]

    (x, y), edge = what.centre, shapes.SIDE - 1
    corner = (0 if y > shapes.SIDE // 2 else edge, 0 if x > shapes.SIDE // 2 else edge)
    assert nearest(pixels[y, x]) == what.colour
    assert nearest(pixels[corner]) == what.background
    assert shapes.caption(number).startswith(("A ", "An "))
    covered = shapes.coverage(number, llava.PATCH)
    assert covered.shape == (7, 7)
    assert covered[y // llava.PATCH, x // llava.PATCH] > 0


def test_dataset_is_llava_instruct(tmp_path: Path) -> None:
    import json

    path = data.write_dataset(tmp_path, 3, 2)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 5
    assert sum("image" in row for row in rows) == 3
    for row in rows:
        tags = sum(turn["value"].count("<image>") for turn in row["conversations"])
        assert tags == ("image" in row)
        if "image" in row:
            assert (tmp_path / row["image"]).exists()


def test_prose_is_prose() -> None:
    assert data.is_prose("Return the answer to a question, in words that people use.")
    assert not data.is_prose("x = {1: 2}; y[0] += 3 ** 4 -> z")
