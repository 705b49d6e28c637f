"""Each family end to end on a tiny random model of its architecture: what is hooked, what is stored."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_families
import torch
from PIL import Image
from tiny_families import LAYERS, TEXT, VISION
from torch import Tensor, nn

from clt.cache_format import open_cache
from clt.cache_format.provenance import patch_rectangle, trace_token
from clt.harvest.batches import collate
from clt.harvest.config import HarvestConfig
from clt.harvest.feed import Feed
from clt.harvest.mlps import Hookpoints, find_hookpoints, path_pattern
from clt.harvest.model import LoadedModel, load_model
from clt.harvest.provenance import SourceOfToken, render_token
from clt.harvest.rows import open_rows
from clt.harvest.run import harvest
from clt.harvest.taps import MlpTaps
from clt.harvest.tokens import PreparedSample

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:transformers")

REFUSED = ("bloom", "opt")
"""Language models whose MLPs cannot be stood in for; see their own tests."""
BESIDE = {"gpt_neox": "layers.{}.post_attention_layernorm", "phi": "layers.{}.input_layernorm"}
"""Norms in front of MLPs that run beside the attention."""
WITHOUT_NORM = ("olmo2",)
"""Families whose MLPs read the residual stream itself."""
FAMILIES = [*VISION, *(family for family in TEXT if family not in REFUSED)]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's model, saved when it is first asked for."""
    root = tmp_path_factory.mktemp("families")

    def save(family: str) -> Path:
        folder = root / family
        if not folder.exists():
            (tiny_families.save_vision if family in VISION else tiny_families.save_text)(family, folder)
        return folder

    return save


@pytest.fixture(scope="module")
def loaded(folder_of: Callable[[str], Path]) -> Callable[[str], LoadedModel]:
    models: dict[str, LoadedModel] = {}

    def load(family: str) -> LoadedModel:
        if family not in models:
            models[family] = load_model(config_for(str(folder_of(family))))
        return models[family]

    return load


def config_for(model: str, dataset: str = "", **more: Any) -> HarvestConfig:
    settings = {"cache": Path("c"), "window": 64, "val_fraction": 0.0, "workers": 1, **more}
    return HarvestConfig(model=model, dataset=dataset, **settings)


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations with one picture, two, and none."""
    folder, rng = tmp_path_factory.mktemp("talks"), np.random.default_rng(0)
    for number, (width, height) in enumerate([(60, 40), (40, 64), (50, 50), (90, 40)]):
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    rows = [tiny.picture_row(number, f"{number}.png") for number in range(3)]
    two = [{"from": "human", "value": "<image>\nor\n<image>\nwhat is it"}, {"from": "gpt", "value": "green"}]
    rows.append({"id": "two", "image": ["3.png", "1.png"], "conversations": two})
    none = [{"from": "human", "value": "what is red"}, {"from": "gpt", "value": "a circle in the picture"}]
    rows.append({"id": "none", "conversations": none})
    return tiny.write_rows(folder, rows)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"text": "a red circle on a blue background " * n} for n in (1, 4, 2)]
    return tiny.write_rows(tmp_path_factory.mktemp("texts"), rows)


@pytest.fixture
def data(talks: Path, texts: Path) -> Callable[[str], Path]:
    return lambda family: talks if family in VISION else texts


def prepared(model: LoadedModel, dataset: Path) -> list[PreparedSample]:
    config = config_for(model.name, str(dataset), max_bad_fraction=1.0)
    reads = Feed(open_rows(str(dataset), "train"), model, config, {"train": 0, "val": 0}).reads()
    return [read.prepared for read in reads if read.prepared is not None]


def decoder_blocks(model: LoadedModel) -> nn.ModuleList:
    """Found in another way than by the code: from the class of the language model."""
    decoder = model.whole.get_decoder()
    return decoder.h if hasattr(decoder, "h") else decoder.layers


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mlps_are_the_language_models_in_layer_order(
    family: str, loaded: Callable[[str], LoadedModel]
) -> None:
    """Vision towers here are as deep and as wide, and their MLPs are called mlp as well."""
    model = loaded(family)
    found = find_hookpoints(model, None, "mlp_in")
    assert found.norms is None
    mlps = [model.body.get_submodule(path) for path in found.mlps]
    assert [id(mlp) for mlp in mlps] == [id(block.mlp) for block in decoder_blocks(model)]
    assert found.mlps == [path_pattern(found.mlps).format(layer) for layer in range(LAYERS)]
    if family in VISION:
        towers = [name for name, module in model.body.named_modules() if name.endswith(".mlp")]
        assert len(towers) >= 2 * LAYERS, "the tower must have MLPs that could be mistaken"


@pytest.mark.parametrize("site", ["mlp_in", "resid_mid"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_captured_is_what_the_mlp_read_and_wrote(
    family: str, site: str, loaded: Callable[[str], LoadedModel], data: Callable[[str], Path]
) -> None:
    """mlp(x) == y, and for resid_mid mlp(norm(x)) == y, bit for bit; x as the block itself is given it."""
    model = loaded(family)
    found = find_hookpoints(model, None, site)
    batch = collate(prepared(model, data(family)))
    if site == "resid_mid" and family in WITHOUT_NORM:
        with pytest.raises(ValueError, match=r"Olmo2MLP does not read what the norm before it gives; harv"):
            run(model, found, batch.inputs)
        return
    kept = run(model, found, batch.inputs)
    if site == "resid_mid" and family in BESIDE:
        assert path_pattern(found.norms) == BESIDE[family]
    for layer in range(LAYERS):
        x, y = kept["mlp_in"][layer], kept["mlp_out"][layer]
        with torch.inference_mode():
            read = model.body.get_submodule(found.norms[layer])(x) if found.norms else x
            told = model.body.get_submodule(found.mlps[layer])(read[None])
        said = told[0] if isinstance(told, tuple) else told
        torch.testing.assert_close(said[0], y, rtol=1e-5, atol=1e-6)


def run(model: LoadedModel, found: Hookpoints, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """By site, (layer, sample and position, d_model) of all tokens."""
    modules = [model.body.get_submodule(path) for path in found.mlps]
    norms = [model.body.get_submodule(path) for path in found.norms] if found.norms else None
    kept: dict[str, list[Tensor]] = {"mlp_in": [], "mlp_out": []}

    def receive(site: str, layer: int, values: Tensor) -> None:
        assert layer == len(kept[site])
        kept[site].append(values.reshape(-1, values.shape[-1]).clone())

    with MlpTaps(modules, norms) as taps:
        taps.run(model.body, inputs, receive)
    return {site: torch.stack(layers) for site, layers in kept.items()}


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in WITHOUT_NORM])
def test_resid_mid_is_the_residual_stream(
    family: str, loaded: Callable[[str], LoadedModel], data: Callable[[str], Path]
) -> None:
    """Before the block where MLP and attention run side by side, else between the two.

    What a block gives less what it was given is attention plus MLP (behind its own norm, for Gemma).
    """
    model = loaded(family)
    sample = prepared(model, data(family))[0]
    blocks = decoder_blocks(model)
    seen: dict[str, Tensor] = {}
    handles = [
        blocks[1].register_forward_pre_hook(
            lambda m, args, kw: keep(seen, "before", args, kw), with_kwargs=True
        ),
        blocks[1].mlp.register_forward_hook(lambda m, args, out: seen.update(mlp=first(out))),
        blocks[1].register_forward_hook(lambda m, args, out: seen.update(after=first(out))),
    ]
    kept = run(model, find_hookpoints(model, None, "resid_mid"), sample.inputs)
    for handle in handles:
        handle.remove()
    resid = kept["mlp_in"][1]
    if family in BESIDE:
        torch.testing.assert_close(resid, seen["before"][0])
        return
    added = seen["mlp"]
    if hasattr(blocks[1], "post_feedforward_layernorm"):
        with torch.inference_mode():
            added = blocks[1].post_feedforward_layernorm(added)
    torch.testing.assert_close(resid + added[0], seen["after"][0], rtol=1e-4, atol=1e-5)


def keep(seen: dict[str, Tensor], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    seen[name] = args[0] if args else kwargs["hidden_states"]


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("family", FAMILIES)
def test_a_harvest_stores_what_each_sample_alone_gives(
    family: str,
    loaded: Callable[[str], LoadedModel],
    data: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """All samples go through the model together, padded; by itself each gives the same."""
    model, dataset = loaded(family), data(family)
    config = config_for(
        model.name, str(dataset), cache=tmp_path / "c", precision="bf16", max_bad_fraction=1.0
    )
    report = harvest(config)
    rejected = 1 if family == "paligemma" else 0  # it cannot do without a picture
    assert report.rejected == rejected
    cache = open_cache(tmp_path / "c")
    split = cache["train"]
    columns = split.tokens()
    alone = prepared(model, dataset)
    assert len(split) == sum(sample.length for sample in alone)
    found = find_hookpoints(model, None, "mlp_in")
    values = {site: split.read(site, start=0, stop=len(split)) for site in ("mlp_in", "mlp_out")}
    for sample in alone:
        rows = np.flatnonzero(columns["sample"] == sample.number)
        rows = rows[np.argsort(columns["position"][rows])]
        for name, expected in sample.columns.items():
            assert np.array_equal(columns[name][rows], expected), name
        by_itself = run(model, found, sample.inputs)
        for site, layers in by_itself.items():
            value = layers.movedim(0, 1).numpy()
            np.testing.assert_allclose(values[site][rows], value, rtol=2**-7, atol=2e-4 * np.abs(value).max())


@pytest.mark.parametrize("family", ["llava_next", "idefics3"])
def test_tokens_of_tiles_lead_back_to_their_place(
    family: str, loaded: Callable[[str], LoadedModel], talks: Path, tmp_path: Path
) -> None:
    """What `clt info --token` says of each token of a cache, against what was prepared."""
    model = loaded(family)
    harvest(config_for(model.name, str(talks), cache=tmp_path / "c"))
    cache = open_cache(tmp_path / "c")
    by_number = {sample.number: sample for sample in prepared(model, talks)}
    separators = 0
    for number in range(len(cache["train"])):
        trace = trace_token(cache, "train", number)
        sample = by_number[trace["sample"]]
        images = [
            i for i in sample.line["images"] if i["positions"][0] <= trace["position"] < i["positions"][1]
        ]
        assert bool(images) == (trace["image"] is not None)
        said = render_token(trace, SourceOfToken(None, None, None, None, []))
        if trace["kind"] == "image":
            row, col = (int(sample.columns[name][trace["position"]]) for name in ("row", "col"))
            expected = patch_rectangle(images[0], trace["position"], row, col)
            assert trace["image"]["rectangle"] == expected
            left, top, right, bottom = expected
            assert f"of tile {trace['image']['tile']} (of 0 to " in said
            assert f"x {left:g} to {right:g}, y {top:g} to {bottom:g} of the upright picture" in said
        elif images:
            separators += 1
            assert trace["kind"] == "template"
            assert trace["image"]["rectangle"] is None
            assert "none: it separates rows or tiles" in said
    assert separators > 10


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3", "smolvlm", "internvl"])
def test_in_bfloat16(
    family: str,
    folder_of: Callable[[str], Path],
    talks: Path,
    tmp_path: Path,
) -> None:
    """Pictures are given in the model's own numbers, and its outputs kept bit for bit."""
    config = config_for(
        str(folder_of(family)), str(talks), cache=tmp_path / "c", precision="bf16", dtype="bfloat16"
    )
    assert harvest(config).rejected == 0
    cache = open_cache(tmp_path / "c")
    assert cache.manifest.source["dtype"] == "bfloat16"
    model, columns = load_model(config), cache["train"].tokens()
    sample = prepared(model, talks)[0]
    rows = np.flatnonzero(columns["sample"] == sample.number)
    rows = rows[np.argsort(columns["position"][rows])]
    found = run(model, find_hookpoints(model, None, "mlp_in"), to_bfloat16(sample.inputs))
    stored = torch.from_numpy(cache["train"].read("mlp_in", start=0, stop=len(cache["train"]))[rows])
    assert torch.equal(stored.bfloat16().float(), stored)
    torch.testing.assert_close(stored.movedim(0, 1), found["mlp_in"].float(), rtol=0.05, atol=0.05)


def to_bfloat16(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl", "llama", "gpt2"])
def test_neither_later_layers_nor_the_lm_head_run(
    family: str, loaded: Callable[[str], LoadedModel], data: Callable[[str], Path]
) -> None:
    """With layers 0 and 1 asked for, the MLP of layer 1 is the last module to run, and nothing is cached."""
    model = loaded(family)
    sample = prepared(model, data(family))[0]
    blocks = decoder_blocks(model)
    runs = dict.fromkeys(["0", "1", "2", "mlp 2", "head"], 0)
    watched = {"0": blocks[0], "1": blocks[1], "2": blocks[2], "mlp 2": blocks[2].mlp}
    watched["head"] = model.whole.get_output_embeddings()

    def count(name: str) -> Callable[..., None]:
        return lambda *_: runs.update({name: runs[name] + 1})

    handles = [module.register_forward_pre_hook(count(name)) for name, module in watched.items()]
    found = find_hookpoints(model, None, "mlp_in")
    run(model, Hookpoints(found.mlps[:2], None), sample.inputs)
    for handle in handles:
        handle.remove()
    assert runs == {"0": 1, "1": 1, "2": 0, "mlp 2": 0, "head": 0}


def test_an_mlp_that_adds_the_residual_stream_itself_is_refused(
    loaded: Callable[[str], LoadedModel], texts: Path
) -> None:
    model = loaded("bloom")
    batch = collate(prepared(model, texts)[:1])
    with pytest.raises(ValueError, match=r"BloomMLP reads tensors of shape \[1, \d+, 80\], \[1, \d+, 80\]"):
        run(model, find_hookpoints(model, None, "mlp_in"), batch.inputs)


def test_where_no_mlp_is_found_the_error_lists_candidates(
    loaded: Callable[[str], LoadedModel], texts: Path
) -> None:
    """OPT has the two maps of its MLP in the block itself: neither of them alone will do."""
    model = loaded("opt")
    with pytest.raises(
        ValueError, match=r"found no 3 MLPs .* --mlp, candidates: .*decoder\.layers\.\{\}\.fc1"
    ):
        find_hookpoints(model, None, "mlp_in")
    with pytest.raises(
        ValueError, match=r"no module decoder.layers.0.mlp; candidates: decoder\.layers\.\{\}"
    ):
        find_hookpoints(model, "decoder.layers.{}.mlp", "mlp_in")
    with pytest.raises(ValueError, match=r"expected \{\} where the layer's number stands"):
        find_hookpoints(model, "decoder.layers.0.fc2", "mlp_in")
    with pytest.raises(ValueError, match="found self_attn, activation_fn, self_attn_layer_norm, fc1, fc2"):
        find_hookpoints(model, "decoder.layers.{}.fc2", "resid_mid")
    batch = collate(prepared(model, texts)[:1])
    with pytest.raises(
        ValueError, match=r"Linear reads tensors of shape \[\d+, 96\] and returns \[\d+, 80\]"
    ):
        run(model, find_hookpoints(model, "decoder.layers.{}.fc2", "mlp_in"), batch.inputs)


@pytest.mark.parametrize("pattern", ["model.language_model.layers.{}.mlp", "language_model.layers.{}.mlp"])
def test_a_pattern_is_a_path_in_the_model_or_in_its_body(
    pattern: str, loaded: Callable[[str], LoadedModel]
) -> None:
    """As `print(model)` shows it, or as the cache's manifest does."""
    model = loaded("llava")
    assert find_hookpoints(model, pattern, "mlp_in") == find_hookpoints(model, None, "mlp_in")
    other = find_hookpoints(model, pattern.replace("mlp", "self_attn.o_proj"), "mlp_in")
    assert other.mlps[2] == "language_model.layers.2.self_attn.o_proj"
    with pytest.raises(ValueError, match="the model has no module lm_head0"):
        find_hookpoints(model, "lm_head{}", "mlp_in")


def table() -> dict[str, list[str]]:
    """docs/models.md: by family, the other cells of its row."""
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows[2:]}


def test_the_table_of_models_names_what_is_tested(loaded: Callable[[str], LoadedModel]) -> None:
    """Family by family, with the paths and norms that are found."""
    rows = table()
    assert rows.keys() == {*FAMILIES, *REFUSED}
    for family in FAMILIES:
        found = find_hookpoints(loaded(family), None, "resid_mid")
        assert found.norms is not None
        mlps, norm, _ = rows[family]
        assert mlps == f"`{path_pattern(found.mlps)}`"
        if family in WITHOUT_NORM:
            assert norm.startswith("none: resid_mid is refused")
        else:
            assert norm == f"`{found.norms[0].rpartition('.')[2]}`"
    for family in REFUSED:
        assert rows[family][0].startswith("refused: ")
    assert {family for family, row in rows.items() if row[2]} == set(VISION)
