"""The configuration of a run: frozen dataclasses, one sentence under each field.

``load`` merges defaults, a YAML file and ``section.field=value`` overrides (OmegaConf), and checks types,
ranges and names (pydantic). What needs a look outside — files, checkpoints, the cluster —
is checked by :mod:`opd_ray.run.preflight`.
"""

from opd_ray.config.binding import ROOMS, RUN
from opd_ray.config.guard import GuardConfig
from opd_ray.config.loading import FieldDoc, describe, differences, from_dict, load, to_dict, to_yaml
from opd_ray.config.method import AdvantageConfig, ImportanceConfig, LossConfig, ReferenceTermConfig, TermConfig
from opd_ray.config.runtime import CheckpointConfig, DeadlineConfig, ElasticConfig, RecoveryConfig
from opd_ray.config.sections import (
    EMBEDDED,
    STUDENT,
    BufferConfig,
    DataConfig,
    EvaluationConfig,
    LearnerConfig,
    MetricsConfig,
    ReferenceConfig,
    RolloutConfig,
    ScorerConfig,
    StudentConfig,
    TeacherConfig,
    WeightsConfig,
)
from opd_ray.config.whole import Config
from opd_ray.messages import PoolSize

__all__ = [
    "EMBEDDED",
    "STUDENT",
    "AdvantageConfig",
    "ReferenceTermConfig",
    "BufferConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DeadlineConfig",
    "ElasticConfig",
    "EvaluationConfig",
    "FieldDoc",
    "GuardConfig",
    "ImportanceConfig",
    "LearnerConfig",
    "LossConfig",
    "MetricsConfig",
    "PoolSize",
    "RecoveryConfig",
    "ROOMS",
    "RUN",
    "ReferenceConfig",
    "RolloutConfig",
    "ScorerConfig",
    "StudentConfig",
    "TeacherConfig",
    "TermConfig",
    "WeightsConfig",
    "describe",
    "differences",
    "from_dict",
    "load",
    "to_dict",
    "to_yaml",
]
