"""Vision transformers to train from scratch, by name, or the config of any image classifier. None has dropout."""

from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel, ViTConfig

from .errors import ModelError

MINI = "vit-mini"
# name: layers, heads, width, inner width
SIZES = {
    MINI: (6, 8, 64, 256),
    "vit-cifar": (6, 8, 512, 512),  # layers and heads are those of arXiv 2404.00438, which does not give the widths
    "vit-small-16": (12, 6, 384, 1536),
    "vit-base-16": (12, 12, 768, 3072),
}
# name: patches a side, for images of any size; the others have patches of 16 x 16 pixels. transformers' deviation of
# 0.02 for initial weights suits a width of 768; these narrow ones hardly move for many epochs with it.
PATCHES = {MINI: 4, "vit-cifar": 8}
NAMES = tuple(SIZES)


def build_model(name: str, image_size: int, classes: list[str]) -> PreTrainedModel:
    """A freshly initialised classifier of this name, hub id or path, for square images with 3 colours."""
    config = _config(name, image_size)
    config.id2label = dict(enumerate(classes))
    config.label2id = {label: number for number, label in enumerate(classes)}
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, int) and image_size % patch:
        raise ModelError(
            f"--model {name} with images of {image_size} x {image_size}: they do not divide into patches of "
            f"{patch} x {patch}. Give --image_size {max(1, round(image_size / patch)) * patch}, or another model of "
            f"{', '.join(NAMES)}."
        )
    try:
        model: PreTrainedModel = AutoModelForImageClassification.from_config(config)
    except ValueError as error:
        raise ModelError(
            f"--model {name}: its config is a {type(config).__name__}, which is no image classifier. Give one that "
            f"is, or one of {', '.join(NAMES)}."
        ) from error
    return model


def _config(name: str, image_size: int) -> PretrainedConfig:
    if name in SIZES:
        layers, heads, width, inner = SIZES[name]
        return ViTConfig(
            num_hidden_layers=layers,
            num_attention_heads=heads,
            hidden_size=width,
            intermediate_size=inner,
            image_size=image_size,
            initializer_range=width**-0.5 if name in PATCHES else 0.02,
            patch_size=max(1, image_size // PATCHES[name]) if name in PATCHES else 16,
        )
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # the hub's client raises a different class for each of the many ways to fail
        raise ModelError(
            f"--model {name}: not one of {', '.join(NAMES)}, and no config could be loaded there: {error}"
        ) from error
    if hasattr(config, "image_size"):
        config.image_size = image_size
    return config
