"""`clt features`: its pages hold what dense arithmetic gives, survive a kill, and work from disk."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
import torch
from large_pages import write_large
from PIL import Image
from safetensors.torch import load_file

from clt.analysis import feature_pages
from clt.analysis.examples import random_scores
from clt.analysis.features import write_features
from clt.analysis.features_config import FeaturesConfig
from clt.analysis.features_folder import DONE
from clt.analysis.latents import Sizes
from clt.cache_format import open_cache
from clt.cache_format.layout import KINDS
from clt.cache_format.provenance import patch_rectangle
from clt.export.folding import FoldedTranscoder
from clt.harvest.config import HarvestConfig
from clt.harvest.run import harvest
from clt.train.checkpoint import load_transcoder
from clt.train.config import TrainConfig, TranscoderConfig
from clt.train.loop import open_source, train
from clt.train.run_folder import load_config
from clt.train.transcoder import CrossLayerTranscoder

LATENTS, TOP, QUANTILES = 40, 4, 5


class Made(NamedTuple):
    """A harvested cache, a run of two layers, and its pages."""

    folder: Path
    config: FeaturesConfig
    dense: np.ndarray
    """(token, layer, latent), of the tokens that count, in the order on disk"""
    columns: dict[str, np.ndarray]
    """of the same tokens"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("features")
    tiny.save_llava(folder / "model")
    dataset = tiny.write_dataset(folder / "data", 8, 8)
    harvest(
        HarvestConfig(
            model=str(folder / "model"), dataset=str(dataset), cache=folder / "c", window=64, val_fraction=0.0
        )
    )
    structure = TranscoderConfig(k=5, latents=LATENTS, n_targets=2)
    train(
        TrainConfig(
            caches=(folder / "c",),
            run=folder / "run",
            transcoder=structure,
            layers="0,2",
            exclude=("bos", "sink"),
            batch_tokens=64,
            buffer_tokens=128,
            steps=2,
        )
    )
    config = FeaturesConfig(
        run=folder / "run",
        out=folder / "pages",
        model=str(folder / "model"),
        sizes=Sizes(TOP, 12),
        quantiles=QUANTILES,
        batch_tokens=64,
        threads=2,
    )
    write_features(config)
    split = open_cache(folder / "c")["train"]
    chosen = open_source(load_config(folder / "run"), "train").chosen
    x = torch.from_numpy(split.read("mlp_in", layers=[0, 2])[chosen])
    dense = load_transcoder(folder / "run").encode(x).detach().numpy()
    return Made(folder, config, dense, {name: column[chosen] for name, column in split.tokens().items()})


def data(folder: Path, name: str) -> Any:
    """What a data file gives to the page."""
    text = (folder / "data" / f"{name}.js").read_text()
    head = f"clt.add({json.dumps(name)},"
    assert text.startswith(head)
    assert text.endswith(");\n")
    return json.loads(text[len(head) : -3])


def samples(folder: Path) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for number in range(len(data(folder, "run")["sample_blocks"])):
        block = data(folder, f"samples-{number}")
        found |= {int(n): {**s, "grids": block["grids"]} for n, s in block["samples"].items()}
    return found


def latents(made: Made) -> Iterator[tuple[int, int, Any]]:
    """(place of the layer, latent, what its page holds)"""
    run = data(made.config.out, "run")
    assert run["layers"] == [0, 2]
    for place, layer in enumerate(run["layers"]):
        for latent in range(LATENTS):
            block = data(made.config.out, f"latents-{layer}-{latent // run['latent_block']}")
            yield place, latent, block[latent % run["latent_block"]]


def test_lists_count_what_is_active(made: Made) -> None:
    for place, layer in enumerate((0, 2)):
        found = data(made.config.out, f"list-{layer}")
        dense = made.dense[:, place]
        for number in range(len(KINDS)):
            expected = (dense[made.columns["kind"] == number] > 0).sum(axis=0)
            assert found["kinds"][number] == expected.tolist()
        np.testing.assert_allclose(found["max"], dense.max(axis=0), rtol=1e-3)
        for latent in range(LATENTS):
            strongest = dense[:, latent].argmax()
            on_patch = made.columns["kind"][strongest] == KINDS.index("image")
            assert found["pictures"][latent] >= on_patch
            said = (dense[:, latent] > 0) & (made.columns["kind"] != KINDS.index("image"))
            assert not found["label"][latent] or said.any()
            assert on_patch or found["label"][latent]
    run = data(made.config.out, "run")
    assert list(run["tokens"].values()) == np.bincount(made.columns["kind"], minlength=4).tolist()


def test_examples_are_the_largest_and_show_every_token_of_their_sample(made: Made) -> None:
    """Activations, places and order against the dense ones; quantiles are what their ranks say."""
    columns, sample_of = made.columns, made.columns["sample"]
    stored = open_cache(made.folder / "c")["train"].tokens()
    shown, quantiles_seen = samples(made.config.out), 0
    for place, latent, found in latents(made):
        dense = made.dense[:, place, latent]
        by_sample = {s: dense[sample_of == s].max() for s in np.unique(sample_of)}
        best = sorted((v for v in by_sample.values() if v > 0), reverse=True)[:TOP]
        top = [e for e in found["examples"] if e[2] < 0]
        np.testing.assert_allclose([dict(zip(e[3], e[4], strict=True))[e[1]] for e in top], best, rtol=1e-3)
        numbers = [e[0] for e in found["examples"]]
        assert len(set(numbers)) == len(numbers), "each sample once"
        for sample, peak, quantile, places, values in found["examples"]:
            order = np.sort(stored["position"][stored["sample"] == sample])  # every stored token has a place
            expected = {
                int(np.searchsorted(order, p)): v
                for p, v in zip(
                    columns["position"][sample_of == sample], dense[sample_of == sample], strict=True
                )
                if v > 0
            }
            assert places == sorted(expected)
            np.testing.assert_allclose(values, [expected[p] for p in places], rtol=1e-3)
            assert peak in expected
            assert len(shown[sample]["k"]) == len(order)
            quantiles_seen += quantile >= 0
        rising = [e[2] for e in found["examples"] if e[2] >= 0]
        assert rising == sorted(rising, reverse=True)
    assert quantiles_seen > 50


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_texts_and_pictures_are_those_of_the_dataset(made: Made) -> None:
    rows = {
        row["id"]: row
        for row in map(json.loads, (made.folder / "data" / "train.jsonl").read_text().splitlines())
    }
    cache = open_cache(made.folder / "c")
    lines, tokens = cache.samples(), cache["train"].tokens()
    pictures = 0
    for number, sample in samples(made.config.out).items():
        row = rows[sample["id"]]
        assert row["conversations"][-1]["value"] in "".join(sample["t"])
        mine = tokens["sample"] == number
        order = np.argsort(tokens["position"][mine])
        assert sample["k"] == "".join(map(str, tokens["kind"][mine][order]))
        assert ("images" in sample) == ("image" in row)
        for image in sample.get("images", []):
            pictures += 1
            line = lines[number]["images"][0]
            paths = made.config.out / image["src"], made.folder / "data" / row["image"]
            np.testing.assert_array_equal(*map(pixels, paths))
            rectangles = sample["grids"][image["grid"]]
            for place, rectangle in zip(image["tokens"], rectangles, strict=True):
                at = (int(tokens[name][mine][order][place]) for name in ("position", "row", "col"))
                expected = patch_rectangle(line, *at)
                np.testing.assert_allclose(rectangle, 100 * np.array(expected) / tiny.SIDE, atol=0.01)
    assert pictures == 8
    assert len(list((made.config.out / "pictures").iterdir())) == 8


def test_weights_say_targets_likeness_and_tokens(made: Made) -> None:
    folded, model = FoldedTranscoder(made.folder / "run"), load_transcoder(made.folder / "run")
    weights = load_file(made.folder / "model" / "model.safetensors")
    head = next(w for name, w in weights.items() if name.endswith("lm_head.weight"))
    gain = next(
        w for name, w in weights.items() if name.endswith(("language_model.norm.weight", "model.norm.weight"))
    )
    for place, latent, found in latents(made):
        targets = model.shape.targets(place)
        rows = [folded.decoder(place, t)[latent] for t in targets]
        scales = [float(model.outputs.scale[t]) for t in targets]
        expected = [float(row.norm()) / s / tiny.WIDTH**0.5 for row, s in zip(rows, scales, strict=True)]
        np.testing.assert_allclose(found["targets"], expected, rtol=2e-3)
        encoder = torch.nn.functional.normalize(model.W_enc[place].detach(), dim=1)
        cosines = encoder @ encoder[latent]
        cosines[latent] = -2
        np.testing.assert_allclose([s[1] for s in found["similar"]], cosines.topk(8).values, atol=1e-3)
        for other, reads, writes in found["similar"]:
            assert reads == pytest.approx(float(cosines[other]), abs=1e-3)
            assert writes == pytest.approx(decoder_cosine(model, place, latent, other), abs=1e-3)
        logits = head @ (sum(rows) * gain)
        np.testing.assert_allclose(
            [t[1] for t in found["promoted"]], logits.topk(8).values, rtol=2e-3, atol=1e-6
        )
        np.testing.assert_allclose(
            [t[1] for t in found["suppressed"]], -(-logits).topk(8).values, rtol=2e-3, atol=1e-6
        )


def decoder_cosine(model: CrossLayerTranscoder, place: int, one: int, other: int) -> float:
    """Of what two latents write to all targets in standard units, end to end."""
    both = [
        torch.cat([model.decoder(place, target)[latent].detach() for target in model.shape.targets(place)])
        for latent in (one, other)
    ]
    return float(torch.nn.functional.cosine_similarity(*both, dim=0))


def test_quantile_examples_stand_at_their_ranks(made: Made) -> None:
    """Against sorting: a latent's tokens of largest hashes, of different samples, by activation."""
    chosen = np.flatnonzero(open_source(load_config(made.folder / "run"), "train").chosen)
    sample_of = made.columns["sample"]
    for place, latent, found in latents(made):
        dense, seen = made.dense[:, place, latent], {}
        active = np.flatnonzero(dense > 0)
        scores = random_scores(torch.full((len(active),), latent), torch.from_numpy(chosen[active])).numpy()
        for token in active[np.argsort(-scores)].tolist():  # the first of each sample stays
            seen.setdefault(int(sample_of[token]), token)
        drawn = sorted(list(seen.values())[: made.config.sizes.random], key=lambda token: dense[token])
        n = len(drawn)
        ranks = sorted({round(q * (n - 1)) for q in np.linspace(0, 1, QUANTILES)}, reverse=True) if n else []
        top = {e[0] for e in found["examples"] if e[2] < 0}
        expected = [
            (int(sample_of[drawn[rank]]), round(rank / max(1, n - 1), 3), dense[drawn[rank]])
            for rank in ranks
            if int(sample_of[drawn[rank]]) not in top
        ]
        shown = [e for e in found["examples"] if e[2] >= 0]
        assert [(e[0], e[2]) for e in shown] == [e[:2] for e in expected]
        peaks = [dict(zip(e[3], e[4], strict=True))[e[1]] for e in shown]
        np.testing.assert_allclose(peaks, [e[2] for e in expected], rtol=1e-3)


def test_examples_looked_up_in_portions_are_the_same(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_pages, "LOOKED_UP", 1)
    assert len(list(feature_pages.together(np.ones((LATENTS, 4), int), 99))) == 2
    write_features(replace(made.config, out=made.folder / "portions"))
    assert files(made.folder / "portions") == files(made.config.out)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != DONE  # it holds speeds
    }


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from clt.analysis import features
from clt.analysis.features_config import FeaturesConfig
from clt.analysis.latents import LatentStatistics, Sizes

root, add, calls = Path(sys.argv[1]), LatentStatistics.add, [0]
config = FeaturesConfig(run=root / "run", out=root / "killed", model=str(root / "model"),
    sizes=Sizes(4, 12), quantiles=5, batch_tokens=64, threads=2, save_seconds=0.0)

def dying(at):
    def watched(self, *arguments):
        calls[0] += 1
        if calls[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, *arguments)
    return watched

for at in map(int, sys.argv[2:]):
    child = os.fork()  # before torch has threads; it is imported once
    if child == 0:
        torch.set_num_threads(1)
        LatentStatistics.add = dying(at)
        features.write_features(config)
        os._exit(0 if calls[0] < at else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), (root / "killed" / ".work").exists())
"""


def test_a_killed_pass_goes_on_and_gives_the_same_pages(made: Made) -> None:
    """Killed in the first layer, then in the second: no batch was encoded twice before them."""
    groups = -(-len(open_cache(made.folder / "c")["train"]) // 64)
    moments = (3, groups, 1000)  # the second one has two batches behind it
    command = [sys.executable, "-c", KILLED, str(made.folder), *map(str, moments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["-9 True", "-9 True", "0 False"], done.stderr
    assert files(made.folder / "killed") == files(made.config.out)


def features(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clt.cli", "features", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_says_what_it_did_and_what_it_could_not_show(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    moved = made.folder.rename(made.folder.with_name("elsewhere"))  # dataset and model are no longer there
    try:
        done = features(moved / "run", "--cache", moved / "c", "--out", out, "--top", 3)
    finally:
        moved.rename(made.folder)
    assert done.returncode == 0, done.stderr
    assert "tokens/s through 2 layers" in done.stdout
    assert "of the time waiting for the reader" in done.stdout
    assert "no tokenizer.json of" in done.stdout
    assert "is not on this machine; --dataset says where it lies now" in done.stdout
    assert "promoted and suppressed tokens are not computed: no --model" in done.stdout
    shown = samples(out)
    assert all(text.startswith("#") for sample in shown.values() for text in sample["t"])
    why = {image["why"] for sample in shown.values() for image in sample.get("images", [])}
    assert why == {"the dataset is not on this machine"}


def test_a_folder_of_something_else_is_refused(made: Made, tmp_path: Path) -> None:
    config, before = made.config, files(made.config.out)
    report = write_features(config)
    assert report.tokens_per_s == json.loads((config.out / DONE).read_text())["report"]["tokens_per_s"]
    with pytest.raises(ValueError, match=r"holds other pages \(another examples\); remove it, or choose"):
        write_features(replace(config, quantiles=3))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="exists and is no folder of pages; choose another --out"):
        write_features(replace(config, out=tmp_path))
    with pytest.raises(ValueError, match="--top: expected at least 1, found 0"):
        replace(config, sizes=Sizes(top=0))
    with pytest.raises(ValueError, match="expected a folder, or a hub id that is on this machine"):
        write_features(replace(config, out=tmp_path / "x", model="nowhere/none"))
    assert files(config.out) == before


class Opened(NamedTuple):
    page: Any
    said: list[str]
    """Messages, errors, and requests for anything that is not in the folder"""
    asked: list[str]
    """Names of the files that were loaded"""


def open_pages(browser: Any, folder: Path, width: int, scheme: str = "light") -> Opened:
    page = browser.new_context(viewport={"width": width, "height": 812}, color_scheme=scheme).new_page()
    opened = Opened(page, [], [])
    page.on("console", lambda message: opened.said.append(message.text))
    page.on("pageerror", lambda fault: opened.said.append(str(fault)))

    def request(asked: Any) -> None:
        if not asked.url.startswith((folder.as_uri() + "/", "data:,")):
            opened.said.append(asked.url)
        opened.asked.append(asked.url.rsplit("/", 1)[-1])

    page.on("request", request)
    page.goto((folder / "index.html").as_uri())
    page.wait_for_selector("#rows a")
    return opened


def ids(page: Any) -> list[str]:
    return [text.replace("\n", "") for text in page.locator("#rows a .c-id").all_inner_texts()]


@pytest.mark.parametrize(("width", "scheme"), [(375, "light"), (1280, "dark")])
def test_in_a_browser(made: Made, browser: Any, width: int, scheme: str) -> None:
    """Loads, searches, sorts and opens a latent by keys; the heat map's patches lie where they were cut."""
    page, said, _ = open_pages(browser, made.config.out, width, scheme)
    page.wait_for_function(f"document.querySelector('#count').textContent === '{2 * LATENTS} latents'")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    bars, rows = page.locator("#rows a .share i"), page.locator("#rows a")
    assert bars.count() >= rows.count() > 10, "every row tells its kinds, of whichever layer it is"
    page.click('[data-sort="frequency"]')  # it was falling
    page.click('[data-sort="frequency"]')
    frequency = (made.dense > 0).sum(axis=0)
    place, latent = np.unravel_index(frequency.argmax(), frequency.shape)
    assert frequency[tuple(map(int, ids(page)[0].replace("2:", "1:").split(":")))] == frequency[place, latent]
    page.keyboard.press("/")
    page.keyboard.type("2:1")
    page.wait_for_function("document.querySelector('#count').textContent === '11 latents'")
    assert set(ids(page)) == {"2:1", *(f"2:{n}" for n in range(10, 20))}
    words = {w for list_ in data(made.config.out, "list-0")["label"] for w in list_ if len(w) > 3}
    page.fill("#search", max(words).upper())
    page.wait_for_function("!/^11 /.test(document.querySelector('#count').textContent)")
    assert page.locator("#rows a").count() >= 1
    page.fill("#search", "")
    shown = samples(made.config.out)
    place, latent, found = next(
        one for one in latents(made) if one[2]["examples"] and "images" in shown[one[2]["examples"][0][0]]
    )
    page.fill("#search", f"{(0, 2)[place]}:{latent}")
    page.keyboard.press("Enter")
    page.wait_for_selector(".card .heat i")
    assert page.locator(".bar h1").inner_text() == f"{(0, 2)[place]}:{latent}"
    check_heat(page, shown, found)
    assert page.locator(".card").count() == len(found["examples"])
    first = page.locator(".card").first
    if first.locator(".more").count():
        first.locator(".more").click()
    assert first.locator(".on, .heat i").count() == len(found["examples"][0][3])
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.keyboard.press("Escape")
    page.wait_for_selector("#list-view:not([hidden])")
    assert said == []
    page.context.close()


def check_heat(page: Any, shown: dict[int, Any], found: Any) -> None:
    """Each patch of the first example covers, on the screen, the share of the picture that it saw."""
    sample = shown[found["examples"][0][0]]
    image = sample["images"][0]
    heat = page.locator(".card").first.locator(".heat").first
    frame = heat.bounding_box()
    active = [p for p in found["examples"][0][3] if p in image["tokens"]]
    assert heat.locator("i").count() == len(active)
    for patch, place in zip(heat.locator("i").all(), active, strict=True):
        box = patch.bounding_box()
        left, top, right, bottom = sample["grids"][image["grid"]][image["tokens"].index(place)]
        expected = [
            left * frame["width"],
            top * frame["height"],
            (right - left) * frame["width"],
            (bottom - top) * frame["height"],
        ]
        seen = [box["x"] - frame["x"], box["y"] - frame["y"], box["width"], box["height"]]
        np.testing.assert_allclose(seen, np.array(expected) / 100, atol=1.5)


def test_a_large_run_stays_quick(tmp_path: Path, browser: Any) -> None:
    """262,144 latents: a screen of rows at a time; only lists are loaded until a latent is asked for.

    benchmarks/bench_pages.py says how long each of these takes.
    """
    layer, latent, sample_files = write_large(tmp_path / "large")
    page, said, asked = open_pages(browser, tmp_path / "large", 1280)
    assert page.locator("#rows a").count() < 60
    page.wait_for_function("document.querySelector('#count').textContent === '262,144 latents'")
    assert sum(name.startswith("list-") for name in asked) == 32
    assert not [name for name in asked if name.startswith(("latents-", "samples-"))]
    page.click('[data-sort="max"]')
    assert ids(page)[0] == f"{layer}:{latent}"
    page.evaluate("scrollTo(0, document.body.scrollHeight / 2)")
    page.wait_for_function(
        "document.querySelectorAll('#rows a').length && document.querySelectorAll('#rows a').length < 60"
    )
    page.evaluate("scrollTo(0, 0)")
    page.fill("#search", "word996")
    page.wait_for_function("document.querySelector('#count').textContent === '256 latents'")
    page.fill("#search", f"{layer}:{latent}")
    page.keyboard.press("Enter")
    page.wait_for_selector(".card .heat i")
    assert [name for name in asked if name.startswith("latents-")] == [f"latents-{layer}-{latent // 32}.js"]
    assert {name for name in asked if name.startswith("samples-")} <= sample_files
    assert said == []
    page.context.close()
