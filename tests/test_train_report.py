"""report.html: its numbers are those of the run, nothing in it comes from elsewhere, and it fits a phone."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import LAYERS, write_planted
from safetensors.torch import load_file
from test_train_loop import configure, lines

from clt.stopping import StopRequested
from clt.train.axis import near_axis
from clt.train.checkpoint import load_transcoder
from clt.train.config import TrainConfig
from clt.train.curves import Curves
from clt.train.evaluate import evaluate
from clt.train.loop import open_source, train
from clt.train.report_page import render_page
from clt.train.run_report import Place, RunReport
from clt.train.sweep import sweep
from clt.train.sweep_file import Entry
from clt.train.tables import number

NAME = "<script>alert(1)<script>&quot"
SECTIONS = ["held-out", "fvu", "latents", "decoders", "training", "settings"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A finished run with a name that would be a script."""
    folder = tmp_path_factory.mktemp("report")
    cache = write_planted(folder / "c", 1500, val=300)
    config = configure(cache, folder / NAME, steps=12, log_every=2)
    train(config)
    return config


class Page(HTMLParser):
    """What a test asks of the page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self._figure = self._tag = ""
        self.values: dict[str, list[float]] = {}
        """By figure: its data-value numbers, in order"""
        self.source = path.read_text()
        self.feed(self.source)
        self.data = json.loads(re.search(r'id="data">(.*?)</script>', self.source, re.S)[1])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        self._tag = tag
        if tag == "figure":
            self._figure = found["id"] or ""
        if "data-value" in found:
            self.values.setdefault(found.get("data-name") or self._figure, []).append(
                float(found["data-value"])
            )

    def handle_data(self, data: str) -> None:
        self.text[self._tag] = self.text.get(self._tag, "") + data


@pytest.fixture(scope="module")
def page(config: TrainConfig) -> Page:
    return Page(config.run / "report.html")


def test_curves_are_the_lines_of_metrics_jsonl(config: TrainConfig, page: Page) -> None:
    found = lines(config.run)
    charts = {
        "fvu-mean": "fvu",
        "loss": "loss",
        **{n: n for n in ("lr", "k", "grad_norm", "stall", "shuffle_m")},
    }
    for chart, name in {**charts, "tokens_per_s": "tokens_per_s"}.items():
        assert page.data["charts"][chart]["x"] == [2, 4, 6, 8, 10, 12]
        (line,) = page.data["charts"][chart]["lines"]
        assert line["y"] == pytest.approx([step[name] for step in found], rel=1e-3), name
    for line in page.data["charts"]["fvu-kind"]["lines"]:
        assert line["y"] == pytest.approx([step[f"fvu_kind/{line['name']}"] for step in found], rel=1e-3)
    for layer in range(LAYERS):
        assert page.values[f"layer {layer}"] == [pytest.approx(found[-1][f"fvu/{layer}"], rel=1e-5)]
    for name in ("l0", "dead"):
        (line,) = page.data["charts"][name]["lines"]
        means = [np.mean([step[f"{name}/{layer}"] for layer in range(LAYERS)]) for step in found]
        assert line["y"] == pytest.approx(means, rel=1e-3)
    for tile, name, size in (("Speed", "tokens_per_s", 1), ("Stall", "stall", 100)):
        assert page.values[tile] == [pytest.approx(size * np.mean([line[name] for line in found]), rel=1e-8)]
    assert page.values["Training FVU"] == [pytest.approx(found[-1]["fvu"], rel=1e-8)]


def test_held_out_numbers_are_the_evaluation(config: TrainConfig, page: Page) -> None:
    held = evaluate(load_transcoder(config.run), open_source(config, "val"))
    by_layer = np.array(page.values["held-out-layer"]).reshape(LAYERS, 2)
    np.testing.assert_allclose(by_layer[:, 0], held.fvu, rtol=1e-7)
    np.testing.assert_allclose(by_layer[:, 1], held.l0, rtol=1e-7)
    kinds = [float(values.mean()) for values in held.fvu_kind.values()]
    assert page.values["held-out-kind"] == pytest.approx(kinds, rel=1e-7)
    offsets = [float(held.fvu.mean()), *held.fvu_without_offset.values()]
    assert page.values["held-out-offset"] == pytest.approx(offsets, rel=1e-7)
    assert page.values["Held-out FVU"] == [pytest.approx(float(held.fvu.mean()), rel=1e-7)]


def test_decoder_norms_are_those_of_the_weights(config: TrainConfig, page: Page) -> None:
    model, found = load_transcoder(config.run), page.data["maps"]["decoder-norms"]["values"]
    for source in range(LAYERS):
        for target in range(LAYERS):
            if target < source:
                assert found[source][target] is None
            else:
                rows = model.W_dec[target][source].detach().numpy()
                expected = np.mean([np.sqrt((row**2).sum()) for row in rows])
                assert found[source][target] == pytest.approx(expected, rel=1e-3)


def test_the_histogram_counts_every_latent(config: TrainConfig, page: Page) -> None:
    """Bins of half decades, from the counts in the checkpoint; each latent is in one of them."""
    state = load_file(config.run / "step-00000012" / "trainer.safetensors")
    assert int(state["fired_tokens"].sum()) == 1200
    frequency = state["fired"].sum(dim=0).numpy() / 1200
    bars = page.values["frequency"]
    assert sum(bars) == LAYERS * 40
    assert bars[0] == (frequency == 0).sum()
    assert bars[-1] == (frequency >= 10**-0.5).sum()
    assert bars[-2] == ((frequency >= 0.1) & (frequency < 10**-0.5)).sum()
    by_layer = np.array(page.data["maps"]["frequency-layer"]["values"])
    assert by_layer.sum(axis=0).tolist() == bars
    assert by_layer.sum(axis=1).tolist() == [40] * LAYERS


def test_firing_counts_survive_a_resume(config: TrainConfig, tmp_path: Path) -> None:
    cut = configure(config.caches[0], tmp_path / "cut", steps=12, log_every=2, save_every=5)
    cut_short(cut, after=7)
    train(cut, resume=True)
    whole, other = (load_file(c.run / "step-00000012" / "trainer.safetensors") for c in (config, cut))
    assert whole.keys() == other.keys()
    assert all(torch.equal(whole[name], other[name]) for name in whole)


def cut_short(config: TrainConfig, after: int) -> None:
    """Train until a stop is asked for after `after` steps."""
    import clt.train.loop as loop

    one = loop.Loop.take_step

    def asking(self: Any) -> None:
        StopRequested.requested = self.step + 1 == after
        one(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "take_step", asking)
        patch.setattr(StopRequested, "requested", False)
        with pytest.raises(StopRequested):
            train(config)


def test_a_stopped_run_has_a_page_and_resuming_completes_it(config: TrainConfig, tmp_path: Path) -> None:
    cut = configure(config.caches[0], tmp_path / "cut", steps=6)
    cut_short(cut, after=4)
    text = (cut.run / "report.html").read_text()
    assert "stopped or saved at step 4: 4 of 6 steps" in text
    assert "Held-out numbers are measured when the run is complete." in text
    train(cut, resume=True)
    assert "complete: 6 of 6 steps" in (cut.run / "report.html").read_text()


def test_resuming_a_complete_run_makes_the_page_again(config: TrainConfig) -> None:
    path = config.run / "report.html"
    before = path.read_bytes()
    path.unlink()
    assert train(config, resume=True).fvu is None
    assert path.read_bytes() == before


def test_without_a_val_split_the_page_says_why(tmp_path: Path) -> None:
    config = configure(write_planted(tmp_path / "c", 300), tmp_path / "run", steps=2)
    train(config)
    page = Page(config.run / "report.html")
    assert "has no tokens in split val; harvest with a larger --val-fraction" in page.source
    assert "held-out-layer" not in page.values


def test_texts_are_escaped_and_nothing_is_fetched(config: TrainConfig, page: Page) -> None:
    assert page.text["h1"] == NAME
    assert "<script>alert" not in page.source
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert not re.search(r"https?://|@import|url\(", page.source)
    addresses = [v for _, found in page.tags for k, v in found.items() if k in ("src", "href") and v]
    assert all(address.startswith("#") or address == "data:," for address in addresses)
    ids = [found["id"] for _, found in page.tags if "id" in found]
    assert [i for i in ids if i in SECTIONS] == SECTIONS
    assert len(ids) == len(set(ids))
    labelled = [found for tag, found in page.tags if tag == "svg"]
    assert all(found.get("aria-label") or found.get("aria-hidden") for found in labelled)


def long_report(n_layers: int = 32, n_lines: int = 500) -> RunReport:
    rng = np.random.default_rng(0)
    curves = Curves()
    names = [f"{name}/{layer}" for name in ("fvu", "l0", "dead") for layer in range(n_layers)]
    names += ["fvu", "loss", "lr", "k", "grad_norm", "tokens_per_s", "stall", "shuffle_m", "fvu_kind/text"]
    for step in range(n_lines):
        curves.add(
            {"step": 1000 * (step + 1), **dict(zip(names, rng.random(len(names)).tolist(), strict=True))}
        )
    return RunReport(
        name="long",
        place=Place(1000 * n_lines, 1000 * n_lines, 10**10),
        layers=tuple(range(n_layers)),
        curves=curves,
        decoder_norms=rng.random((n_layers, n_layers)),
        frequency=rng.random((n_layers, 64)) ** 8,
        counted_tokens=10**7,
        held_out="none",
        settings={},
        cache={},
    )


def test_the_page_of_a_long_run_stays_small() -> None:
    """500 points a line are the most that there can be."""
    report = long_report()
    assert report.curves.n_points == 500
    assert len(render_page(report)) < 1_500_000


def test_a_run_without_numbers_has_a_page() -> None:
    """Nothing logged, no decoder that is not zero, no latent counted, one layer."""
    empty = long_report(1, 0)._replace(decoder_norms=np.zeros((1, 1)), frequency=np.zeros((1, 4)))
    assert "No numbers yet." in render_page(empty)


SMALLEST_TEXT = """() => Math.min(...[...document.querySelectorAll("body *")]
    .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())
                 && e.getClientRects().length)
    .map(e => parseFloat(getComputedStyle(e).fontSize)))"""


def look_at(browser: Any, path: Path, width: int, scheme: str) -> tuple[Any, list[str]]:
    """The page with all unfolded, and what it said or asked for; holds what all pages keep to."""
    context = browser.new_context(viewport={"width": width, "height": 812}, color_scheme=scheme)
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda fault: said.append(str(fault)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    address = path.as_uri()
    page.on("request", lambda request: said.append(request.url) if request.url != address else None)
    page.goto(address)
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("document.documentElement.clientWidth") == width
    assert page.evaluate(SMALLEST_TEXT) >= 14
    return page, said


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_in_a_browser(config: TrainConfig, browser: Any, width: int, scheme: str) -> None:
    """No message, no request, nothing wider than the screen, text large enough, keys move the cursor."""
    page, said = look_at(browser, config.run / "report.html", width, scheme)
    assert [page.locator(f"section#{name} h2").is_visible() for name in SECTIONS] == [True] * 6
    chart = page.locator('[data-plot="fvu-mean"]')
    assert chart.bounding_box()["width"] > 0.5 * min(width, 500) * 0.5
    chart.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert page.locator("#fvu-mean output").inner_text().startswith("step 4: FVU ")
    assert chart.get_attribute("aria-valuetext").startswith("step 4: FVU ")
    page.locator('[data-map="decoder-norms"]').focus()
    page.keyboard.press("Home")
    assert page.locator("#decoder-norms output").inner_text().startswith("source 0, target 0: ")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 21, 27)"
    assert dark == (scheme == "dark")
    assert said == []
    page.context.close()


@pytest.fixture(scope="module")
def sweep_page(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of six runs with scripts for names, which no sweep's file could give them."""
    folder = tmp_path_factory.mktemp("sweep") / NAME
    configs = [replace(config, run=folder / f"{n}{NAME}", steps=2, lr=0.001 * n) for n in range(1, 7)]
    sweep(folder, [Entry(each.run.name, {"lr": each.lr}) for each in configs], configs, resume=False)
    return folder / "report.html"


@pytest.mark.parametrize(("width", "scheme"), [(375, "dark"), (1280, "light")])
def test_a_sweeps_page_in_a_browser(sweep_page: Path, browser: Any, width: int, scheme: str) -> None:
    """A dot for each run inside the plot, and a link from each row to the run's own page."""
    page, said = look_at(browser, sweep_page, width, scheme)
    plot = page.locator("#l0-fvu .plot").bounding_box()
    dots = [dot.bounding_box() for dot in page.locator("#l0-fvu .dot").all()]
    assert len(dots) == 6
    for dot in dots:
        assert plot["x"] - 1 <= dot["x"] + dot["width"] / 2 <= plot["x"] + plot["width"] + 1
        assert plot["y"] - 1 <= dot["y"] + dot["height"] / 2 <= plot["y"] + plot["height"] + 1
    assert page.locator("#fvu-runs li").count() == 6
    assert said == []
    links = [link.get_attribute("href") for link in page.locator("#sweep-runs a").all()]
    assert len(links) == 6
    assert all((sweep_page.parent / link).exists() for link in links)
    page.context.close()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (20301.0, "20,301"),
        (32.0, "32"),
        (0.0, "0"),
        (0.123456, "0.1235"),
        (2e-5, "2e-05"),
        (1.5e6 + 0.5, "1.5e+06"),
    ],
)
def test_numbers_of_tables(value: float, text: str) -> None:
    """Counts of latents are read in full."""
    assert number(value) == text


@pytest.mark.parametrize(
    ("values", "first", "last", "log"),
    [
        ([0.49, 0.6], 0.45, 0.6, False),
        ([32.0, 32.0], 30.0, 40.0, False),
        ([0.0, 3.0], 0.0, 3.0, False),
        ([8.0, 400.0], 8 / 1.05, 400 * 1.05, True),
    ],
)
def test_a_near_axis_begins_at_its_values(values: list[float], first: float, last: float, log: bool) -> None:
    found = near_axis(np.array(values))
    assert (found.first, found.last, found.log) == (pytest.approx(first), pytest.approx(last), log)
    assert all(found.first <= tick <= found.last for tick in found.ticks)
    assert len(found.ticks) >= 2
