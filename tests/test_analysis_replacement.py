"""A model with its MLPs replaced, against the same computed slowly, layer by layer, outside of it."""

from dataclasses import replace

import pytest
import tiny
import torch
from tiny_families import TEXT
from tiny_transcoder import make_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from clt.analysis.replacement import Edit, Replacement, parse_edits
from clt.train.shape import Shape
from clt.train.transcoder import CrossLayerTranscoder

SHAPE = Shape(layers=(0, 1, 2), d_model=tiny.WIDTH, n_latents=60, k=8, n_targets=2)
IDS = torch.tensor([[0, 9, 33, 70, 12, 40], [0, 5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    folder = tiny.save_llama(tmp_path_factory.mktemp("llama"))
    return LlamaForCausalLM.from_pretrained(folder).double().eval()


def hooked(llama: LlamaForCausalLM, transcoder: CrossLayerTranscoder, **more: object) -> Replacement:
    layers = [llama.model.layers[layer] for layer in transcoder.shape.layers]
    norms = [layer.post_attention_layernorm for layer in layers] if more.pop("norms", False) else None
    return Replacement(transcoder, [layer.mlp for layer in layers], norms, **more)


def run_with(llama: LlamaForCausalLM, written: dict[int, torch.Tensor], hook: object = None) -> torch.Tensor:
    """Logits with some MLPs writing what is given; hook: one more, (layer, function)."""
    mlps = [layer.mlp for layer in llama.model.layers]
    handles = [mlps[layer].register_forward_hook(lambda m, a, o, v=v: v) for layer, v in written.items()]
    if hook is not None:
        handles.append(mlps[hook[0]].register_forward_hook(hook[1]))
    logits = llama(IDS).logits
    for handle in handles:
        handle.remove()
    return logits


@torch.no_grad()
def slow(llama: LlamaForCausalLM, transcoder: CrossLayerTranscoder, left: torch.Tensor) -> torch.Tensor:
    """Logits: the model is run again for each layer, with what was predicted for the layers before it."""
    layers = transcoder.shape.layers
    read = torch.zeros(IDS.numel(), len(layers), tiny.WIDTH, dtype=torch.float64)
    written: dict[int, torch.Tensor] = {}
    for place, layer in enumerate(layers):
        own = []

        def keep(module, args, out, place=place, own=own):
            read[:, place] = args[0].flatten(0, 1)
            own.append(out)

        run_with(llama, written, (layer, keep))
        predicted = transcoder(read)[:, place].view_as(own[0])
        written[layer] = torch.where(left[..., None], own[0], predicted)
    return run_with(llama, written)


@pytest.mark.parametrize(
    "shape",
    [
        SHAPE,
        replace(SHAPE, layers=(0, 2)),
        replace(SHAPE, tie="target", skip=True),
        replace(SHAPE, n_targets=1),
    ],
    ids=["all", "two layers", "tied, with skip", "per layer"],
)
def test_replaced_equals_the_slow_way(llama: LlamaForCausalLM, shape: Shape) -> None:
    """Logits, with the first position's MLPs left as they are."""
    transcoder = make_model(shape)
    left = torch.zeros_like(IDS, dtype=torch.bool)
    left[:, 0] = True
    expected = slow(llama, transcoder, left)
    with torch.no_grad(), hooked(llama, transcoder) as replacement:
        replacement.mode, replacement.left = "transcoder", left
        torch.testing.assert_close(llama(IDS).logits, expected)
    assert not torch.allclose(expected, llama(IDS).logits)


@pytest.mark.parametrize("norms", [False, True], ids=["mlp_in", "resid_mid"])
@torch.no_grad()
def test_with_recorded_errors_nothing_changes(llama: LlamaForCausalLM, norms: bool) -> None:
    transcoder, expected = make_model(SHAPE), llama(IDS).logits
    with hooked(llama, transcoder, norms=norms) as replacement:
        replacement.record = True
        torch.testing.assert_close(llama(IDS).logits, expected, rtol=0, atol=0)
        replacement.record, replacement.mode = False, "errors"
        torch.testing.assert_close(llama(IDS).logits, expected, rtol=1e-9, atol=1e-9)
        replacement.mode = "transcoder"
        assert not torch.allclose(llama(IDS).logits, expected)
    torch.testing.assert_close(llama(IDS).logits, expected, rtol=0, atol=0)


@torch.no_grad()
def test_ablations(llama: LlamaForCausalLM) -> None:
    transcoder = make_model(SHAPE)
    for mode, value in (("zero", torch.zeros(3, tiny.WIDTH)), ("mean", transcoder.outputs.mean)):
        written = {layer: value[layer].double().expand(*IDS.shape, -1) for layer in range(3)}
        with hooked(llama, transcoder) as replacement:
            replacement.mode = mode
            torch.testing.assert_close(llama(IDS).logits, run_with(llama, written))


@torch.no_grad()
def test_an_edit_adds_what_the_latent_writes(llama: LlamaForCausalLM) -> None:
    """In the last layer, where nothing else can change; a latent held at its own value changes nothing."""
    transcoder = make_model(SHAPE)
    seen = []
    keep = llama.model.layers[2].mlp.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    expected = llama(IDS).logits
    keep.remove()
    x = torch.zeros(IDS.numel(), 3, tiny.WIDTH, dtype=torch.float64)
    x[:, 2] = seen[0][0].flatten(0, 1)
    codes = transcoder.encode(x)[:, 2]
    active = int(codes.sum(dim=0).argmax())
    change = (
        (1.5 - codes[:, active])[:, None] * transcoder.decoder(2, 2)[active] * transcoder.outputs.scale[2]
    )
    written = {2: seen[0][1] + change.view_as(seen[0][1])}
    with hooked(llama, transcoder, edits=[Edit(2, active, 1.5)]) as replacement:
        replacement.mode = "edit"
        torch.testing.assert_close(llama(IDS).logits, run_with(llama, written))
        replacement.edits = []
        torch.testing.assert_close(llama(IDS).logits, expected)


def test_edits_are_parsed_or_refused() -> None:
    layers = (4, 7)
    assert parse_edits(["7:3"], ["4:0=-2.5"], layers, 10) == [Edit(1, 3, 0.0), Edit(0, 0, -2.5)]
    for ablate, steer in (
        (["5:3"], []),
        (["7:10"], []),
        (["7"], []),
        (["7:3=1"], []),
        ([], ["7:3"]),
        ([], ["7:3=x"]),
    ):
        with pytest.raises(ValueError, match="expected layer:latent"):
            parse_edits(ablate, steer, layers, 10)


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "gemma2", "phi"])
def test_other_families_keep_their_logits_with_the_errors_added(family: str) -> None:
    """MLPs that return a tuple, that are experts, that have a norm behind them, that run beside attention."""
    torch.manual_seed(0)
    experts = {"experts_implementation": "eager"} if family in ("gpt_oss", "mixtral") else {}  # for doubles
    model = AutoModelForCausalLM.from_config(TEXT[family](320), **experts).double().eval()
    blocks = model.get_decoder().layers
    with torch.no_grad(), Replacement(make_model(SHAPE), [block.mlp for block in blocks]) as replaced:
        replaced.record = True
        before = model(IDS).logits
        replaced.record = False
        for mode, close in (("errors", True), ("zero", False)):
            replaced.mode = mode
            assert torch.allclose(model(IDS).logits, before) == close
