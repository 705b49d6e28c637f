"""How well a transcoder stands in for the MLPs of its model, on held-out samples.

Every sample goes through the model once as it is, and once in every mode of `Replacement`; what is compared
are the logits of the next token, at every position whose next token is no image.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..cache_format.layout import KINDS
from ..cache_format.sealed import SINK_RATIO
from ..harvest.config import HarvestConfig
from ..harvest.mlps import find_hookpoints
from ..harvest.model import LoadedModel, load_model
from ..harvest.rows import open_rows
from ..harvest.tokens import PreparedSample
from ..progress import Progress
from ..train.checkpoint import checkpoint_folder, load_transcoder
from ..train.origin import load_origin
from ..train.run_folder import load_config
from ..train.transcoder import CrossLayerTranscoder
from .generated import Answers, Generated
from .logit_changes import LogitChanges
from .prompts import held_out, last_answer
from .replacement import Edit, Replacement, parse_edits
from .scores import Scores, compare

MODES = ("transcoder", "errors", "mean", "zero")
EXTRA_TOKENS = 8
"""An answer may be this much longer than the dataset's."""


@dataclass(frozen=True, kw_only=True)
class ModelEvalConfig:
    """What `clt eval --model` is told beside the run."""

    harvest: HarvestConfig
    """Model, dataset and how samples are read"""
    samples: int = 64
    """Held-out samples at most"""
    generate: int = 0
    """Samples whose answers are generated, with the model as it is and with the replaced one"""
    exclude: tuple[str, ...] = ()
    """Kinds of tokens, and `sink`, whose MLPs stay; a run's own, because it never saw them"""
    edits: tuple[Edit, ...] = ()
    """Latents to hold at a value; the modes are then `edit` alone"""

    @property
    def modes(self) -> tuple[str, ...]:
        return ("edit",) if self.edits else MODES


class ModelEval(NamedTuple):
    scores: dict[str, Scores]
    """By mode; `original` compares the model with itself, so that its ce is the model's"""
    answers: Answers
    logits: dict[str, list[list[Any]]] | str
    """Tokens whose logits rise and fall most, where latents are edited; else why there are none"""
    left: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        modes = {mode: scores.to_json() for mode, scores in self.scores.items()}
        return {
            "modes": modes,
            "mlps_left_at": list(self.left),
            "recovered": self.recovered(),
            "logits": self.logits,
            **self.answers.to_json(),
        }

    def recovered(self) -> dict[str, float] | str:
        """Share of the rise in cross-entropy under an ablation that the transcoder takes back."""
        rise = {mode: (found.estimates() or {})["rise"].mean for mode, found in self.scores.items()}
        if "transcoder" not in rise:
            return "not computed: latents were edited, MLPs were not replaced"
        return {mode: 1 - rise["transcoder"] / rise[mode] for mode in ("mean", "zero")}


def evaluate_run(
    run: Path,
    settings: dict[str, Any],
    samples: int,
    generate: int,
    ablate: tuple[str, ...],
    steer: tuple[str, ...],
) -> tuple[dict[str, Any], str]:
    """`clt eval --model`: as JSON and as text. settings: of `HarvestConfig`, model and dataset at least."""
    folder = checkpoint_folder(run)
    transcoder, origin = load_transcoder(folder), load_origin(folder.parent)
    trained = load_config(folder.parent)
    missing = tuple(kind for kind in KINDS if kind not in trained.kinds)
    own = Path(settings["dataset"]).resolve() == Path(origin.dataset).resolve()
    harvest = HarvestConfig(
        cache=run,
        input_site=origin.input_site,
        val_fraction=origin.val_fraction if own else 1.0,
        shuffle_seed=origin.seed,
        **settings,
    )
    config = ModelEvalConfig(
        harvest=harvest,
        samples=samples,
        generate=generate,
        exclude=(*missing, *trained.exclude),
        edits=tuple(parse_edits(ablate, steer, transcoder.shape.layers, transcoder.shape.n_latents)),
    )
    found = evaluate_with_model(transcoder, config)
    return found.to_json(), render(found)


@torch.no_grad()
def evaluate_with_model(transcoder: CrossLayerTranscoder, config: ModelEvalConfig) -> ModelEval:
    """One pass over held-out samples; ValueError where model or dataset do not fit the transcoder."""
    rows = open_rows(config.harvest.dataset, config.harvest.split)
    model = load_model(config.harvest)
    replacement = attach(transcoder, model, config)
    scores = {mode: Scores() for mode in ("original", *config.modes)}
    generated: list[Generated] = []
    changes = LogitChanges()
    samples = held_out(rows, model, config.harvest, config.samples)
    with replacement, Progress("eval", total=config.samples, unit="samples") as progress:
        for number, sample in enumerate(samples):
            _score(replacement, model, sample, config, scores, changes)
            if number < config.generate:
                generated.append(_generate(replacement, model, sample, config))
            progress.add(1)
    if not scores["original"].samples:
        raise ValueError(
            f"{config.harvest.dataset}: none of its samples is held out; expected some in split val"
        )
    answers = Answers(generated, "edited" if config.edits else "replaced")
    none = "not computed: no latent was edited, see --ablate and --steer"
    logits = changes.ends(model.tokenizer) if config.edits else none
    return ModelEval(scores, answers, logits, config.exclude)


def attach(transcoder: CrossLayerTranscoder, model: LoadedModel, config: ModelEvalConfig) -> Replacement:
    """Hooks for the transcoder's layers, on the model's device."""
    if model.d_model != transcoder.shape.d_model or max(transcoder.shape.layers) >= model.n_layers:
        raise ValueError(
            f"{model.name} has {model.n_layers} layers of {model.d_model} channels; expected those of the "
            f"transcoder, layers up to {max(transcoder.shape.layers)} of {transcoder.shape.d_model}"
        )
    points = find_hookpoints(model, config.harvest.mlp, config.harvest.input_site)

    def chosen(paths: list[str]) -> list[torch.nn.Module]:
        return [model.body.get_submodule(paths[layer]) for layer in transcoder.shape.layers]

    norms = chosen(points.norms) if points.norms else None
    return Replacement(transcoder.to(model.device), chosen(points.mlps), norms, config.edits)


def _score(
    replacement: Replacement,
    model: LoadedModel,
    sample: PreparedSample,
    config: ModelEvalConfig,
    scores: dict[str, Scores],
    changes: LogitChanges,
) -> None:
    ids, kind = sample.columns["token_id"], sample.columns["kind"]
    inputs = {name: value.to(model.device) for name, value in sample.inputs.items()}
    original = _original(replacement, model, inputs, kind, config.exclude)
    predicted = np.flatnonzero(ids[1:] != (-1 if model.image_token is None else model.image_token))
    truth = torch.from_numpy(ids[1:][predicted]).long().to(model.device)
    for mode, into in scores.items():
        logits = original if mode == "original" else _logits(replacement, model, inputs, mode)
        into.add(compare(original[predicted], logits[predicted], truth), kind[1:][predicted])
        if mode == "edit":
            changes.add(original[predicted], logits[predicted])


def _original(
    replacement: Replacement,
    model: LoadedModel,
    inputs: dict[str, Tensor],
    kind: npt.NDArray[np.uint8],
    exclude: Iterable[str],
) -> Tensor:
    """Logits (position, vocabulary) of the model as it is; sets which positions' MLPs stay."""
    replacement.record = True
    logits = _logits(replacement, model, inputs, "original")
    replacement.record = False
    left = np.isin(kind, [KINDS.index(name) for name in exclude if name in KINDS])
    mask = torch.from_numpy(left)[None].to(model.device)
    if "sink" in exclude:
        norms = torch.stack(replacement.norms)  # (layer, 1, position)
        mask = mask | (norms > SINK_RATIO * norms.median(dim=2, keepdim=True).values).any(dim=0)
    replacement.left = mask
    return logits


def _logits(replacement: Replacement, model: LoadedModel, inputs: dict[str, Tensor], mode: str) -> Tensor:
    """(position, vocabulary)"""
    replacement.mode = mode
    logits: Tensor = model.whole(**inputs, use_cache=False).logits[0]
    return logits


def _generate(
    replacement: Replacement, model: LoadedModel, sample: PreparedSample, config: ModelEvalConfig
) -> Generated:
    """Greedy answers of the model as it is, and replaced or edited."""
    answer = last_answer(sample)
    inputs = {name: value.to(model.device) for name, value in answer.inputs.items()}
    length = inputs["input_ids"].shape[1]
    kind = sample.columns["kind"][:length]
    _original(replacement, model, inputs, kind, config.exclude)
    said = []
    for mode in ("original", "edit" if config.edits else "transcoder"):
        replacement.mode = mode
        out = model.whole.generate(**inputs, max_new_tokens=len(answer.truth) + EXTRA_TOKENS, do_sample=False)
        said.append(out[0, length:].tolist())
    texts = [model.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in (answer.truth, *said)]
    return Generated(sample.line["id"], *texts)


def render(found: ModelEval) -> str:
    """As text for a terminal."""
    lines = [f"{'mode':<11} {'cross-entropy':>16} {'rise':>16} {'KL':>16} {'top-1':>14}"]
    for mode, scores in found.scores.items():
        estimates = scores.estimates() or {}
        cells = [f"{e.mean:.3f} ± {e.half_width:.3f}" for e in estimates.values()]
        lines.append(f"{mode:<11} {cells[0]:>16} {cells[1]:>16} {cells[2]:>16} {cells[3]:>14}")
    lines += _by_kind(found.scores)
    if found.left:
        lines.append(f"MLPs stay at: {', '.join(found.left)}, which the run never saw")
    if isinstance(recovered := found.recovered(), dict):
        shares = ", ".join(f"{share:.1%} of {mode} ablation's" for mode, share in recovered.items())
        lines.append(f"the transcoder takes back {shares} rise")
    if isinstance(found.logits, dict):
        for name, ends in found.logits.items():
            lines.append(f"logits {name} most: {', '.join(f'{text!r} {by:+.2f}' for text, by in ends)}")
    lines += found.answers.render()
    return "\n".join(lines)


def _by_kind(scores: dict[str, Scores]) -> Sequence[str]:
    """Rise of the first mode that changes something, by kind of the predicted token."""
    mode = list(scores)[1]
    found = {kind: scores[mode].estimates(kind) for kind in KINDS}
    cells = [f"{k} {e['rise'].mean:.3f} ± {e['rise'].half_width:.3f}" for k, e in found.items() if e]
    return [f"rise by kind of the predicted token ({mode}): {', '.join(cells)}"]
