"""Which part of a picture each image token saw, held against what the models really look at.

With its attention put out, a vision tower carries nothing from one patch to another. Then the embedding that
the language model is given for an image token depends on the pixels of that token's own rectangle, on every
quarter of it, and on no others. So pictures are changed, here and there, and embeddings compared.
"""

import re
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny_families
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import Tensor, nn

import clt.cache_format
from clt.cache_format.layout import KINDS
from clt.cache_format.provenance import patch_rectangle
from clt.harvest.batches import collate
from clt.harvest.config import HarvestConfig
from clt.harvest.grids import LAYOUTS, Prompt, find_runs, place_patches
from clt.harvest.model import LoadedModel, load_model, load_processor
from clt.harvest.pictures import Picture
from clt.harvest.rows import BadSample
from clt.harvest.samples import Sample, Turn
from clt.harvest.tokens import IMAGE, TEMPLATE, TEXT, PreparedSample, prepare

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:transformers")

SIZES = [(150, 100), (90, 160)]
CONFIG = HarvestConfig(model="", dataset="", cache=Path("c"))
GREY, WHITE = (90, 100, 110), (230, 220, 210)
FULL_SIZE = tiny_families.full_size_processors()
FAINT = 1e-4
"""Norm of what arithmetic alone changes."""
MATTERS = 0.1
"""Least share that a quarter has in what its rectangle changes; resizing alone spreads less."""


@pytest.fixture(scope="module", params=tiny_families.VISION)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tiny_families.save_vision(request.param, tmp_path_factory.mktemp(request.param) / "model")
    loaded = load_model(replace(CONFIG, model=str(folder)))
    put_out_attention(loaded)
    return loaded


def put_out_attention(model: LoadedModel) -> None:
    seeing = set(model.body.modules()) - set(model.whole.get_decoder().modules())
    names = {id(module): name for name, module in model.body.named_modules()}
    ends = ("self_attn.out_proj", "attn.proj", "attention.projection_layer")
    last = [module for module in seeing if names[id(module)].endswith(ends)]
    assert len(last) == tiny_families.LAYERS
    for module in last:
        assert isinstance(module, nn.Linear)
        module.weight.zero_()
        if module.bias is not None:
            module.bias.zero_()


def picture(size: tuple[int, int], light: list[tuple[float, ...]] = ()) -> Picture:
    """A grey picture with white rectangles."""
    image = Image.new("RGB", size, GREY)
    draw = ImageDraw.Draw(image)
    for left, top, right, bottom in light:
        if right - left >= 1 and bottom - top >= 1:
            draw.rectangle((round(left), round(top), round(right) - 1, round(bottom) - 1), fill=WHITE)
    return Picture("a.png", "", size, 1, image)


def sample(*pictures: Picture) -> Sample:
    turns = [Turn("user", [*([None] * len(pictures)), "what is it"]), Turn("assistant", ["a red circle"])]
    return Sample("id", turns, "", ["a.png"] * len(pictures), list(pictures))


def embeddings(model: LoadedModel, samples: list[PreparedSample]) -> Tensor:
    """(sample, position, d_model) that the first block of the language model reads."""
    seen: list[Tensor] = []

    class Enough(Exception):
        pass

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise Enough

    handle = model.whole.get_decoder().layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.inference_mode(), pytest.raises(Enough):
            model.body(**collate(samples).inputs, use_cache=False)
    finally:
        handle.remove()
    return seen[0]


class Probe(NamedTuple):
    position: int
    picture: int
    rectangle: list[float]
    cell: tuple[float, float]
    """Width and height of the rectangle, were it not cut at the picture's edge."""


def probed(columns: dict[str, Any], images: list[dict[str, Any]]) -> Iterator[Probe]:
    """Some image tokens of each tile."""
    rng = np.random.default_rng(0)
    for nth, image in enumerate(images):
        grids = image.get("tiles") or [image]
        for grid in grids:
            first, last = grid["positions"]
            inside = [p for p in range(first, last) if columns["kind"][p] == IMAGE]
            chosen = {*rng.choice(inside, min(len(inside), 2 + 8 // len(grids)), replace=False).tolist()}
            for position in sorted(chosen | {inside[0], inside[-1]} if len(grids) < 3 else chosen):
                row, col = int(columns["row"][position]), int(columns["col"][position])
                rectangle = patch_rectangle(image, position, row, col)
                assert rectangle is not None
                if min(rectangle[2] - rectangle[0], rectangle[3] - rectangle[1]) >= 5:
                    left, top, right, bottom = grid["crop"]
                    cell = ((right - left) / grid["grid"][1], (bottom - top) / grid["grid"][0])
                    yield Probe(position, nth, rectangle, cell)


def quarters(rectangle: list[float]) -> list[tuple[float, ...]]:
    left, top, right, bottom = rectangle
    x, y = (left + right) / 2, (top + bottom) / 2
    return [(left, top, x, y), (x, top, right, y), (left, y, x, bottom), (x, y, right, bottom)]


def outside(probe: Probe, size: tuple[int, int]) -> list[tuple[float, ...]]:
    """All but the rectangle and three quarters of a cell around it, where resizing blurs."""
    left, top, right, bottom = probe.rectangle
    across, down = 0.75 * probe.cell[0] + 1, 0.75 * probe.cell[1] + 1
    width, height = size
    left, top, right, bottom = left - across, top - down, right + across, bottom + down
    return [
        *((0, 0, left, height), (right, 0, width, height)),
        *((0, 0, width, top), (0, bottom, width, height)),
    ]


def test_a_token_sees_its_rectangle_all_of_it_and_nothing_else(model: LoadedModel) -> None:
    """In both pictures of a sample, wide and high, in each tile and in the whole pictures beside them."""
    plain = prepare(sample(*(picture(size) for size in SIZES)), 0, model, CONFIG)
    images = plain.line["images"]
    assert [image["size"] for image in images] == [list(size) for size in SIZES]
    probes = list(probed(plain.columns, images))
    assert len(probes) > 15
    variants = [plain]
    for probe in probes:
        size = SIZES[probe.picture]
        parts = [[quarter] for quarter in quarters(probe.rectangle)]
        for light in (*parts, [tuple(probe.rectangle)], outside(probe, size)):
            pictures = [
                picture(size, light if nth == probe.picture else []) for nth, size in enumerate(SIZES)
            ]
            variants.append(prepare(sample(*pictures), 0, model, CONFIG))
    found = torch.cat([embeddings(model, variants[at : at + 64]) for at in range(0, len(variants), 64)])
    changed = (found - found[0]).norm(dim=2)
    separators = np.flatnonzero((plain.columns["token_id"] == model.image_token) & (plain.columns["row"] < 0))
    assert (changed[:, separators] < FAINT).all()
    for number, probe in enumerate(probes):
        *parts, whole, others = changed[1 + 6 * number : 7 + 6 * number, probe.position].tolist()
        where = f"{probe} of {images}: quarters {parts}, whole {whole}, others {others}"
        assert whole > 1000 * FAINT, where
        assert min(parts) > MATTERS * whole, where
        assert others < FAINT, where


def test_kinds(model: LoadedModel) -> None:
    """Image tokens have a place, text is the sample's; the rest is the template's or the processor's."""
    plain = prepare(sample(*(picture(size) for size in SIZES)), 0, model, CONFIG)
    columns, ids = plain.columns, plain.columns["token_id"]
    kind = columns["kind"]
    assert np.array_equal(kind == IMAGE, columns["row"] >= 0)
    assert np.array_equal(kind == IMAGE, columns["col"] >= 0)
    assert (ids[kind == IMAGE] == model.image_token).all()
    assert (kind[ids == model.image_token] % 2 == 1).all()
    assert model.tokenizer.decode(ids[kind == TEXT]) == "what is ita red circle"
    assert (kind == KINDS.index("bos")).sum() == 1
    spans = [span for image in plain.line["images"] for span in image.get("tiles") or [image]]
    spanned = np.concatenate([np.arange(*span["positions"]) for span in spans])
    assert set(np.flatnonzero(ids == model.image_token)) == set(spanned)
    for span in spans:
        rows, cols = span["grid"]
        inside = slice(*span["positions"])
        cells = np.stack([columns["row"][inside], columns["col"][inside]])[:, kind[inside] == IMAGE]
        assert cells.T.tolist() == [[row, col] for row in range(rows) for col in range(cols)]


def test_the_rectangles_of_a_grid_are_its_part_of_the_picture(model: LoadedModel) -> None:
    """Tiles together, like the whole picture beside them, are all of it; LLaVA-NeXT's grid cuts edges."""
    plain = prepare(sample(*(picture(size) for size in SIZES)), 0, model, CONFIG)
    row, col = plain.columns["row"], plain.columns["col"]
    for image, (width, height) in zip(plain.line["images"], SIZES, strict=True):
        areas = []
        for grid in image.get("tiles") or [image]:
            inside = [p for p in range(*grid["positions"]) if row[p] >= 0]
            seen = np.array([patch_rectangle(image, p, int(row[p]), int(col[p])) for p in inside])
            areas.append(((seen[:, 2] - seen[:, 0]) * (seen[:, 3] - seen[:, 1])).sum() / (width * height))
        if type(model.processor).__name__ in ("LlavaNextProcessor", "LlavaOnevisionProcessor"):
            assert areas[0] == pytest.approx(1, rel=1e-3)
            assert 0.8 < areas[1] < 1.001
        elif len(areas) > 1:
            assert [sum(areas[:-1]), areas[-1]] == pytest.approx([1, 1], rel=1e-3)
        else:
            assert areas == pytest.approx([1], rel=1e-3)


@settings(max_examples=12)
@example(width=97, height=8)
@given(width=st.integers(8, 400), height=st.integers(8, 400))
def test_pictures_of_any_shape_are_counted_right(model: LoadedModel, width: int, height: int) -> None:
    """The processor makes as many tokens as the layout says, and their boxes lie on the picture."""
    assume(max(width, height) < 30 * min(width, height))
    image = prepare(sample(picture((width, height))), 0, model, replace(CONFIG, ctx_len=4096)).line["images"][
        0
    ]
    for grid in image.get("tiles") or [image]:
        left, top, right, bottom = grid["crop"]
        assert left < width
        assert top < height
        assert right > 0
        assert bottom > 0


def test_the_format_names_what_is_recorded(model: LoadedModel) -> None:
    """FORMAT.md's table of `images`, and of their tiles."""
    text = Path(clt.cache_format.__file__).with_name("FORMAT.md").read_text()
    table = text.split("\n## Samples\n")[1].split("\n## ")[0]
    members = set(re.findall(r"^\| (\w+) \|", table, re.M)) - {"member"}
    image = prepare(sample(picture(SIZES[0])), 0, model, CONFIG).line["images"][0]
    assert members - {"tiles", "frames"} <= set(image) <= members
    for tile in image.get("tiles", []):
        assert set(tile) == {"positions", "grid", "crop"}


def test_an_image_is_never_cut(model: LoadedModel) -> None:
    """Not even its last separator."""
    whole = prepare(sample(picture(SIZES[0])), 0, model, CONFIG)
    end = int(np.flatnonzero(whole.columns["token_id"] == model.image_token)[-1]) + 1
    with pytest.raises(BadSample, match=f"an image ends at token {end}, beyond ctx-len {end - 1}"):
        prepare(sample(picture(SIZES[0])), 0, model, replace(CONFIG, ctx_len=end - 1))
    assert prepare(sample(picture(SIZES[0])), 0, model, replace(CONFIG, ctx_len=end)).length == end


def test_a_share_of_the_patches_is_kept(model: LoadedModel) -> None:
    config = replace(CONFIG, keep_image_tokens=0.25)
    full, some = (prepare(sample(picture(SIZES[0])), 0, model, c) for c in (CONFIG, config))
    patches = int((full.columns["kind"] == IMAGE).sum())
    assert (some.columns["kind"] == IMAGE).sum() == round(patches / 4)
    assert (some.columns["kind"] == TEMPLATE).sum() == (full.columns["kind"] == TEMPLATE).sum()


def test_a_processor_that_is_not_known_has_no_places(model: LoadedModel) -> None:
    """The tokens are image tokens all the same, and pictures share them."""
    unknown = type("OtherProcessor", (type(model.processor),), {})
    processor = copy(model.processor)
    processor.__class__ = unknown
    other = replace(model, processor=processor)
    if "PaliGemma" in type(model.processor).__name__:
        with pytest.raises(ValueError, match="has no chat template"):
            prepare(sample(picture(SIZES[0])), 0, other, CONFIG)
        return
    found = prepare(sample(picture(SIZES[0])), 0, other, CONFIG)
    assert (found.columns["row"] == -1).all()
    assert ((found.columns["kind"] == IMAGE) == (found.columns["token_id"] == model.image_token)).all()
    assert found.line["images"][0]["grid"] is None
    assert patch_rectangle(found.line["images"][0], 3, -1, -1) is None


def test_a_processor_that_is_not_known_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_families.save_vision("llava", tmp_path / "model")
    load_processor(replace(CONFIG, model=str(folder)))
    assert "LlavaProcessor" not in capsys.readouterr().err
    monkeypatch.delitem(LAYOUTS, "LlavaProcessor")
    load_processor(replace(CONFIG, model=str(folder)))
    assert "LlavaProcessor is not one of Gemma3Processor, " in capsys.readouterr().err


def test_more_tokens_than_the_layout_says_are_found_out(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor of another version that lays them differently must not be believed."""
    name = type(model.processor).__name__
    known = LAYOUTS[name]
    monkeypatch.setitem(LAYOUTS, name, lambda prompt: [tiles[:1] * 9 for tiles in known(prompt)])
    with pytest.raises(BadSample, match=rf"image tokens where {name} was expected to make"):
        prepare(sample(picture(SIZES[0])), 0, model, CONFIG)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_layouts_hold_at_full_size(name: str) -> None:
    """With the sizes of published models there are as many tokens as the layout, and docs/models.md, say."""
    processor, holder = FULL_SIZE[name]
    token = processor.tokenizer.convert_tokens_to_ids(holder)
    for size in ((640, 480), (300, 1200), (57, 60)):
        inputs = processor(text=f"a {holder} b", images=[Image.new("RGB", size)], return_tensors="pt")
        ids = inputs["input_ids"][0].numpy()
        places = place_patches(Prompt(processor, inputs, [size], find_runs(ids == token)), len(ids))
        assert np.array_equal(places.picture >= 0, ids == token)
        if size == (640, 480):
            text = " ".join((Path(__file__).parents[1] / "docs" / "models.md").read_text().split())
            assert f"{(ids == token).sum():,} for {name}" in text
