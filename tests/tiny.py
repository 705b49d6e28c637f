"""Tiny models and datasets for tests: made from configs in a second, nothing is downloaded."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SIDE, PATCH, IMAGE_TOKENS = 24, 8, 9
LAYERS, WIDTH = 3, 80
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>{% endfor %}"
)
WORDS = "a red circle on a blue background what is in the picture describe it green square"


def save_llava(folder: Path) -> Path:
    """A LLaVA of random weights: 3 layers, 80 wide, 9 tokens a picture."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(["<image>"])
    config = LlavaConfig(
        text_config=text_config(len(tokenizer)),
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
            projection_dim=16,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
    )
    square = {"height": SIDE, "width": SIDE}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=square, crop_size=square, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_llama(folder: Path) -> Path:
    """A Llama of random weights whose tokenizer puts <s> in front, and has no chat template."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer([])
    LlamaForCausalLM(text_config(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def text_config(vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )


def make_tokenizer(more: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with <s> as BOS."""
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>", *more]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=special[2:],
    )


def write_rows(folder: Path, rows: list[dict[str, Any]], name: str = "train.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_dataset(folder: Path, n_pictures: int = 6, n_texts: int = 6) -> Path:
    """Picture conversations and text conversations of mixed length, with the pictures."""
    rng = np.random.default_rng(0)
    words = WORDS.split()
    rows = []
    for number in range(n_pictures):
        write_picture(folder / "images" / f"{number}.png", rng)
        answer = " ".join(rng.choice(words, size=int(rng.integers(2, 9))))
        rows.append(picture_row(number, f"images/{number}.png", answer))
    for number in range(n_texts):
        answer = " ".join(rng.choice(words, size=int(rng.integers(3, 40))))
        talk = [{"from": "human", "value": "what is it"}, {"from": "gpt", "value": answer}]
        rows.append({"id": f"text-{number}", "conversations": talk})
    return write_rows(folder, rows)


def picture_row(number: int, image: Any, answer: str = "a red circle") -> dict[str, Any]:
    talk = [{"from": "human", "value": "<image>\nwhat is it"}, {"from": "gpt", "value": answer}]
    return {"id": f"picture-{number}", "image": image, "conversations": talk}


def write_picture(path: Path, rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
