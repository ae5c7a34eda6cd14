"""A teacher with another tokenizer: spans end together, ends are spans, and of what nobody knows nothing is said."""

from __future__ import annotations

import asyncio
import functools
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd_ray.config import ScorerConfig
from opd_ray.embedded import models as embedded_models
from opd_ray.embedded.models import EOS_ID, PAIRS
from opd_ray.errors import RunError
from opd_ray.messages import ScoreRequest
from opd_ray.models.texts import TokenTexts
from opd_ray.score.engine import Scores
from opd_ray.score.scorer import Scorer
from opd_ray.score.spans import readable, spans
from opd_ray.score.translation import Translation, Translator
from two_tokenizers import END, EOS, MARK, byte_level, rollouts

FACE = "🙂".encode()
STUDENT = byte_level([(b"a", b"b"), (b"\xa9", b"a"), (b" ", b"x"), (b"1", b"2"), (b"12", b"3"), (FACE[:1], FACE[1:2])])
TEACHER = byte_level(
    [
        (b"b", b"a"),
        (b"x", b" "),
        (b"\xc3", b"\xa9"),
        (b"2", b"3"),
        (b"a", b"a"),
        (b"aa", b"aa"),
        (FACE[2:3], FACE[3:]),
    ],
    first_id=9,
)
CHARACTERS = "ab é🙂x123aa\n"
STOPS = tuple(STUDENT.convert_tokens_to_ids([EOS, END]))
OWN_STOPS = tuple(TEACHER.convert_tokens_to_ids([END, EOS]))


texts_of = functools.lru_cache(TokenTexts)


def translator(student=STUDENT, teacher=TEACHER, most_tokens: int = 1000) -> Translator:
    facts = Translation("student", "teacher", STOPS, OWN_STOPS, most_tokens)
    return Translator(facts, texts_of(student), texts_of(teacher))


class Alphabetical:
    """An engine whose log-prob of a token is made of its id and its place; P(stop) of its place alone."""

    def __init__(self) -> None:
        self.asked = []

    def score(self, sequences, request):
        self.asked.append((sequences, request))
        scores = []
        for sequence in sequences:
            place = np.arange(len(sequence.response_tokens))
            none = np.zeros((len(place), 0), np.float32)
            logprobs = -(sequence.response_tokens % 7 + 0.01 * place).astype(np.float32)
            scores.append(Scores(logprobs, none.astype(np.int32), none, none, -1 - place.astype(np.float32), none))
        return scores


# ---- texts of tokens ----


@given(text=st.text(alphabet=CHARACTERS + "𐍈漢\u0000", max_size=40))
def test_the_texts_of_tokens_make_up_the_text(text):
    for tokenizer in (STUDENT, TEACHER):
        texts = texts_of(tokenizer)
        assert b"".join(texts.pieces(tokenizer.encode(text))) == text.encode()
        assert not texts.differs(text)


def test_spaces_and_bytes_of_sentencepiece_are_what_they_stand_for():
    vocabulary = {"<unk>": 0, "<0xC3>": 1, "<0xA9>": 2, "▁": 3, "▁a": 4, "b": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a")] if "a" in vocabulary else [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    texts = TokenTexts(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))
    assert texts.pieces([4, 3, 1, 2, 5, 99]) == [b" a", b" ", b"\xc3", b"\xa9", b"b", b""]
    assert texts.begins_with_space


def test_a_tokenizer_whose_tokens_are_no_pieces_of_the_text_is_told():
    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    pieces.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="WordPiece"):
        TokenTexts(PreTrainedTokenizerFast(tokenizer_object=pieces))
    lower = Tokenizer(models.WordLevel({"?": 0, "a": 1}, unk_token="?"))
    lower.normalizer, lower.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Split("", "isolated")
    texts = TokenTexts(PreTrainedTokenizerFast(tokenizer_object=lower, unk_token="?"))
    assert texts.differs("A") and not texts.differs("a")


# ---- spans ----


@given(one=st.lists(st.integers(0, 4), max_size=20), other=st.lists(st.integers(0, 4), max_size=20))
def test_spans_are_the_shortest_stretches_that_end_together(one, other):
    """Against two pointers."""
    places = [np.array([2 * end for end in accumulate(sizes)], np.int64) for sizes in (one, other)]
    numbers = spans(*places)
    shared = sorted(({*places[0].tolist()} & {*places[1].tolist()}) - {0})
    for ends, number in zip(places, numbers, strict=True):
        expected = [next((k for k, end in enumerate(shared) if place <= end), -1) for place in ends.tolist()]
        assert number.tolist() == expected
    for ends, number in zip(places, numbers, strict=True):  # no number is left out on either side
        assert sorted({*number.tolist()} - {-1}) == list(range(len(shared))), ends


@given(
    parts=st.lists(st.sampled_from([b"a", "é".encode(), b"\xc3", b"\xa9", b"\xff", "🙂".encode()[:3], "🙂".encode()]))
)
def test_a_text_is_readable_and_its_places_are_those_of_the_bytes(parts):
    raw = b"".join(parts)
    text, places = readable(raw, whole=True)
    assert text == raw.decode(errors="replace")
    assert len(places) == len(text.encode()) + 1 and (np.diff(places) >= 0).all()
    if text.encode() == raw:
        assert places.tolist() == [2 * place for place in range(len(raw) + 1)]
    assert places[0] == 0 and places[-1] == 2 * len(raw)


def test_a_character_that_was_cut_off_is_left_out():
    text, places = readable("ab🙂".encode()[:-1], whole=False)
    assert text == "ab" and places.tolist() == [0, 2, 4]


# ---- readings ----


@pytest.mark.slow
@settings(max_examples=60)
@given(
    sampled=st.lists(st.sampled_from(sorted(set(STUDENT.get_vocab().values()) - {*STOPS})), max_size=30),
    text=st.text(alphabet=CHARACTERS, max_size=30),
    ended=st.booleans(),
)
def test_each_span_is_the_same_bytes_on_both_sides_and_all_of_a_text_is_in_one(sampled, text, ended):
    """Tokens at random, which need not be UTF-8, nor those that the tokenizer makes of their text; and a text's own."""
    reader = translator()
    for tokens in (sampled, STUDENT.encode(text)):
        response = [*tokens, STOPS[1]] if ended else tokens
        reading = reader.read(rollouts({"response_tokens": response, "finish_reason": "stop" if ended else "length"}))[
            0
        ]
        ours, theirs = (
            texts_of(STUDENT).pieces(response),
            texts_of(TEACHER).pieces(reading.sequence.response_tokens),
        )
        raw = b"".join(ours[: len(response) - ended])
        readable_raw = raw.decode(errors="replace").encode() == raw
        number = int(reading.own.max(initial=-1)) + 1
        for span in range(number - ended):
            pair = [
                b"".join(piece for piece, of in zip(pieces, numbers, strict=True) if of == span)
                for pieces, numbers in ((ours, reading.own), (theirs, reading.theirs))
            ]
            assert pair[0] == pair[1] or not readable_raw
        assert (np.diff(reading.own[reading.own >= 0]) <= 1).all()
        if ended:
            assert reading.own[-1] == reading.theirs[-1] == number - 1
            assert reading.sequence.response_tokens[-1] == OWN_STOPS[0]
            assert (reading.own >= 0).all()
        outside = reading.own < 0
        assert not outside.any() or outside[np.flatnonzero(outside)[0] :].all(), "only the end may be in no span"


def test_two_byte_level_tokenizers_meet_within_a_character():
    """By characters a face would be one span."""
    reading = translator().read(rollouts({"response_tokens": [*STUDENT.encode("🙂1"), STOPS[0]]}))[0]
    assert reading.own.tolist() == [0, 1, 1, 2, 3] and reading.theirs.tolist() == [0, 0, 1, 2, 3]


def test_a_special_token_is_the_other_s_of_the_same_text_and_else_its_characters():
    other = byte_level([])
    ids = [STUDENT.convert_tokens_to_ids(MARK), *STUDENT.encode("a"), STOPS[0]]
    same = translator(teacher=other).read(rollouts({"response_tokens": ids}))[0]
    assert same.sequence.response_tokens.tolist() == [*other.encode(MARK + "a"), OWN_STOPS[0]]
    assert same.own.tolist() == [0, 1, 2] == same.theirs.tolist()


def test_of_a_rollout_that_was_cut_off_the_tokens_that_might_have_grown_are_left_out():
    """ "aa" may become "aaaa", and "2" a "23": what the teacher gives them alone says nothing of what may come."""
    for text, known in (("1aa", 1), ("1aaaa", 5), ("x2", 1), ("x23", 3), ("1b", 1), ("11", 2)):
        tokens = [token for character in text for token in STUDENT.encode(character)]
        reading = translator().read(rollouts({"response_tokens": tokens, "finish_reason": "length"}))[0]
        assert (reading.own >= 0).tolist() == [True] * known + [False] * (len(tokens) - known), text
        whole = translator().read(rollouts({"response_tokens": [*tokens, STOPS[0]]}))[0]
        assert (whole.own >= 0).all(), text


def test_what_is_beyond_the_teacher_s_context_is_not_scored():
    tokens = [*STUDENT.encode("1x1x1x"), STOPS[0]]
    reading = translator(most_tokens=2 + 4).read(rollouts({"response_tokens": tokens}))[0]
    assert len(reading.sequence.response_tokens) == 4
    assert reading.own.tolist() == [0, 1, 2, 3, -1, -1, -1]


def test_what_might_have_grown_is_left_out_where_the_teacher_s_context_ends_too():
    """The bug: of "ab" at a cut, which may become "abx", "a" was scored where "b" was beyond the context."""
    other = byte_level([(b"b", b"x"), (b"a", b"bx")], first_id=9)
    tokens = [token for character in "1ab" for token in STUDENT.encode(character)]
    for room in (1, 2, 3):
        reader = translator(teacher=other, most_tokens=2 + room)
        [reading] = reader.read(rollouts({"response_tokens": tokens, "finish_reason": "length"}))
        assert reading.own.tolist() == [0, -1, -1], room


def test_an_empty_response_and_one_of_an_end_alone():
    empty, end = translator().read(
        rollouts({"response_tokens": [], "finish_reason": "length"}, {"response_tokens": [STOPS[1]]})
    )
    assert len(empty.own) == len(empty.sequence.response_tokens) == 0
    assert end.own.tolist() == [0] and end.sequence.response_tokens.tolist() == [OWN_STOPS[0]]


# ---- scores ----


def test_a_span_s_log_prob_is_the_sum_of_the_teacher_s_tokens_in_equal_parts():
    engine, reader = Alphabetical(), translator()
    tokens = [*STUDENT.encode("ab"), *STUDENT.encode("aa"), STOPS[1]]  # ab|a|a against a|ba|a
    batch = rollouts({"response_tokens": tokens})
    [scores] = reader.score(engine, batch, ScoreRequest(stop_token_ids=STOPS))
    [([sequence], request)] = engine.asked
    assert request == ScoreRequest(stop_token_ids=OWN_STOPS)
    assert sequence.prompt_tokens.tolist() == [7, 8]
    assert scores.spans.tolist() == [0, 0, 1, 2]
    [own] = Alphabetical().score([sequence], request)
    assert scores.logprobs == pytest.approx([own.logprobs[:2].sum() / 2] * 2 + own.logprobs[2:].tolist())
    assert scores.stop_logprobs.tolist() == [-1, -np.inf, -3, -4]  # within a span the teacher cannot stop


def test_the_end_is_compared_with_stopping_there_where_the_text_before_is_in_no_span():
    """The bug: P(stop) of an end was that of the place from which the teacher reads another text."""
    changing = byte_level([])
    changing.backend_tokenizer.normalizer = normalizers.Replace("x", "yy")
    tokens = [*STUDENT.encode("1xb"), STOPS[0]]
    [scores] = translator(teacher=changing).score(
        Alphabetical(), rollouts({"response_tokens": tokens}), ScoreRequest(stop_token_ids=STOPS)
    )
    assert scores.spans.tolist() == [0, -1, -1, 1]  # of "1yyb" and the end
    assert scores.stop_logprobs.tolist() == [-1, -2, -np.inf, -5]


def test_a_token_of_no_span_has_the_log_prob_that_it_was_sampled_with():
    tokens = [*STUDENT.encode("1"), *STUDENT.encode("a")]
    batch = rollouts({"response_tokens": tokens, "finish_reason": "length", "behaviour_logprobs": [-3.0, -0.625]})
    [scores] = translator().score(Alphabetical(), batch, ScoreRequest())
    assert scores.spans.tolist() == [0, -1] and scores.logprobs[1] == -0.625
    assert len(scores.stop_logprobs) == 0


def test_distributions_and_rollouts_without_a_prompt_for_the_teacher_are_refused():
    batch = rollouts({"response_tokens": [STOPS[0]]})
    for asked in ({"top_k": 4}, {"given": True}, {"hidden": True}):
        with pytest.raises(RunError, match="distribution over tokens, which are not the student's"):
            translator().score(Alphabetical(), batch, ScoreRequest(**asked))
    batch = rollouts({"response_tokens": [STOPS[0]], "privileged_prompt_tokens": []})
    with pytest.raises(RunError, match="rollout 0-0 has no prompt in the tokens of its teacher"):
        translator().score(Alphabetical(), batch, ScoreRequest())


# ---- exactness, with models ----


@pytest.fixture(scope="module")
def renumbered(tmp_path_factory) -> Path:
    """The shipped teacher with its tokens in another order, so that it is the same model in another tokenizer's ids."""
    import torch
    from transformers import AutoModelForCausalLM

    from opd_ray.embedded.prepare import TEACHER_DIR

    path = tmp_path_factory.mktemp("renumbered")
    order = [0, 1, *range(19, 1, -1)]  # new id to old id
    model = AutoModelForCausalLM.from_pretrained(TEACHER_DIR, dtype=torch.float32)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight.copy_(layer.weight[order])
    model.save_pretrained(path)
    tokens = list(embedded_models.VOCABULARY)
    words = models.WordLevel({tokens[old]: new for new, old in enumerate(order)}, unk_token=embedded_models.PAD)
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = embedded_models.make_tokenizer().backend_tokenizer.pre_tokenizer
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=embedded_models.EOS, pad_token=embedded_models.PAD
    ).save_pretrained(path)
    return path


@pytest.mark.slow
def test_with_a_tokenizer_that_only_numbers_otherwise_the_scores_are_those_of_the_ordinary_way(renumbered):
    from transformers import AutoTokenizer

    from opd_ray.embedded.prepare import TEACHER_DIR
    from opd_ray.score.torch import TorchScoringEngine

    ours, theirs = embedded_models.make_tokenizer(), AutoTokenizer.from_pretrained(renumbered)
    texts = [("5-0=5;5-6=6;6+6=5#5", "stop"), ("5-0=5;5-6=2?5-6=", "length"), ("", "stop"), ("77", "length")]
    batch = rollouts(
        *(
            {
                "prompt_tokens": ours.encode("^5-0-6+6="),
                "privileged_prompt_tokens": theirs.encode("^5-0-6+6="),
                "response_tokens": ours.encode(text) + [EOS_ID] * (finish == "stop"),
                "finish_reason": finish,
            }
            for text, finish in texts
        )
    )

    async def scores(path: Path, translation: Translation | None):
        config = ScorerConfig(path=str(path))
        scorer = Scorer(make_engine=lambda: TorchScoringEngine(path=str(path)), scorer=config, member=False)
        await scorer.begin(config, translation)
        return await scorer.score(batch, ScoreRequest(stop_token_ids=(EOS_ID,)))

    translation = Translation(str(TEACHER_DIR), str(renumbered), (EOS_ID,), (EOS_ID,), 128)
    (tokens, plain), (same, translated) = (
        asyncio.run(scores(path, how)) for path, how in ((TEACHER_DIR, None), (renumbered, translation))
    )
    assert tokens == same
    for name in ("logprobs", "stop_logprobs"):
        for one, other in zip(plain[name].to_pylist(), translated[name].to_pylist(), strict=True):
            assert other == pytest.approx(one, abs=1e-6)
    lengths = plain["logprobs"].value_lengths().to_pylist()
    assert translated["spans"].to_pylist() == [list(range(length)) for length in lengths]
    assert plain["spans"].to_pylist() == [[], [], [], []]


def test_the_pairs_of_the_second_teacher_are_spans_of_two_of_the_student_s_characters():
    student, teacher = embedded_models.make_tokenizer(), embedded_models.make_tokenizer(alphabet=PAIRS)
    facts = Translation("student", "teacher", (EOS_ID,), (EOS_ID,), 128)
    reader = Translator(facts, TokenTexts(student), TokenTexts(teacher))
    ended, cut = reader.read(
        rollouts(
            {"response_tokens": [*student.encode("5-0=5#5"), EOS_ID]},
            {"response_tokens": student.encode("5-0=5;5-6="), "finish_reason": "length"},
        )
    )
    assert ended.own.tolist() == [0, 1, 1, 2, 2, 3, 3, 4]
    assert cut.own.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, -1], "of = at the cut it would say that it is no =5"
