"""Settings of a run: typed and validated, from YAML files and the command line."""

from omni.config.load import load_config, parse_config, shipped_configs
from omni.config.settings import (
    AugmentConfig,
    Config,
    DataConfig,
    EncoderConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SourceConfig,
    TaskConfig,
    TokenizerConfig,
    TrainConfig,
)

__all__ = [
    "AugmentConfig",
    "Config",
    "DataConfig",
    "EncoderConfig",
    "EvalConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "SourceConfig",
    "TaskConfig",
    "TokenizerConfig",
    "TrainConfig",
    "load_config",
    "parse_config",
    "shipped_configs",
]
