"""The processor of a model that sees: turns text and pictures into its input.

Without torchvision, transformers has a processor of pictures by Pillow for each family, but none of videos,
and refuses to build what would hold one. A harvest reads no videos, so it leaves that part out.
"""

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

from transformers import AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

VIDEOS = "video_processor"


def open_processor(name: str, model_config: Any, **common: Any) -> Any:
    """AutoProcessor's, or where only its videos need torchvision, the same without them."""
    if find_spec("torchvision") is None and type(model_config) in PROCESSOR_MAPPING:
        processor: Any = PROCESSOR_MAPPING[type(model_config)]
        if VIDEOS in processor.get_attributes():
            return pictures_only(processor).from_pretrained(name, **common)
    return AutoProcessor.from_pretrained(name, **common)


def pictures_only(processor: Any) -> Any:
    """A class that is `processor` without its part for videos."""
    parts = [part for part in processor.get_attributes() if part != VIDEOS]

    def from_args_and_dict(cls: Any, /, args: Any, settings: dict[str, Any], **more: Any) -> Any:
        without = {name: value for name, value in settings.items() if name != VIDEOS}
        return super(limited, cls).from_args_and_dict(args, without, **{**more, VIDEOS: None})

    methods = {
        "get_attributes": classmethod(lambda cls: parts),
        "from_args_and_dict": classmethod(from_args_and_dict),
        VIDEOS: SimpleNamespace(num_frames=0, fps=0),  # SmolVLM asks before it renders any prompt
    }
    limited: Any = type(processor.__name__, (processor,), methods)
    return limited
