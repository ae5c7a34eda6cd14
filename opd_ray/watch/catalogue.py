"""Every metric by name: its unit, what it means, and which alerts watch it.

The report's charts, Grafana's panels and the table of metrics in cluster/grafana/README.md are made from it. ``*`` in a
name stands for a room, a source of rollouts, a set of problems or a term of the loss; names are the same in
TensorBoard, in metrics.jsonl and (as :func:`opd_ray.watch.metrics.port_name`) on the port.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

Unit = Literal["share", "nats", "tokens", "tokens/s", "s", "bytes", "steps", "versions", "number", "factor"]


@dataclass(frozen=True)
class Metric:
    name: str
    unit: Unit
    """``number`` counts things, ``factor`` has no unit."""
    meaning: str
    """Goes on where "this is" left off."""
    alerts: str = ""
    """Names in cluster/grafana/alerts.yaml."""


_ROLLOUTS = (
    Metric("rollouts/accuracy", "share", "training rollouts that are right", "OpdCollapse"),
    Metric("rollouts/verify_timeouts", "number", "answers whose verdict was given up, which count as wrong"),
    Metric("rollouts/truncation_rate", "share", "rollouts that did not end within the length budget", "OpdCollapse"),
    Metric("rollouts/repetition_rate", "share", "rollouts whose tail compresses too well", "OpdCollapse"),
    Metric("rollouts/length", "tokens", "mean tokens of a rollout"),
)
_TAUGHT = (
    Metric("learner/teacher_logprob", "nats", "log π_T of the sampled tokens, their mean"),
    Metric("learner/advantage", "nats", "log π_T − log π_θ of sampled tokens: minus the reverse KL"),
    Metric("learner/advantage_repetitive", "nats", "of repetitive tokens: inflation is fed where it is higher"),
    Metric("learner/advantage_other", "nats", "of the other tokens"),
    Metric("learner/repetitive_share", "share", "share of tokens that end an n-gram seen before"),
    Metric("learner/eos_*_end", "share", "P(stop) of student or teacher where responses ended"),
    Metric("learner/eos_*_cut", "share", "P(stop) of student or teacher where responses were cut off"),
)
_ALL = (
    *_ROLLOUTS,
    Metric("rollouts/truncated_token_share", "share", "share of the tokens: the earliest alarm", "OpdLengthInflation"),
    Metric("rollouts/periodic_tail_rate", "share", "rollouts whose last tokens repeat with a period"),
    Metric("rollouts/repetition_stops", "share", "rollouts that the engine ended, for they repeated themselves"),
    Metric("rollouts/tokens", "tokens", "all that the student sampled for the step"),
    Metric("rollouts/saved_tokens", "tokens", "what those would have sampled up to budget or horizon, in the step"),
    Metric("rollouts/horizon", "tokens", "after which rollouts but the probes were cut off"),
    Metric("rollouts/horizon_rate", "share", "rollouts that were cut off by the horizon"),
    Metric("rollouts/whole", "number", "rollouts that had the whole budget: what they come to is measured on these"),
    Metric("rollouts/length_budget", "tokens", "the most that a response may have"),
    Metric("rollouts/length_p*", "tokens", "percentiles of a rollout's tokens"),
    Metric("rollouts/behaviour_logprob", "nats", "log μ of the sampled tokens, mean of the rollouts' means"),
    *(
        replace(each, name=f"teacher_{each.name}", meaning=f"{each.meaning}; of the teacher", alerts="")
        for each in _ROLLOUTS
    ),
    Metric("staleness/mean", "versions", "weight versions between sampling and training"),
    Metric("staleness/max", "versions", "of the oldest token"),
    Metric("learner/loss", "nats", "all terms with their coefficients; nan at a step that was skipped"),
    Metric("learner/loss_*", "nats", "one term, without its coefficient"),
    Metric("learner/grad_norm", "factor", "before clipping"),
    Metric("learner/lr", "factor", "the learning rate, as scheduled"),
    Metric("learner/trained_tokens", "tokens", "response tokens of the step, of all sources"),
    Metric("learner/wait_s", "s", "the learner's waiting for rollouts"),
    Metric("learner/train_s", "s", "training"),
    Metric("learner/weight_sync_s", "s", "from the first tensor to the last receiver's answer", "OpdWeightSyncSlow"),
    Metric("learner/student_logprob", "nats", "log π_θ of the sampled tokens, their mean"),
    Metric("learner/entropy", "nats", "of the student, nats per token; near 0 it is deterministic"),
    Metric("learner/importance_ratio", "factor", "ratio π_θ/μ over the sampled tokens; 1 is on policy"),
    Metric("learner/unaligned_share", "share", "tokens that a teacher with another tokenizer has no opinion on"),
    Metric("learner/off_policy_kl", "nats", "KL(μ‖π_θ) a token, k3 estimate"),
    *_TAUGHT,
    Metric("learner/teacher_logprob_repetitive", "nats", "how far the teacher endorses repetitive tokens"),
    Metric(
        "learner/truncated_weight_share", "share", "share of the student's loss weight in rollouts that were cut off"
    ),
    Metric("learner/golden_logprob", "nats", "log π_θ of golden tokens"),
    Metric("learner/teacher_rollout_logprob", "nats", "log π_θ of the tokens that the teacher wrote"),
    Metric("learner/reference_logprob", "nats", "log π_ref of the tokens that the KL to it is taken over"),
    Metric("learner/topk_overlap", "share", "|S_p ∩ S_q|/k of the student's and the teacher's most probable tokens"),
    Metric("learner/*entropy_gap", "nats", "H(student) − H(teacher) on the outcomes that are compared"),
    Metric("learner/*entropy_gate_share", "share", "tokens at which the entropy gate is open"),
    Metric("learner/*advantage_used", "nats", "the advantage as the policy gradient uses it"),
    Metric("learner/trust", "share", "min(π_T/π_θ, 1) of the sampled token, mean (TrOPD)"),
    Metric("learner/*advantage_clip_fraction", "share", "tokens whose advantage was clipped"),
    Metric("learner/*clip_fraction", "share", "tokens whose ratio was clipped"),
    Metric("learner/capped_share", "share", "tokens whose importance weight was capped"),
    Metric("learner/masked_share", "share", "tokens that the importance correction left out"),
    Metric("mixture/*_rollouts", "number", "rollouts of a source in the step"),
    Metric("mixture/teacher_left_out", "number", "rollouts of the teacher that its filter took out of the step"),
    Metric("mixture/taught_by_*_share", "share", "prompts that evidence leaves to teacher, golden or reward"),
    Metric("mixture/teacher_right_share", "share", "the teacher's verdicts on the step's prompts, their mean"),
    Metric("mixture/*_coef", "factor", "weights of the terms; the guard raises golden and reference"),
    Metric("queue/slots_taken", "number", "prompts under way"),
    Metric("queue/buffer_slots", "number", "prompts whose rollouts wait for the learner"),
    Metric("queue/*_calls", "number", "queued ones included: the room with many is the bottleneck"),
    Metric("throughput/tokens_per_s", "tokens/s", "response tokens of the student that were trained on"),
    Metric("throughput/step_s", "s", "the whole step", "OpdTrainingStalled, OpdStepSlow, OpdWeightSyncSlow"),
    Metric("idle/*", "share", "share of the time without work", "OpdLearnerStarving"),
    Metric("evaluation/*/accuracy_sampled", "share", "avg@k of a set: sampled answers that are right"),
    Metric("evaluation/*/accuracy_sampled_se", "share", "standard error of a set's avg@k, over its problems"),
    Metric("evaluation/*/accuracy_greedy", "share", "of a set, temperature 0"),
    Metric("evaluation/*/pass_at_*", "share", "problems of a set that one of so many sampled answers solves"),
    Metric("evaluation/*/truncation_rate", "share", "sampled answers to a set without EOS"),
    Metric("evaluation/*/mean_length", "tokens", "of the sampled answers to a set"),
    Metric("evaluation/accuracy_greedy", "share", "held out, temperature 0"),
    Metric("evaluation/accuracy_sampled", "share", "held out, sampled; of several sets the mean"),
    Metric("evaluation/accuracy_sampled_se", "share", "its standard error, over problems"),
    Metric("evaluation/truncation_rate", "share", "held-out sampled answers without EOS"),
    Metric("evaluation/repetition_rate", "share", "held-out sampled answers that repeat themselves"),
    Metric("evaluation/mean_length", "tokens", "held out, sampled"),
    Metric("evaluation/num_problems", "number", "problems of the evaluation"),
    Metric("evaluation/length_p*", "tokens", "percentiles, held out, sampled"),
    Metric("evaluation/truncated_token_share", "share", "share of the sampled tokens that are in truncated answers"),
    Metric("evaluation/student_logprob", "nats", "log π_θ of the sampled tokens, their mean"),
    *(
        replace(each, name=each.name.replace("learner", "evaluation"), meaning=f"{each.meaning}; held out")
        for each in _TAUGHT
    ),
    Metric("guard/events", "number", "what the guard said after the step"),
    Metric("run/step", "steps", "finished optimizer steps", "OpdTrainingStalled, OpdRunVanished, OpdCheckpointOld"),
    Metric("run/steps", "steps", "planned optimizer steps", "OpdTrainingStalled, OpdRunVanished"),
    Metric("run/since_step_s", "s", "since the last step; grows while nothing is learned", "OpdTrainingStalled"),
    Metric("run/guard_events", "number", "running count since this start of the run", "OpdGuardEvents"),
    Metric("pool/*_ready", "number", "workers that take calls", "OpdPoolBelowMinimum"),
    Metric("pool/*_starting", "number", "placed or waiting to be placed; many and long: no nodes"),
    Metric("pool/*_minimum", "number", "a room below it for recovery.below_min_s ends the run", "OpdPoolBelowMinimum"),
    Metric("restarts/total", "number", "workers lost and replaced over the whole run", "OpdRestartStorm"),
    Metric("restarts/*", "number", "workers of a room lost and replaced over the whole run"),
    Metric("recovery/lost_payloads", "number", "objects gone with a node, made again; running count"),
    Metric("recovery/restores", "number", "times that the run went back to a snapshot", "OpdRestoredAgain"),
    Metric("recovery/reissued_calls", "number", "calls given to another worker; running count"),
    Metric("weights/bytes", "bytes", "sent to each receiver by one broadcast: of adapters, these alone"),
    Metric("weights/group_size", "number", "processes in the transfer group, the learner included"),
    Metric("weights/rebuilds", "number", "times that the transfer group was made anew"),
    Metric("weights/failed_broadcasts", "number", "broadcasts that ended without all members", "OpdWeightSyncFailed"),
    Metric("servers/*_in_use", "number", "servers of a teacher's url that are asked; the others rest or are out"),
    Metric("servers/*_distance", "nats", "mean distance of log-probs that should be alike: of two servers, or in time"),
    Metric("checkpoint/failed_writes", "number", "running count; tried again", "OpdCheckpointFails"),
    Metric("checkpoint/skipped", "number", "due and never written: running count", "OpdSnapshotsSkipped"),
    Metric("checkpoint/step", "steps", "step of the newest complete checkpoint", "OpdCheckpointOld"),
    Metric("checkpoint/write_s", "s", "writing a checkpoint; the loop goes on meanwhile"),
    Metric("checkpoint/bytes", "bytes", "size of one checkpoint"),
    Metric("driver/memory_bytes", "bytes", "what the driver's process holds"),
    Metric("driver/memory_share", "share", "of what its machine or container has", "OpdDriverMemory"),
)
METRICS = {metric.name: metric for metric in _ALL}


def metric(name: str) -> Metric | None:
    """That of a name, or of the pattern that it is of; None for one that the table does not have."""
    return METRICS.get(name) or next((each for each in _ALL if fnmatchcase(name, each.name)), None)
