"""Which of the demo's 8 colours and 4 shapes have a latent that detects them, after `make demo`.

    python benchmarks/bench_latents.py [--figure docs/latents.svg]

A latent is chosen on the run's own training tokens and scored on pictures that neither the demo model's eyes
nor the run ever saw, which are harvested here. The score is the area under the ROC curve over all patches of
all pictures. What is true of a patch is drawn, not judged: its colour is that of the shape where the shape
covers more than half of it, else the background's; it shows a shape where that covers more than half.
Beside it: the same latent on text, for the tokens that are the word itself against all other text tokens.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "demo"))  # the demo's modules are scripts beside each other, not a package

import shapes  # noqa: E402
from auc import auc  # noqa: E402
from data import write_unseen  # noqa: E402
from draw_latents import Shown, draw  # noqa: E402

from clt.analysis.directions import load_encoder  # noqa: E402
from clt.cache_format import Cache, open_cache  # noqa: E402
from clt.cache_format.layout import KINDS  # noqa: E402
from clt.harvest.provenance import SourceData  # noqa: E402
from clt.train.checkpoint import checkpoint_folder, load_shape  # noqa: E402
from clt.train.sparse import Codes  # noqa: E402

OUT = ROOT / "demo" / "out"
PATCH = 8
WORDS = (*shapes.COLOURS, *shapes.SHAPES)
ENOUGH = 0.95
Doubles = npt.NDArray[np.float64]


class Tokens(NamedTuple):
    """Picture and text tokens of a cache's split train, and what is true of them."""

    cache: Cache
    place: npt.NDArray[np.int64]
    """in the order on disk"""
    image: npt.NDArray[np.bool_]
    truth: npt.NDArray[np.bool_]
    """(token, word): a patch shows it, a text token says it"""
    strings: list[str]
    """of text tokens, by place; empty for patches"""
    picture: npt.NDArray[np.int64]
    """number of the picture of the token's sample, -1 without one"""
    patch: npt.NDArray[np.int64]
    """(token, 2) row and column"""


class Found(NamedTuple):
    """A latent for a word, by its score on training tokens, and its scores on held-out ones."""

    word: str
    layer: int
    latent: int
    patches: float
    text: float


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--run", type=Path, default=OUT / "run")
    options.add_argument(
        "--cache", type=Path, default=OUT / "shapes.cache", help="that the run was trained on"
    )
    options.add_argument("--pictures", type=int, default=300, help="held-out ones")
    options.add_argument("--figure", type=Path, help="SVG of three of the latents")
    asked = options.parse_args()
    trained = tokens_of(open_cache(asked.cache))
    unseen = tokens_of(open_cache(harvest_unseen(asked.pictures)))
    shape = load_shape(checkpoint_folder(asked.run))
    scores = [auc_by_layer(asked.run, place, trained, unseen) for place in range(shape.n_layers)]
    chosen_on, held = (
        np.stack(part) for part in zip(*scores, strict=True)
    )  # (layer, patches or text, latent, word)
    by_patches = pick(chosen_on[:, 0], held, shape.layers)
    by_both = pick(chosen_on.min(axis=1), held, shape.layers)
    print(table(by_patches, by_both, unseen))
    if asked.figure:
        best = sorted(by_both, key=lambda found: -min(found.patches, found.text))
        colours, forms = ([f for f in best if f.word in some] for some in (shapes.COLOURS, shapes.SHAPES))
        three = [colours[0], forms[0], *sorted(colours[1:] + forms[1:], key=best.index)][:3]
        asked.figure.write_text(draw([shown(asked.run, shape.layers, found, unseen) for found in three]))
        print(f"{asked.figure}: {', '.join(f'{f.layer}:{f.latent} ({f.word})' for f in three)}")


def harvest_unseen(n_pictures: int) -> Path:
    """A cache of pictures with their captions; made by `clt harvest`, gone on with where it was cut off."""
    dataset = write_unseen(OUT / "unseen", shapes.UNSEEN[5000 : 5000 + n_pictures])
    cache = OUT / f"unseen-{n_pictures}.cache"
    if cache.exists() and open_cache(cache).complete:
        return cache
    arguments = ["harvest", OUT / "model", dataset, cache, "--val-fraction", 0, "--window", 4096]
    arguments += ["--batch-tokens", 2048, "--dtype", "float32"]
    subprocess.run([sys.executable, "-m", "clt.cli", *map(str, arguments)], check=True, stdout=sys.stderr)
    return cache


def tokens_of(cache: Cache) -> Tokens:
    columns = cache["train"].tokens()
    image, text = (columns["kind"] == KINDS.index(kind) for kind in ("image", "text"))
    place = np.flatnonzero(image | text)
    image, ids = image[place], columns["token_id"][place]
    data = SourceData(cache.manifest.source)
    known = {i: (data.token_string(i) or "").strip().lower() for i in np.unique(ids[~image]).tolist()}
    strings = ["" if is_image else known[i] for i, is_image in zip(ids.tolist(), image.tolist(), strict=True)]
    names = {number: line["id"] for number, line in cache.samples().items()}
    number_of = {s: int(name.split("-")[1]) if name.startswith("shape-") else -1 for s, name in names.items()}
    picture = np.array([number_of[s] for s in columns["sample"][place].tolist()])
    patch = np.stack([columns["row"][place], columns["col"][place]], axis=1).astype(np.int64)
    truth = np.stack([[s == word for s in strings] for word in WORDS], axis=1)
    for number in np.unique(picture[image]).tolist():
        mine = np.flatnonzero(image & (picture == number))
        truth[mine] = true_of_patches(number)[patch[mine, 0], patch[mine, 1]]
    return Tokens(cache, place, image, truth, strings, picture, patch)


def true_of_patches(number: int) -> npt.NDArray[np.bool_]:
    """(row, column, word) of one picture."""
    what, covered = shapes.scene(number), shapes.coverage(number, PATCH) > 0.5
    truth = np.zeros((*covered.shape, len(WORDS)), bool)
    truth[..., WORDS.index(what.colour)] = covered
    truth[..., WORDS.index(what.background)] = ~covered
    truth[..., WORDS.index(what.shape)] = covered
    return truth


@torch.no_grad()
def codes_of(run: Path, place: int, layer: int, tokens: Tokens) -> Codes:
    """Of one layer."""
    model = load_encoder(checkpoint_folder(run), place)
    x = torch.from_numpy(tokens.cache["train"].read("mlp_in", layers=[layer])[tokens.place, 0])
    return model.encode_layer(model.inputs.apply_to(x.to(model.inputs.mean.dtype), 0), 0)


def auc_by_layer(run: Path, place: int, *parts: Tokens) -> list[Doubles]:
    """For each part (patches or text, latent, word)."""
    layer = load_shape(checkpoint_folder(run)).layers[place]
    found = []
    for tokens in parts:
        codes = codes_of(run, place, layer, tokens)
        found.append(np.stack([auc(codes, kind, tokens.truth) for kind in (tokens.image, ~tokens.image)]))
    return found


def pick(chosen_on: Doubles, held: Doubles, layers: tuple[int, ...]) -> list[Found]:
    """For each word the latent that is best by chosen_on (layer, latent, word)."""
    best = []
    for number, word in enumerate(WORDS):
        score = np.nan_to_num(chosen_on[..., number], nan=-1)
        place, latent = np.unravel_index(score.argmax(), score.shape)
        patches, text = held[place, :, latent, number].tolist()
        best.append(Found(word, layers[place], int(latent), patches, text))
    return best


def table(by_patches: list[Found], by_both: list[Found], unseen: Tokens) -> str:
    """As Markdown."""
    lines = [
        "| | latent for patches | AUC, held-out patches | latent for both | patches | the word in text |",
        "|---|---|---|---|---|---|",
    ]
    for one, two in zip(by_patches, by_both, strict=True):
        cells = [one.word, f"{one.layer}:{one.latent}", f"{one.patches:.3f}", f"{two.layer}:{two.latent}"]
        lines.append("| " + " | ".join([*cells, f"{two.patches:.3f}", f"{two.text:.3f}"]) + " |")
    counts = []
    for words, name in ((shapes.COLOURS, "colours"), (shapes.SHAPES, "shapes")):
        alone = sum(f.patches > ENOUGH for f in by_patches if f.word in words)
        both = sum(min(f.patches, f.text) > ENOUGH for f in by_both if f.word in words)
        counts.append(
            f"{alone} of {len(words)} {name} on patches, {both} on patches and in text by one latent"
        )
    n = f"{len(np.unique(unseen.picture))} held-out pictures of {int(unseen.image.sum())} patches"
    return "\n".join([*lines, "", f"AUC over {ENOUGH} on {n}: {'; '.join(counts)}."])


def shown(run: Path, layers: tuple[int, ...], found: Found, unseen: Tokens) -> Shown:
    """The latent's strongest held-out pictures, and where in text it is strongest."""
    values = codes_of(run, layers.index(found.layer), found.layer, unseen).dense()[:, found.latent].numpy()
    on_patch = np.where(unseen.image, values, 0)
    pictures: list[int] = []
    for token in on_patch.argsort()[::-1].tolist():
        if unseen.picture[token] not in pictures and on_patch[token] > 0:
            pictures.append(int(unseen.picture[token]))
        if len(pictures) == 4:
            break
    maps = []
    for number in pictures:
        mine = np.flatnonzero(unseen.image & (unseen.picture == number))
        heat = np.zeros((shapes.SIDE // PATCH,) * 2)
        heat[unseen.patch[mine, 0], unseen.patch[mine, 1]] = values[mine]
        maps.append((shapes.draw(number), heat))
    captions = [caption_heat(number, values, unseen) for number in pictures]
    title = f"layer {found.layer}, latent {found.latent}"
    scores = f"{found.word}: AUC {found.patches:.3f} on patches, {found.text:.3f} in text"
    return Shown(title, scores, maps, captions, float(values.max()))


def caption_heat(number: int, values: npt.NDArray[np.float32], unseen: Tokens) -> list[tuple[str, float]]:
    """Words of the picture's caption with the activation on each."""
    mine = np.flatnonzero(~unseen.image & (unseen.picture == number))
    columns = unseen.cache["train"].tokens()
    order = mine[np.argsort(columns["position"][unseen.place[mine]])]
    words = shapes.caption(number).rstrip(".").lower().split()
    strings = [unseen.strings[token] for token in order.tolist()]
    at = next(i for i in range(len(strings)) if strings[i : i + len(words)] == words)
    return [(word, float(values[order[at + i]])) for i, word in enumerate(words)]


if __name__ == "__main__":
    main()
