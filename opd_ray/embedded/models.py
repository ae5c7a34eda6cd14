"""The small models of the embedded default: how they look, how they are trained, what is measured on them.

Teacher and student are ordinary `Qwen3ForCausalLM` models over the twenty-token vocabulary of
`opd_ray.tasks.chain`, so transformers, vLLM and DeepSpeed treat them like any other checkpoint.  Both
learn on one CPU core from texts drawn on the fly, train split only:

    teacher   clean solutions, then self-correcting ones, then a few looping ones: it solves nearly every
              problem, doubts itself now and then, and once text repeats, it copies on
    student   clean solutions until it is right in about 2 of 5 answers, then a little self-correction

A second teacher learns the same from the same texts in another alphabet, PAIRS, whose tokens are two characters
wherever a sign stands before a digit: one whose token ids mean nothing to the student.

Muon on the matrices inside the blocks makes the phase transition of modular arithmetic come after 100 to 250
steps on every seed; with AdamW it took 300 to over 1,000.  https://kellerjordan.github.io/posts/muon/

This module knows no files but the checkpoint directory it is asked to write, and nothing of the loop.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from opd_ray.models.checkpoints import save_model
from opd_ray.progress import Report
from opd_ray.tasks import chain
from opd_ray.tasks.chain import Chains, Problem, Text

PAD, EOS = "<|pad|>", "<|eos|>"
CHARACTERS = "0123456789+-*^=;#?"
HEAD_SIZE = 32  # vLLM's attention on CPUs refuses a smaller one
IGNORED = -100  # label of a token that does not enter the loss


@dataclass(frozen=True)
class Alphabet:
    """The tokens that texts are made of: PAD, EOS, each character, and pairs of characters that are one token wherever
    they stand side by side. No pair ends with a character that another one begins with, so that order is no matter."""

    pairs: tuple[str, ...] = ()

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        return {token: index for index, token in enumerate((PAD, EOS, *CHARACTERS, *self.pairs))}

    def tokens(self, text: str) -> list[str]:
        """What the text is made of, in order."""
        return self._pattern.findall(text)

    def ids(self, text: str) -> list[int]:
        return [self.vocabulary[token] for token in self.tokens(text)]

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join([*map(re.escape, self.pairs), "."]))


SINGLE = Alphabet()
PAIRS = Alphabet(tuple(f"{sign}{digit}" for sign in "+-*=;#?" for digit in range(chain.MODULUS)))
VOCABULARY = SINGLE.vocabulary
PAD_ID, EOS_ID = VOCABULARY[PAD], VOCABULARY[EOS]  # of every alphabet


@dataclass(frozen=True)
class Phase:
    """A stretch of supervised training on one mixture of texts."""

    num_steps: int
    mixture: tuple[float, float, float]
    """Shares of clean, self-correcting and looping texts; they add up to 1."""
    lr: tuple[float, float]
    """Muon's learning rate at the first and the last step, linear between."""
    share_of_doubt: float = 0.0
    """Of the tries that self-correcting texts redo, so many were right."""


TEACHER_WIDTH, TEACHER_LAYERS = 64, 3
TEACHER_CLEAN = Phase(350, (1.0, 0.0, 0.0), (0.015, 0.0015))
TEACHER_CHECKING = Phase(1000, (0.3, 0.7, 0.0), (0.005, 0.005))  # at most: it ends at TEACHER_SEES_ERRORS
TEACHER_LOOPING = Phase(150, (0.3, 0.6, 0.1), (0.005, 0.0), share_of_doubt=0.25)
TEACHER_SEES_ERRORS = 0.95  # mean probability of ``?`` after a wrong digit
LONGER_TEACHER = Phase(200, (0.3, 0.6, 0.1), (0.005, 0.0), share_of_doubt=0.25)


@dataclass(frozen=True)
class Student:
    """How a student looks and learns."""

    width: int
    num_layers: int
    target: float
    """Mean probability of the clean solution on validation problems at which the clean phase ends."""
    clean: Phase = Phase(600, (1.0, 0.0, 0.0), (0.01, 0.01))
    """At most so many steps."""
    mixed: Phase = Phase(60, (0.7, 0.3, 0.0), (0.003, 0.0))


STUDENTS = {chain.SHORT: Student(48, 2, target=0.35), chain.LONG: Student(64, 3, target=0.06)}
MAX_PROMPT_TOKENS = 48  # a longest one has 8 or 12; one with its solution before it (`privileged_prompt`) 27 or 43
BATCH_SIZE = 64
WARMUP_STEPS = 20
ADAM_LR_RATIO = 0.4  # AdamW's learning rate (embeddings, head, norms) in units of Muon's


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch on one thread: for matrices this small a second one made everything 3 to 50 times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def context_tokens(chains: Chains) -> int:
    """Longest prompt and response of a model on these chains."""
    return chains.max_new_tokens + MAX_PROMPT_TOKENS


def make_tokenizer(chains: Chains = chain.SHORT, alphabet: Alphabet = SINGLE) -> PreTrainedTokenizerFast:
    """A real tokenizer.json that AutoTokenizer and vLLM load: BPE where characters are merged."""
    if alphabet.pairs:
        tokenizer = Tokenizer(models.BPE(alphabet.vocabulary, [(*pair,) for pair in alphabet.pairs], unk_token=PAD))
    else:
        tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=PAD))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, model_max_length=context_tokens(chains)
    )


def make_model(
    width: int, num_layers: int, seed: int, chains: Chains = chain.SHORT, alphabet: Alphabet = SINGLE
) -> Qwen3ForCausalLM:
    """A freshly initialised model with two heads; the caller's random state stays as it was."""
    config = Qwen3Config(
        vocab_size=len(alphabet.vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=HEAD_SIZE,
        max_position_embeddings=context_tokens(chains),
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def save(model: Qwen3ForCausalLM, directory: Path, chains: Chains = chain.SHORT, alphabet: Alphabet = SINGLE) -> None:
    """Writes an ordinary Hugging Face checkpoint: config, generation config, safetensors, tokenizer."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        max_new_tokens=chains.max_new_tokens,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    transformers_logging.disable_progress_bar()  # one shard in a millisecond: its bar breaks ours
    save_model(model, directory)
    make_tokenizer(chains, alphabet).save_pretrained(directory)


def build_teacher(seed: int, report: Report, alphabet: Alphabet = SINGLE) -> Qwen3ForCausalLM:
    """Trains a teacher from nothing; about four minutes of one core.

    To check a step takes a second phase transition, long after the first; a teacher that stops before it
    redoes right and wrong steps alike.  So the second phase ends on a measurement.
    """
    model = make_model(TEACHER_WIDTH, TEACHER_LAYERS, seed, alphabet=alphabet)
    trainer = Trainer(model, random.Random(seed), alphabet=alphabet)
    validation = chain.draw_distinct(random.Random("teacher stop"), "validation", 128)
    for step, _ in enumerate(trainer.run(TEACHER_CLEAN), start=1):
        report("the teacher learns to calculate", step, TEACHER_CLEAN.num_steps)
    for step, _ in enumerate(trainer.run(TEACHER_CHECKING), start=1):
        if step % 25 == 0:
            _, seen = copy_probe(trainer.model, validation, num_tries=0, right=False, alphabet=alphabet)
            report("the teacher learns to check", int(100 * seen), 100)
            if seen >= TEACHER_SEES_ERRORS:
                break
    for step, _ in enumerate(trainer.run(TEACHER_LOOPING), start=1):
        report("the teacher learns to copy", step, TEACHER_LOOPING.num_steps)
    return trainer.model


def load(directory: Path) -> Qwen3ForCausalLM:
    """A checkpoint that `save` wrote."""
    transformers_logging.disable_progress_bar()
    return Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)


def save_with_other_end(teacher: Path, directory: Path) -> None:
    """Writes the teacher as it were had it been taught to end with the token that pads, as base models of some families
    do: the two tokens' rows are exchanged in the embeddings and in the head."""
    model = load(teacher)
    with torch.no_grad():
        for matrix in (model.model.embed_tokens.weight, model.lm_head.weight):
            matrix[[PAD_ID, EOS_ID]] = matrix[[EOS_ID, PAD_ID]]
    model.config.eos_token_id = model.generation_config.eos_token_id = PAD_ID
    save_model(model, directory)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(teacher, local_files_only=True)
    tokenizer.eos_token = PAD
    tokenizer.save_pretrained(directory)


def lengthen(teacher: Qwen3ForCausalLM, report: Report) -> Qwen3ForCausalLM:
    """The shipped teacher of short chains, taught long ones; about a minute of one core."""
    model = make_model(TEACHER_WIDTH, TEACHER_LAYERS, 0, chain.LONG)
    model.load_state_dict(teacher.state_dict())
    for step, _ in enumerate(Trainer(model, random.Random(0), chain.LONG).run(LONGER_TEACHER), start=1):
        report("the teacher learns longer chains", step, LONGER_TEACHER.num_steps)
    return model


def build_student(seed: int, report: Report, chains: Chains = chain.SHORT) -> Qwen3ForCausalLM:
    """Trains the student of ``seed`` from nothing; 10 to 20 seconds of one core.

    When the model begins to add and multiply is luck, so the clean phase ends on a measurement, not after a
    number of steps.  What is measured is the mean probability of the clean solution, by teacher forcing:
    one forward pass without sampling noise.  At that point accuracy is a little higher: wrong ways may
    end in the right digit.
    """
    student = STUDENTS[chains]
    trainer = Trainer(make_model(student.width, student.num_layers, seed, chains), random.Random(seed), chains)
    validation = chain.draw_distinct(random.Random("student stop"), "validation", 256, chains)
    reached = 0.0
    for step, _ in enumerate(trainer.run(student.clean)):
        if step % 5 == 0:
            reached = solution_probability(trainer.model, validation)
            if reached >= student.target:
                break
        # The share of the way to the target; the number of steps is not known before.
        report("training the student", int(80 * reached / student.target), 100)
    for step, _ in enumerate(trainer.run(student.mixed), start=1):
        report("training the student", 80 + 20 * step // student.mixed.num_steps, 100)
    return trainer.model


class Trainer:
    """Supervised training on texts drawn from the train split; one model, one random stream."""

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        rng: random.Random,
        chains: Chains = chain.SHORT,
        alphabet: Alphabet = SINGLE,
    ) -> None:
        self.model = model
        self._chains, self._alphabet = chains, alphabet
        self._rng = rng
        blocks = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("model.layers.")]
        in_blocks = {id(p) for p in blocks}
        others = [p for p in model.parameters() if id(p) not in in_blocks]
        self._muon = torch.optim.Muon(blocks, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self._adam = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
        self._num_steps = 0

    def run(self, phase: Phase) -> Iterator[None]:
        """Trains one step for each item taken."""
        for step in range(phase.num_steps):
            self._num_steps += 1
            first, last = phase.lr
            lr = first + (last - first) * step / phase.num_steps
            self._step(phase, lr * min(1.0, self._num_steps / WARMUP_STEPS))
            yield

    @one_thread()
    def _step(self, phase: Phase, lr: float) -> None:
        problems = [chain.draw_problem(self._rng, "train", self._chains) for _ in range(BATCH_SIZE)]
        texts = [(problem, self._draw_text(problem, phase)) for problem in problems]
        tokens, labels = to_batch(texts, self._alphabet)
        loss = cross_entropy(_logits(self.model, tokens).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, optimizer_lr in ((self._muon, lr), (self._adam, lr * ADAM_LR_RATIO)):
            optimizer.param_groups[0]["lr"] = optimizer_lr
            optimizer.step()
            optimizer.zero_grad()

    def _draw_text(self, problem: Problem, phase: Phase) -> Text:
        clean, self_correcting, _ = phase.mixture
        point = self._rng.random()
        if point < clean:
            return chain.clean_text(problem)
        if point < clean + self_correcting:
            return chain.self_correcting_text(problem, self._rng, phase.share_of_doubt)
        return chain.looping_text(problem, self._rng, self._chains.max_new_tokens)


def to_batch(
    examples: Sequence[tuple[Problem, Text]], alphabet: Alphabet = SINGLE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and next-token labels, both int64 of shape (batch, longest text - 1), padded on the right.

    A label is `IGNORED` on the prompt, on padding and where the text's mask leaves out a character of the token. No
    token is of prompt and response.
    """
    rows, targets = [], []
    for problem, text in examples:
        prompt, response = alphabet.ids(problem.prompt), alphabet.tokens(text.response)
        ends = list(itertools.accumulate(map(len, response)))
        scored = [all(text.loss_mask[end - len(token) : end]) for token, end in zip(response, ends, strict=True)]
        ids = [alphabet.vocabulary[token] for token in response]
        labels = [token if counts else IGNORED for token, counts in zip(ids, scored, strict=True)]
        rows.append(torch.tensor(prompt + ids + [EOS_ID] * text.finished))
        targets.append(torch.tensor([IGNORED] * len(prompt) + labels + [EOS_ID] * text.finished))
    pad = torch.nn.utils.rnn.pad_sequence
    tokens = pad(rows, batch_first=True, padding_value=PAD_ID)
    return tokens[:, :-1], pad(targets, batch_first=True, padding_value=IGNORED)[:, 1:]


@one_thread()
@torch.inference_mode()
def solution_probability(model: Qwen3ForCausalLM, problems: Sequence[Problem]) -> float:
    """Mean probability that an answer sampled at temperature 1 is exactly the clean solution, EOS included."""
    tokens, labels = to_batch([(problem, chain.clean_text(problem)) for problem in problems])
    logits = _logits(model, tokens).transpose(1, 2)
    nll = cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none").sum(dim=1)
    return torch.exp(-nll).mean().item()


@one_thread()
@torch.inference_mode()
def measure(
    model: Qwen3ForCausalLM,
    problems: Sequence[Problem],
    temperature: float,
    chains: Chains = chain.SHORT,
    alphabet: Alphabet = SINGLE,
) -> tuple[float, float]:
    """Of one answer per problem, (share that ended in EOS with the right digit after the last ``#``, share that was
    truncated); temperature 0 is greedy."""
    correct = truncated = 0
    tokenizer, task = make_tokenizer(alphabet=alphabet), chain.ChainTask()
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    in_order = sorted(problems, key=lambda problem: len(problem.prompt))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _, group in itertools.groupby(in_order, lambda problem: len(problem.prompt)):
            rows = list(group)  # prompts of one length need no padding
            prompts = torch.tensor([alphabet.ids(problem.prompt) for problem in rows])
            outputs = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=chains.max_new_tokens,
                eos_token_id=EOS_ID,
                pad_token_id=PAD_ID,
                **(sampling if temperature > 0 else {"do_sample": False}),
            )[:, prompts.shape[1] :].tolist()
            texts = tokenizer.batch_decode(outputs, skip_special_tokens=True)
            for problem, output, text in zip(rows, outputs, texts, strict=True):
                truncated += EOS_ID not in output
                correct += EOS_ID in output and task.verify(text, chain.to_row(problem))
    return correct / len(problems), truncated / len(problems)


@one_thread()
@torch.inference_mode()
def copy_probe(
    model: Qwen3ForCausalLM, problems: Sequence[Problem], num_tries: int, right: bool, alphabet: Alphabet = SINGLE
) -> tuple[float, float]:
    """What the model does where the last step was tried ``num_tries`` times already, always with one digit.

    Returns (probability of that digit once more, probability of ``?`` after it), means over the problems.  With
    ``right`` the digit is the right one, and the second number is doubt; else it is a wrong one, and the
    second number says how reliably the error is seen.
    """
    rng = random.Random(0)
    rows = []
    for problem in problems:
        *head, call = problem.calls
        value = problem.results[-1]
        digit = value if right else chain.wrong_digit(value, rng)
        steps = "".join(f"{done}{result};" for done, result in zip(head, problem.results[:-1], strict=True))
        response = steps + f"{call}{digit}?" * num_tries + f"{call}{digit}"
        rows.append(torch.tensor(alphabet.ids(problem.prompt) + alphabet.ids(response)))
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD_ID)
    probabilities = _logits(model, tokens).softmax(dim=-1)
    row, last = torch.arange(len(rows)), torch.tensor([len(each) - 1 for each in rows])
    copied = probabilities[row, last - 1, tokens[row, last]]
    again = [index for token, index in alphabet.vocabulary.items() if token.startswith("?")]
    redone = probabilities[row, last][:, again].sum(-1)
    return copied.mean().item(), redone.mean().item()


def _logits(model: Qwen3ForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Float32 logits of shape (batch, length, vocabulary).  Right padding needs no mask: attention is causal."""
    return model(input_ids=tokens, use_cache=False).logits
