"""Hugging Face checkpoints: what one says about itself without loading its weights, and loading them.

Preflight compares the facts of student, teacher and reference. Every failure is an InputError of one
line that begins with the configuration field the checkpoint came from, as ``teacher.path=/some/where``.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_ray.config import STUDENT, Config, ScorerConfig
from opd_ray.errors import InputError, brief
from opd_ray.models import hub
from opd_ray.models.hub import local_directory
from opd_ray.models.size import ModelSize, size_of
from opd_ray.models.weights import check_files, check_names, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What configurations of transformers call the experts of a layer."""
_MARKUP = re.compile(r"<.+>|\[.+\]", re.DOTALL)


@dataclass(frozen=True)
class ModelFacts:
    """One checkpoint: what must agree between models that score each other's tokens."""

    name: str
    """Where it was configured and what as: "student.path=/checkpoints/student"."""
    vocab_size: int
    """Width of the output layer."""
    eos_token_ids: tuple[int, ...]
    """Every token that ends a response; the tokenizer's own EOS comes first."""
    context_tokens: int | None
    """Longest sequence by its configuration; None where it sets no limit."""
    size: ModelSize = field(repr=False, compare=False)
    num_experts: int
    """Of a layer; 1 where the model is dense."""
    tokenizer: Any = field(repr=False, compare=False)


def inspect(config_field: str, path: str, *, weights: bool = True) -> ModelFacts:
    """Facts of the checkpoint directory or model of the Hub ``path``; InputError if it is missing, incomplete or
    unreadable.

    Without ``weights``, tokenizer and configuration are enough.
    """
    return _facts(config_field, locate(f"{config_field}={path}", path, weights=weights))


def _facts(config_field: str, path: str) -> ModelFacts:
    """Of a checkpoint that is there."""
    name = f"{config_field}={path}"
    try:
        directory = local_directory(path, weights=False)
    except InputError as error:  # which begins with the path
        raise InputError(f"{config_field}={error}") from None
    _check_directory(name, directory, weights=False)
    from transformers import GenerationConfig

    try:
        config = read_config(path).get_text_config()
        tokenizer = load_tokenizer(path)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, … by the kind of damage
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{name}: brings code of its own, which opd_ray does not run; give a checkpoint whose architecture and "
                "tokenizer transformers has"
            ) from None
        raise InputError(f"{name}: not a checkpoint that transformers can read ({brief(error)})") from None
    try:
        generation = GenerationConfig.from_pretrained(directory)
    except OSError as error:
        if (directory / "generation_config.json").exists():
            raise InputError(f"{name}: generation_config.json is damaged ({brief(error)}); mend or remove it") from None
        generation = None  # the file is optional: config.json then says what EOS is
    eos = _eos_ids(name, generation, config, tokenizer)
    largest = max(tokenizer.get_vocab().values())
    if max(largest, *eos) >= config.vocab_size:
        raise InputError(
            f"{name}: its tokenizer or EOS has token id {max(largest, *eos)}, but config.json gives the model "
            f"vocab_size {config.vocab_size}; use the tokenizer the model was trained with"
        )
    return ModelFacts(
        name=name,
        vocab_size=config.vocab_size,
        eos_token_ids=eos,
        context_tokens=getattr(config, "max_position_embeddings", None),
        size=size_of(config, path),
        num_experts=max(getattr(config, name, None) or 1 for name in _EXPERTS),
        tokenizer=tokenizer,
    )


def used(config: Config) -> dict[str, ScorerConfig]:
    """Every model that a run asks for besides the student, by its role: the scorers, and a teacher that writes."""
    return {"teacher": config.teacher, **config.scorers} if config.buffer.has_teacher_write else config.scorers


def is_loaded(config: Config, role: str) -> bool:
    """The models of servers are elsewhere; but a teacher that writes rollouts is loaded here as well."""
    return not used(config)[role].url or (role == "teacher" and config.buffer.has_teacher_write)


def locate_models(config: Config) -> dict[str, str]:
    """Checks that every model that a run loads is there, and complete: in no time, where a tokenizer takes seconds.
    Returns the commits of those of the Hub: what they are called in the configuration, and org/name@COMMIT."""
    asked = {config.student.path: ("student.path", True)}
    for role, scorer in used(config).items():
        if scorer.path != STUDENT:
            name, weights = asked.get(scorer.path, (f"{field_of(config, role)}.path", False))
            asked[scorer.path] = (name, weights or is_loaded(config, role))
    found = {path: locate(f"{name}={path}", path, weights=weights) for path, (name, weights) in asked.items()}
    return {path: its for path, its in found.items() if its != path}


def inspect_run(config: Config) -> dict[str, ModelFacts]:
    """Facts of every model that a run loads, which are all there: "student", the scorers by role, and a teacher that
    writes rollouts."""
    student = _facts("student.path", config.student.path)
    if lora := config.student.lora:
        student = dataclasses.replace(student, size=student.size.with_adapters(lora))
    found = {"student": student}
    for role, scorer in used(config).items():
        name = f"{field_of(config, role)}.path"
        if scorer.path in (config.student.path, STUDENT):
            found[role] = dataclasses.replace(student, name=f"{name}={config.student.path}")
        else:
            found[role] = _facts(name, scorer.path)
    return found


def field_of(config: Config, role: str) -> str:
    """The configuration section of a role: "teacher", "more_teachers.code", "reference"."""
    return f"more_teachers.{role}" if role in config.more_teachers else role


def load_causal_lm(path: str | Path, **options: Any) -> Any:
    """The model in ``path``; refuses weights that are incomplete, which transformers would fill with noise."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, found = AutoModelForCausalLM.from_pretrained(
        local_directory(path), output_loading_info=True, trust_remote_code=False, use_safetensors=True, **options
    )
    if missing := sorted(found["missing_keys"]):
        raise InputError(
            f"{path}: its weights lack {len(missing)} of the model's parameters ({missing[0]}, ...); "
            "the files do not belong to its config.json, or were not saved whole"
        )
    return model


def read_weights(path: str) -> Iterator[tuple[str, Any]]:
    """Every tensor in the safetensors files of a checkpoint, one after another, by its name there."""
    from safetensors import safe_open

    for file in weight_files(local_directory(path)):
        with safe_open(file, framework="pt") as tensors:
            yield from ((name, tensors.get_tensor(name)) for name in tensors.keys())  # noqa: SIM118


def check_agreement(student: ModelFacts, scorer: ModelFacts) -> frozenset[int]:
    """Refuses a scorer whose ordinary token ids mean something else than the student's.

    Tokenizers are compared, not output layers: these are padded, and to different sizes within one family. Added
    tokens (chat markup, EOS) may have other names, as Qwen2.5's and DeepSeek-R1-Distill-Qwen's do; returns the ids
    of the student's tokens that the scorer reads as others, which a prompt must not contain.
    """
    if difference := disagreement(student, scorer):
        raise InputError(
            f"vocabularies differ: token {difference.token!r} is {difference.theirs} in {scorer.name} but "
            f"{difference.ours} in {student.name} (the first of {difference.number} differences, at id "
            f"{difference.at}); use models of one tokenizer"
        )
    ours, theirs = student.tokenizer.get_vocab(), scorer.tokenizer.get_vocab()
    return frozenset(id_ for _, id_ in ours.items() - theirs.items())


@dataclass(frozen=True)
class Difference:
    """The first token of ordinary text that two tokenizers do not have in common."""

    token: str
    theirs: str
    """What it is in the scorer's, "id 5" or "absent", and"""
    ours: str
    """in the student's."""
    at: int
    number: int
    """Of such tokens."""

    def __str__(self) -> str:
        return f"token {self.token!r} is {self.theirs} there, {self.ours} in the student's"


def disagreement(student: ModelFacts, scorer: ModelFacts) -> Difference | None:
    """Where the ordinary token ids of a scorer begin to mean something else than the student's; None where all mean the
    same."""
    ours, theirs = student.tokenizer.get_vocab(), scorer.tokenizer.get_vocab()
    if ours == theirs:
        return None
    our_own, their_own = ours.items() - theirs.items(), theirs.items() - ours.items()
    added, their_added = student.tokenizer.get_added_vocab(), scorer.tokenizer.get_added_vocab()
    wrong = [item for item in our_own if item[0] not in added]
    wrong += [item for item in their_own if item[0] not in their_added]
    if not wrong:
        return None
    token, id_ = min(wrong, key=lambda item: (item[1], item[0]))
    return Difference(token, _id(theirs, token), _id(ours, token), id_, len(dict(wrong)))


def eos_set(student: ModelFacts, scorers: Mapping[str, tuple[ModelFacts, Sequence[int] | None]]) -> tuple[int, ...]:
    """Every token that ends a response for one of the models, the student's own first.

    ``scorers``: role to its facts and the EOS ids that ``role.eos_token_ids`` gives instead of its checkpoint's.
    P(stop) is summed over this set (METHOD §3). Raises InputError for an id that the student's tokenizer does not
    have, or has as a token of ordinary text: summed in, it would end responses in their middle.
    """
    names = {id_: token for token, id_ in student.tokenizer.get_vocab().items()}
    found = dict.fromkeys(student.eos_token_ids)
    for role, (facts, given) in scorers.items():
        where = f"{facts.name} ends with" if given is None else f"{role}.eos_token_ids names"
        for id_ in facts.eos_token_ids if given is None else given:
            if id_ not in names:
                raise InputError(
                    f"{where} token {id_}, which the tokenizer of {student.name} does not have (its ids go to "
                    f"{max(names)}); {_other_eos(role)}"
                )
            if id_ not in found and not _is_markup(student.tokenizer, id_, names[id_]):
                raise InputError(
                    f"{where} token {id_}, which is {names[id_]!r} in {student.name}: ordinary text, no end of a "
                    f"response; {_other_eos(role)}"
                )
            found[id_] = None
    return tuple(found)


def _other_eos(role: str) -> str:
    return f"set {role}.eos_token_ids to ids of the student's that end a response, as [1]"


def ending_tokens(tokenizer: Any) -> list[int]:
    """Ids that may end a text, its special tokens first; of ordinary ones, as <br> is in many vocabularies, none."""
    added = tokenizer.added_tokens_decoder
    others = (id_ for id_ in sorted(added) if added[id_].special or _MARKUP.fullmatch(added[id_].content))
    return list(dict.fromkeys([*tokenizer.all_special_ids, *others]))


def _is_markup(tokenizer: Any, id_: int, token: str) -> bool:
    """Is it a token that may end a text: special, or written like one?"""
    added = tokenizer.added_tokens_decoder.get(id_)
    return id_ in tokenizer.all_special_ids or (added is not None and added.special) or bool(_MARKUP.fullmatch(token))


def locate(name: str, path: str, *, weights: bool = True) -> str:
    """Checks that the checkpoint is there and complete; returns ``path``, of a model of the Hub org/name@COMMIT."""
    if os.path.isdir(path):  # unlike Path.is_dir it says no to names that no file can have
        _check_directory(name, Path(path), weights)
        return path
    if os.path.exists(path):
        raise InputError(f"{name}: is a file; give the directory that has config.json and the weights")
    pinned, files = hub.pin(name, path)
    if weights:
        check_names(name, files)
    return pinned


def _check_directory(name: str, directory: Path, weights: bool) -> None:
    if not (directory / "config.json").is_file():
        raise InputError(f"{name}: has no config.json; give a directory that save_pretrained wrote")
    if not any((directory / file).is_file() for file in _TOKENIZER_FILES):
        raise InputError(f"{name}: has no tokenizer (tokenizer.json); save the model's tokenizer beside its weights")
    if weights:
        check_files(name, directory)


def _eos_ids(name: str, generation: Any, config: Any, tokenizer: Any) -> tuple[int, ...]:
    for source in (generation, config):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            ids = dict.fromkeys(found if isinstance(found, list | tuple) else [found])
            if not ids or not all(type(each) is int and each >= 0 for each in ids):
                raise InputError(f"{name}: its eos_token_id is {found!r}, expected a token id or several")
            return tuple(sorted(ids, key=lambda id_: id_ != tokenizer.eos_token_id))
    raise InputError(f"{name}: neither generation_config.json nor config.json has eos_token_id; set it")


def _id(vocabulary: Mapping[str, int], token: str) -> str:
    return f"id {vocabulary[token]}" if token in vocabulary else "absent"


def read_config(path: str | Path) -> Any:
    """Its config.json. Outright without code of the checkpoint's own: transformers would ask at the terminal."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(local_directory(path, weights=False), trust_remote_code=False)


def load_tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(local_directory(path, weights=False), trust_remote_code=False)
    # Lengths are checked where all limits are known; a warning of one of them would stand beside that refusal.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def save_model(model: Any, directory: Path, **options: Any) -> None:
    """``save_pretrained``, which imports DeepSpeed where accelerate is installed; that would guess its accelerator and
    warn of the guess."""
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    model.save_pretrained(directory, **options)


def load_model(path: str, dtype: str, device: str | None) -> PreTrainedModel:
    """The frozen model in ``path``; ``device`` defaults to a GPU if there is one."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_causal_lm(path, dtype=getattr(torch, dtype))
    return model.to(device).eval().requires_grad_(False)
