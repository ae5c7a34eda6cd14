"""The configuration of a run: frozen dataclasses, one sentence under each field.

``load`` merges defaults, a YAML file and ``section.field=value`` overrides (OmegaConf), and checks types,
ranges and names (pydantic). What needs a look outside — files, checkpoints, the cluster —
is checked by :mod:`opd_ray.run.preflight`.
"""

from opd_ray.config.binding import ROOMS, RUN
from opd_ray.config.data import (
    EMBEDDED,
    EMBEDDED_PAIRS,
    EMBEDDED_STUDENTS,
    EMBEDDED_TEACHERS,
    HELD_OUT,
    MISLED,
    OTHER_END,
    DataConfig,
    EvaluationSet,
    MetricsConfig,
    Sources,
    listed,
    set_field,
    written,
)
from opd_ray.config.learner import LearnerConfig
from opd_ray.config.loading import (
    FieldDoc,
    check_form,
    describe,
    describe_absent,
    differences,
    from_dict,
    leaves,
    load,
    merged,
    to_dict,
    to_yaml,
)
from opd_ray.config.method import AdvantageConfig, ImportanceConfig, LossConfig, ReferenceTermConfig, TermConfig
from opd_ray.config.runtime import CheckpointConfig, ElasticConfig, GuardConfig, RecoveryConfig
from opd_ray.config.sections import (
    STUDENT,
    LoraConfig,
    RepetitionConfig,
    RolloutConfig,
    ScorerConfig,
    TeacherConfig,
)
from opd_ray.config.whole import Config
