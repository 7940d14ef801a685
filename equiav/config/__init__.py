"""What can be set (settings.py), and how it is read (reading.py); recipes/ has named sets of values."""

from equiav.config.reading import from_dict, load, recipe_names, to_dict, to_yaml
from equiav.config.settings import (
    AUDIO_VECTOR,
    IMAGE_VECTOR,
    SIZES,
    AugmentConfig,
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    ModelSettings,
    ObjectiveConfig,
    StreamConfig,
    TrainConfig,
    require,
)

__all__ = [
    "AUDIO_VECTOR",
    "IMAGE_VECTOR",
    "SIZES",
    "AugmentConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "ModelConfig",
    "ModelSettings",
    "ObjectiveConfig",
    "StreamConfig",
    "TrainConfig",
    "from_dict",
    "load",
    "recipe_names",
    "require",
    "to_dict",
    "to_yaml",
]
