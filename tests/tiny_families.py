"""A tiny model of random weights for each family, of its real architecture and with its real processor.

Vision towers have as many layers as the language models, and are as wide: whoever takes one for the other
is not saved by a shape.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from tiny import LAYERS, WIDTH
from torch import nn

from clt.harvest.processors import pictures_only

SPECIAL = {
    "llava": {"image_token": "<image>"},
    "llava_next": {"image_token": "<image>"},
    "llava_onevision": {"image_token": "<image>", "video_token": "<video>"},
    "qwen": {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    },
    "gemma3": {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    },
    "idefics3": {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
        **{f"row_{r}_col_{c}": f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)},
    },
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "paligemma": {"image_token": "<image>"},
}
"""Tokens that a family's processor wants, by the attribute of the tokenizer under which it looks."""


def tokenizer_for(family: str) -> Any:
    given = SPECIAL[family]
    tokenizer = tiny.make_tokenizer(list(given.values()))
    named = {name: token for name, token in given.items() if name.endswith("_token")}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens=named,
    )


def template(placeholder: str) -> str:
    """tiny.TEMPLATE with the family's own placeholder."""
    return tiny.TEMPLATE.replace("<image>\n", placeholder)


def text_config(kind: str, vocabulary: int, **more: Any) -> Any:
    """A config of a language model: LAYERS deep and WIDTH wide."""
    wide = {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    return getattr(transformers, f"{kind}Config")(**{**wide, **more})


def siglip(side: int, patch: int) -> Any:
    return transformers.SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        image_size=side,
        patch_size=patch,
        vision_use_head=False,
    )


def clip(side: int, patch: int) -> Any:
    return transformers.CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        image_size=side,
        patch_size=patch,
        projection_dim=16,
    )


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def llava() -> tuple[Any, Any]:
    """A picture is padded to a square of 4 x 4 patches of 6 pixels."""
    tokenizer = tokenizer_for("llava")
    config = transformers.LlavaConfig(
        text_config=text_config("Llama", len(tokenizer)),
        vision_config=clip(24, 6),
        image_token_id=tokenizer.image_token_id,
        image_seq_length=16,
    )
    processor = transformers.LlavaProcessor(
        image_processor=transformers.LlavaImageProcessorPil(
            do_pad=True, size={"shortest_edge": 24}, crop_size=square(24)
        ),
        tokenizer=tokenizer,
        patch_size=6,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>\n"),
    )
    return transformers.LlavaForConditionalGeneration(config), processor


PINPOINTS = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]


def llava_next() -> tuple[Any, Any]:
    """The whole picture, then one grid over up to four tiles of 4 x 4 patches, a newline behind each row."""
    tokenizer = tokenizer_for("llava_next")
    config = transformers.LlavaNextConfig(
        text_config=text_config("Mistral", len(tokenizer), sliding_window=None),
        vision_config=clip(24, 6),
        image_token_id=tokenizer.image_token_id,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=16,
    )
    processor = transformers.LlavaNextProcessor(
        image_processor=transformers.LlavaNextImageProcessorPil(
            size={"shortest_edge": 24}, crop_size=square(24), image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=tokenizer,
        patch_size=6,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>\n"),
    )
    return transformers.LlavaNextForConditionalGeneration(config), processor


def llava_onevision() -> tuple[Any, Any]:
    """As LLaVA-NeXT, with SigLIP, and features thinned out where there would be more than 2 x 16."""
    tokenizer = tokenizer_for("llava_onevision")
    config = transformers.LlavaOnevisionConfig(
        text_config=text_config("Qwen2", len(tokenizer)),
        vision_config=siglip(24, 6),
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
    )
    processor = pictures_only(transformers.LlavaOnevisionProcessor)(
        transformers.LlavaOnevisionImageProcessorPil(size=square(24), image_grid_pinpoints=PINPOINTS),
        tokenizer,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
        chat_template=template("<image>\n"),
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor


def qwen_processor(processor: type, tokenizer: Any) -> Any:
    """Patches of 4 pixels, 2 x 2 of them a token; pictures keep their shape."""
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 256, "longest_edge": 2304}
    )
    placed = "<|vision_start|><|image_pad|><|vision_end|>"
    return pictures_only(processor)(images, tokenizer, chat_template=template(placed))


def qwen_ids(tokenizer: Any) -> dict[str, int]:
    names = ("image_token", "video_token", "vision_start_token", "vision_end_token")
    return {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in names}


MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 4, 4]}


def qwen2_vl() -> tuple[Any, Any]:
    tokenizer = tokenizer_for("qwen")
    config = transformers.Qwen2VLConfig(
        text_config=text_config("Qwen2VLText", len(tokenizer), rope_parameters=MROPE).to_dict(),
        vision_config={
            "depth": LAYERS,
            "embed_dim": WIDTH,
            "hidden_size": WIDTH,
            "num_heads": 4,
            "mlp_ratio": 1,
            "patch_size": 4,
        },
        **qwen_ids(tokenizer),
    )
    model = transformers.Qwen2VLForConditionalGeneration(config)
    return model, qwen_processor(transformers.Qwen2VLProcessor, tokenizer)


def qwen2_5_vl() -> tuple[Any, Any]:
    """Its tower looks through windows of 2 x 2 tokens in all layers but the last."""
    tokenizer = tokenizer_for("qwen")
    config = transformers.Qwen2_5_VLConfig(
        text_config=text_config("Qwen2_5_VLText", len(tokenizer), rope_parameters=MROPE).to_dict(),
        vision_config={
            "depth": LAYERS,
            "hidden_size": WIDTH,
            "out_hidden_size": WIDTH,
            "intermediate_size": 96,
            "num_heads": 4,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [LAYERS - 1],
        },
        **qwen_ids(tokenizer),
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    return model, qwen_processor(transformers.Qwen2_5_VLProcessor, tokenizer)


def qwen3_vl() -> tuple[Any, Any]:
    """Features of the tower's first layer are added behind the language model's first one."""
    tokenizer = tokenizer_for("qwen")
    config = transformers.Qwen3VLConfig(
        text_config=text_config(
            "Qwen3VLText",
            len(tokenizer),
            head_dim=20,
            rope_parameters={**MROPE, "mrope_interleaved": True},
        ).to_dict(),
        vision_config={
            "depth": LAYERS,
            "hidden_size": WIDTH,
            "out_hidden_size": WIDTH,
            "intermediate_size": 96,
            "num_heads": 4,
            "patch_size": 4,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0],
        },
        **qwen_ids(tokenizer),
    )
    model = transformers.Qwen3VLForConditionalGeneration(config)
    return model, qwen_processor(transformers.Qwen3VLProcessor, tokenizer)


def gemma3() -> tuple[Any, Any]:
    """The picture squeezed into 3 x 3 tokens, each the mean of 2 x 2 patches."""
    tokenizer = tokenizer_for("gemma3")
    config = transformers.Gemma3Config(
        text_config=text_config(
            "Gemma3Text", len(tokenizer), head_dim=20, query_pre_attn_scalar=20, sliding_window=64
        ),
        vision_config=siglip(24, 4),
        mm_tokens_per_image=9,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    processor = transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessorPil(size=square(24)),
        tokenizer=tokenizer,
        image_seq_length=9,
        chat_template=template("<start_of_image>"),
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)  # born as zeros
    return model, processor


def idefics3() -> tuple[Any, Any]:
    """Tiles of 24 pixels, 3 x 3 tokens each (2 x 2 patches of 4 pixels a token), then the whole picture."""
    tokenizer = tokenizer_for("idefics3")
    images = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 72}, max_image_size={"longest_edge": 24}
    )
    processor = transformers.Idefics3Processor(
        images, tokenizer, image_seq_len=9, chat_template=template("<image>")
    )
    config = idefics3_config(transformers.Idefics3Config, tokenizer)
    return transformers.Idefics3ForConditionalGeneration(config), processor


def smolvlm() -> tuple[Any, Any]:
    """As Idefics3."""
    tokenizer = tokenizer_for("idefics3")
    images = transformers.SmolVLMImageProcessorPil(
        size={"longest_edge": 72}, max_image_size={"longest_edge": 24}
    )
    processor = pictures_only(transformers.SmolVLMProcessor)(
        images, tokenizer, None, image_seq_len=9, chat_template=template("<image>")
    )
    config = idefics3_config(transformers.SmolVLMConfig, tokenizer)
    return transformers.SmolVLMForConditionalGeneration(config), processor


def idefics3_config(kind: Any, tokenizer: Any) -> Any:
    return kind(
        text_config=text_config("Llama", len(tokenizer)),
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 96,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "image_size": 24,
            "patch_size": 4,
        },
        image_token_id=tokenizer.image_token_id,
        scale_factor=2,
    )


def internvl() -> tuple[Any, Any]:
    """Tiles of 24 pixels, 3 x 3 tokens each (2 x 2 patches of 4 pixels a token), then the whole picture."""
    tokenizer = tokenizer_for("internvl")
    config = transformers.InternVLConfig(
        text_config=text_config("Qwen2", len(tokenizer)),
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 96,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "image_size": [24, 24],
            "patch_size": [4, 4],
        },
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=9,
    )
    processor = pictures_only(transformers.InternVLProcessor)(
        transformers.GotOcr2ImageProcessorPil(size=square(24), crop_to_patches=True, max_patches=6),
        tokenizer,
        image_seq_length=9,
        chat_template=template("<IMG_CONTEXT>\n"),
    )
    return transformers.InternVLForConditionalGeneration(config), processor


def paligemma() -> tuple[Any, Any]:
    """4 x 4 patches of the picture, squeezed; then a question, then an answer. No chat template."""
    tokenizer = tokenizer_for("paligemma")
    images = transformers.SiglipImageProcessorPil(size=square(24))
    images.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(images, tokenizer)
    config = transformers.PaliGemmaConfig(
        text_config=text_config("Gemma", len(tokenizer), head_dim=20),
        vision_config=siglip(24, 6),
        image_token_index=tokenizer.image_token_id,
        projection_dim=WIDTH,
        vocab_size=len(tokenizer),
    )
    return transformers.PaliGemmaForConditionalGeneration(config), processor


VISION: dict[str, Callable[[], tuple[Any, Any]]] = {
    builder.__name__: builder
    for builder in (
        *(llava, llava_next, llava_onevision, qwen2_vl, qwen2_5_vl, qwen3_vl),
        *(gemma3, idefics3, smolvlm, internvl, paligemma),
    )
}


def save_vision(family: str, folder: Path) -> Path:
    """Model and processor of a family that sees, as a folder for `clt harvest`."""
    torch.manual_seed(0)
    model, processor = VISION[family]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


TEXT: dict[str, Callable[[int], Any]] = {
    "llama": lambda size: text_config("Llama", size),
    "mistral": lambda size: text_config("Mistral", size, sliding_window=None),
    "qwen2": lambda size: text_config("Qwen2", size),
    "qwen3": lambda size: text_config("Qwen3", size, head_dim=20),
    "gemma2": lambda size: text_config("Gemma2", size, head_dim=20, query_pre_attn_scalar=20),
    "gemma3_text": lambda size: text_config("Gemma3Text", size, head_dim=20, sliding_window=64),
    "gpt2": lambda size: text_config("GPT2", size, n_positions=2048),
    "gpt_neox": lambda size: text_config("GPTNeoX", size, use_parallel_residual=True),
    "phi": lambda size: text_config("Phi", size),
    "mixtral": lambda size: text_config("Mixtral", size, num_local_experts=4),
    "qwen2_moe": lambda size: text_config(
        "Qwen2Moe",
        size,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    "gpt_oss": lambda size: text_config("GptOss", size, num_local_experts=4, head_dim=20),
    "olmo2": lambda size: text_config("Olmo2", size),
    "bloom": lambda size: text_config("Bloom", size, n_head=4),
    "opt": lambda size: text_config("OPT", size, ffn_dim=96, word_embed_proj_dim=WIDTH),
}
"""Configs of language models, by vocabulary."""


def save_text(family: str, folder: Path) -> Path:
    """A language model with tiny's tokenizer."""
    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizer([])
    transformers.AutoModelForCausalLM.from_config(TEXT[family](len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def full_size_processors() -> dict[str, tuple[Any, str]]:
    """By name: a processor as the published models have it, but for the vocabulary, and its placeholder."""
    next_images = transformers.LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size=square(336))
    return {
        "LLaVA-NeXT": (
            transformers.LlavaNextProcessor(
                image_processor=next_images,
                tokenizer=tokenizer_for("llava_next"),
                patch_size=14,
                vision_feature_select_strategy="default",
                num_additional_image_tokens=1,
            ),
            "<image>",
        ),
        "LLaVA-OneVision": (
            pictures_only(transformers.LlavaOnevisionProcessor)(
                transformers.LlavaOnevisionImageProcessorPil(),
                tokenizer_for("llava_onevision"),
                num_image_tokens=729,
                vision_feature_select_strategy="full",
            ),
            "<image>",
        ),
        "Idefics3": (
            transformers.Idefics3Processor(
                transformers.Idefics3ImageProcessorPil(), tokenizer_for("idefics3"), image_seq_len=169
            ),
            "<image>",
        ),
        "InternVL with 12 tiles": (
            pictures_only(transformers.InternVLProcessor)(
                transformers.GotOcr2ImageProcessorPil(size=square(448), crop_to_patches=True),
                tokenizer_for("internvl"),
                image_seq_length=256,
            ),
            "<IMG_CONTEXT>",
        ),
        "Qwen2-VL": (
            pictures_only(transformers.Qwen2VLProcessor)(
                transformers.Qwen2VLImageProcessorPil(), tokenizer_for("qwen")
            ),
            "<|image_pad|>",
        ),
    }
