"""Typed, validated configuration. Recipes in recipes/*.toml are instances of `RunConfig`."""

from emd_fast.config.docs import Entry, Table, markdown, tables
from emd_fast.config.emd import EMDConfig, StepSize
from emd_fast.config.recipes import load, recipes
from emd_fast.config.run import (
    EvaluationConfig,
    FashionConfig,
    MixtureConfig,
    PretrainedConfig,
    RunConfig,
    TeacherConfig,
)
from emd_fast.config.sections import (
    AdapterConfig,
    AverageConfig,
    ComputeConfig,
    OptimizerConfig,
    ParallelismConfig,
    TimeDistribution,
)
from emd_fast.config.settings import Change, ConfigError, forbidden_change
from emd_fast.config.tables import flatten, from_dict, nearest, to_dict, validate

__all__ = [
    "AdapterConfig",
    "AverageConfig",
    "Change",
    "ComputeConfig",
    "ConfigError",
    "EMDConfig",
    "Entry",
    "EvaluationConfig",
    "FashionConfig",
    "MixtureConfig",
    "OptimizerConfig",
    "ParallelismConfig",
    "PretrainedConfig",
    "RunConfig",
    "StepSize",
    "Table",
    "TeacherConfig",
    "TimeDistribution",
    "flatten",
    "forbidden_change",
    "from_dict",
    "load",
    "markdown",
    "nearest",
    "recipes",
    "tables",
    "to_dict",
    "validate",
]
