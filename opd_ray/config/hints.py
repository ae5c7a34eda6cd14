"""What a field that there is not may have meant: one of ours, under the name that other trainers have for it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from opd_ray.errors import near

_ELSEWHERE = {
    "learning_rate": "learner.lr",
    "lr_scheduler_type": "learner.lr_schedule",
    "max_steps": "learner.steps",
    "num_steps": "learner.steps",
    "total_steps": "learner.steps",
    "max_grad_norm": "learner.gradient_clip",
    "grad_clip": "learner.gradient_clip",
    "betas": "learner.adam_betas",
    "zero": "learner.zero_stage",
    "batch_size": "buffer.prompts_per_step",
    "train_batch_size": "buffer.prompts_per_step",
    "num_generations": "rollout.responses_per_prompt",
    "group_size": "rollout.responses_per_prompt",
    "n": "rollout.responses_per_prompt",
    "max_tokens": "rollout.max_response_tokens",
    "max_new_tokens": "rollout.max_response_tokens",
    "max_completion_length": "rollout.max_response_tokens",
    "max_response_length": "rollout.max_response_tokens",
    "max_length": "student.max_context_tokens",
    "max_model_len": "student.max_context_tokens",
    "lora_rank": "student.lora.rank",
    "lora_r": "student.lora.rank",
    "r": "student.lora.rank",
    "lora_alpha": "student.lora.alpha",
    "target_modules": "student.lora.targets",
    "kl_coef": "loss.reference.coef",
    "kl_loss_coef": "loss.reference.coef",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "eval_steps": "evaluation.every_steps",
    "report_to": "metrics.trackers",
    "model": "student",
    "actor": "student",
    "ref": "reference",
    "optimizer": "learner",
    "optim": "learner",
    "trainer": "learner",
    "training": "learner",
    "sampling": "rollout",
    "generation": "rollout",
    "eval": "evaluation",
}
"""Names of TRL, verl, PEFT and vLLM, wherever they are given."""
_ALIKE = 0.75


def hint(unknown: str, beside: Sequence[str], every: Sequence[str]) -> str:
    """A clause for the field ``unknown``: of the names ``beside`` it, one spelled nearly like it; else the field that
    other trainers call so; else, of ``every`` field, one of that name in another section; else what is nearest."""
    leaf = unknown.rpartition(".")[2]
    leaves = {name.rpartition(".")[2]: name for name in beside}
    close = difflib.get_close_matches(leaf, leaves, n=1, cutoff=_ALIKE)
    meant = leaves[close[0]] if close else _ELSEWHERE.get(leaf)
    meant = meant or next((name for name in every if name.endswith(f".{leaf}")), None)
    return f"; did you mean '{meant}'?" if meant else near(unknown, beside)
