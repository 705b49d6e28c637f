"""Teach the demo model to see: train tower and projector while the language model stays frozen.

Two stages. *Words*: each patch's projected vector is pulled to the embeddings of the words that are true
of the patch (its colour, and the shape that covers it), which needs no language model and is cheap.
*Captions*: the frozen language model reads the image tokens and has to answer; its gradient does the rest.
The weights are written in bf16 with the caption score on pictures that training never saw.

    python demo/train_eyes.py

takes about 40 minutes on two cores (the caption stage is most of it).
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import shapes
import torch
import torch.nn.functional as F
from llava import (
    EYES,
    IMAGE_TOKENS,
    PATCH,
    eye_modules,
    load_eyes,
    make_llava,
    make_processor,
    make_tokenizer,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

WORDS = [*shapes.COLOURS, *shapes.SHAPES]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--words", type=int, default=2200, help="steps of 64 pictures")
    options.add_argument("--captions", type=int, default=250, help="steps of 16 pictures")
    options.add_argument("--start", type=Path, help="go on from these weights")
    options.add_argument("--out", type=Path, default=EYES)
    asked = options.parse_args()
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    processor = make_processor(tokenizer)
    model = make_llava(tokenizer, asked.start)
    model.requires_grad_(False)
    for module in eye_modules(model).values():
        module.requires_grad_(True)
    train_words(model, processor, asked.words)
    save(model, asked.out, score=None)
    train_captions(model, processor, asked.captions)
    save(model, asked.out, score=None)
    load_eyes(model, asked.out)  # score what is shipped: the weights after rounding to bf16
    save(model, asked.out, score=caption_score(model, processor, shapes.UNSEEN[:200]))


def train_words(model: LlavaForConditionalGeneration, processor: LlavaProcessor, steps: int) -> None:
    ids = processor.tokenizer([f" {word}" for word in WORDS]).input_ids
    words = model.get_input_embeddings().weight[torch.tensor(ids).flatten()]  # (word, d_model)
    rng, optimizer, schedule = _training(model, steps, lr=1e-3)
    began = time.monotonic()
    for step in range(steps):
        numbers = rng.integers(shapes.TRAINING.stop, size=64).tolist()
        vectors = image_vectors(model, pixels(processor, numbers))  # (picture, patch, d_model)
        colour, shape, covered = patch_words(numbers)
        scores = 20 * F.normalize(vectors, dim=-1) @ F.normalize(words, dim=-1).T
        colour_loss = F.cross_entropy(scores[..., :8].flatten(0, 1), colour.flatten())
        shape_loss = F.cross_entropy(scores[..., 8:][covered], shape[covered])
        wanted = words[colour] + words[8 + shape] * covered[..., None]
        size = (vectors - wanted).square().mean() / words.square().mean()
        _step(colour_loss + shape_loss + 0.1 * size, optimizer, schedule)
        if step % 100 == 99:
            right = (scores[..., 8:][covered].argmax(-1) == shape[covered]).float().mean()
            print(
                f"words {step + 1}: colour {colour_loss:.3f} shape {shape_loss:.3f} (right {right:.3f}) "
                f"size {size:.3f}, {time.monotonic() - began:.0f} s",
                flush=True,
            )


def train_captions(model: LlavaForConditionalGeneration, processor: LlavaProcessor, steps: int) -> None:
    rng, optimizer, schedule = _training(model, steps, lr=5e-4)
    began = time.monotonic()
    for step in range(steps):
        numbers = rng.integers(shapes.TRAINING.stop, size=16).tolist()
        asked = [0 if rng.random() < 0.7 else int(rng.integers(1, 4)) for _ in numbers]
        loss = answer_loss(model, processor, numbers, asked)
        _step(loss, optimizer, schedule)
        if step % 20 == 19:
            print(f"captions {step + 1}: loss {loss:.3f}, {time.monotonic() - began:.0f} s", flush=True)
        if step % 100 == 99:
            print(f"  exact match {caption_score(model, processor, shapes.UNSEEN[-40:]):.3f}", flush=True)


def answer_loss(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, numbers: list[int], asked: list[int]
) -> Tensor:
    """Mean cross-entropy of the answers' tokens; `asked` chooses the question for each picture."""
    turns = [shapes.turns(number)[which] for number, which in zip(numbers, asked, strict=True)]
    prompts = [prompt(processor, turn.question) for turn in turns]
    texts = [p + t.answer + "<|im_end|>" for p, t in zip(prompts, turns, strict=True)]
    pictures = [shapes.draw(number) for number in numbers]
    batch = processor(text=texts, images=pictures, padding=True, padding_side="right", return_tensors="pt")
    starts = [len(processor.tokenizer(p).input_ids) + IMAGE_TOKENS - 1 for p in prompts]
    place = torch.arange(batch["input_ids"].shape[1])
    answers = (place >= torch.tensor(starts)[:, None]) & batch["attention_mask"].bool()
    hidden = model.model(**batch).last_hidden_state[:, :-1][answers[:, 1:]]
    return F.cross_entropy(model.lm_head(hidden), batch["input_ids"][:, 1:][answers[:, 1:]])


@torch.no_grad()
def caption_score(model: LlavaForConditionalGeneration, processor: LlavaProcessor, numbers: range) -> float:
    """Share of pictures whose greedy caption is exactly right."""
    right = 0
    for start in range(0, len(numbers), 20):
        some = numbers[start : start + 20]
        pictures = [shapes.draw(number) for number in some]
        texts = [prompt(processor, "Describe the picture.")] * len(some)
        batch = processor(text=texts, images=pictures, return_tensors="pt")
        out = model.generate(**batch, max_new_tokens=12, do_sample=False)
        said = processor.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(s.strip() == shapes.caption(n) for s, n in zip(said, some, strict=True))
    return right / len(numbers)


def prompt(processor: LlavaProcessor, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def pixels(processor: LlavaProcessor, numbers: list[int]) -> Tensor:
    pictures = [shapes.draw(number) for number in numbers]
    return processor.image_processor(pictures, return_tensors="pt")["pixel_values"]


def image_vectors(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    hidden = model.model.vision_tower(pixel_values).last_hidden_state[:, 1:]  # without CLS
    return model.model.multi_modal_projector(hidden)


def patch_words(numbers: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """For each (picture, patch): its colour's index, its picture's shape, and whether the shape covers it."""
    covered = torch.from_numpy(np.stack([shapes.coverage(n, PATCH).ravel() for n in numbers])) > 0.4
    scenes = [shapes.scene(n) for n in numbers]
    ink, paper, shape = (
        torch.tensor(rows)[:, None]
        for rows in zip(
            *[
                (WORDS.index(s.colour), WORDS.index(s.background), shapes.SHAPES.index(s.shape))
                for s in scenes
            ],
            strict=True,
        )
    )
    return torch.where(covered, ink, paper), shape.expand_as(covered), covered


def save(model: LlavaForConditionalGeneration, path: Path, score: float | None) -> None:
    weights = {
        f"{name}.{key}": value.to(torch.bfloat16).contiguous()
        for name, module in eye_modules(model).items()
        for key, value in module.state_dict().items()
    }
    about = {"caption_exact_match": json.dumps(score), "unseen_pictures": "200"}
    save_file(weights, path, metadata=about)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, exact match on unseen pictures {score}", flush=True)


def _training(
    model: LlavaForConditionalGeneration, steps: int, lr: float
) -> tuple[np.random.Generator, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    eyes = [p for module in eye_modules(model).values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(eyes, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 50) * max(0.0, 1 - step / max(1, steps))
    )
    return np.random.default_rng(steps), optimizer, schedule


def _step(
    loss: Tensor, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler
) -> None:
    loss.backward()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()


if __name__ == "__main__":
    main()
