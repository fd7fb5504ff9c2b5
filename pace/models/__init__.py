"""Models: checkpoints on disk, and the architectures that run them."""

from importlib import import_module
from math import prod

from pace.errors import ModelError
from pace.ops import OperatorConfig
from pace.ops.registry import Dtype
from pace.reference.arrays import bfloat16, float32

from .base import Model
from .checkpoint import Checkpoint, open_checkpoint
from .config import Config
from .images import ImageProcessor
from .rope import longest_text
from .weights import Survey, Weights

__all__ = ["MODELS", "Checkpoint", "Model", "images_of", "load_model", "max_positions", "open_checkpoint"]

# model_type → the class, in the module of that name.
MODELS = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}

DTYPES: dict[str, Dtype] = {"bfloat16": bfloat16, "float32": float32}


def load_model(
    checkpoint: Checkpoint, dtype: str = "auto", operators: OperatorConfig | None = None, progress: bool = False
) -> Model:
    """A checkpoint's model, its weights packed in `dtype`: bfloat16, float32, or auto for the checkpoint's own."""
    architecture, config = architecture_of(checkpoint), Config(checkpoint.config)
    stored, operators = choose_dtype(dtype, checkpoint), operators or OperatorConfig()
    with Survey(checkpoint, stored, operators) as survey:
        architecture(config, survey)
    with Weights(checkpoint, stored, operators, progress) as weights:
        return architecture(config, weights)


def max_positions(checkpoint: Checkpoint) -> int:
    """Of the longest text, known without the weights."""
    return longest_text(architecture_of(checkpoint).usual(Config(checkpoint.config)))


def images_of(checkpoint: Checkpoint) -> ImageProcessor | None:
    """What the model wants of images, known without the weights; None where it takes none."""
    return architecture_of(checkpoint).processor(Config(checkpoint.config))


def architecture_of(checkpoint: Checkpoint) -> type[Model]:
    """The class of its model_type. ModelError where there is none."""
    kind = checkpoint.config.get("model_type")
    if kind not in MODELS:
        raise ModelError(f"model_type in {checkpoint.path} is {kind!r}; supported are {', '.join(sorted(MODELS))}")
    architecture: type[Model] = getattr(import_module(f"pace.models.{kind}"), MODELS[kind])
    return architecture


def choose_dtype(asked: str, checkpoint: Checkpoint) -> Dtype:
    """float32 for a float32 checkpoint, bfloat16 for any other, unless one is asked for.

    A checkpoint is what it says, or else what its largest tensor (the embedding) is.
    """
    if asked in DTYPES:
        return DTYPES[asked]
    if asked != "auto":
        raise ValueError(f"dtype is {asked!r}; it must be auto, {' or '.join(DTYPES)}")
    declared = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if declared is None:
        largest = max(checkpoint.names(), key=lambda name: prod(checkpoint.shape(name)), default=None)
        declared = "float32" if largest is not None and checkpoint.dtype(largest) == float32 else "bfloat16"
    return float32 if declared == "float32" else bfloat16
