"""Drawing tokens for many responses at once: from the right distribution, the same for a seed in whatever crowd."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opd_ray.generate.sampling import sample, uniform

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, -torch.inf]])
MANY = 20_000


def draw(temperature: float, top_p: float = 1.0, logits: torch.Tensor = LOGITS) -> tuple[np.ndarray, torch.Tensor]:
    """Shares of the tokens, and the log-prob that each came with; nan for one that never came."""
    rows = logits.expand(MANY, -1)
    settings = (torch.full((MANY,), value) for value in (temperature, top_p))
    tokens, logprobs = sample(rows, *settings, torch.from_numpy(uniform(1, MANY)))
    said = torch.full(logits.shape[1:], torch.nan).scatter(0, tokens, logprobs)
    return np.bincount(tokens.numpy(), minlength=logits.shape[1]) / MANY, said


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_come_as_often_as_their_log_probs_say(temperature: float) -> None:
    shares, said = draw(temperature)
    expected = (LOGITS[0] / temperature).softmax(-1)
    assert np.abs(shares - expected.numpy()).max() < 4 * 0.5 / np.sqrt(MANY)
    assert shares[4] == 0, "what has no probability never comes"
    assert torch.allclose(said[:4], expected[:4].log(), atol=1e-6)


def test_the_nucleus_is_normalised_and_nothing_outside_of_it_comes() -> None:
    shares, said = draw(1.0, top_p=0.8)  # the first has .64, the second .24
    assert (shares > 0).tolist() == [True, True, False, False, False]
    assert torch.allclose(said[:2], LOGITS[0, :2].log_softmax(-1), atol=1e-6)
    shares, said = draw(1.0, top_p=1e-6)
    assert shares[0] == 1.0 and said[0] == 0.0, "one token at least"


def test_without_temperature_the_most_probable_one_is_taken_with_its_own_log_prob() -> None:
    shares, said = draw(0.0, top_p=0.5)
    assert shares[0] == 1.0 and said[0] == pytest.approx(float(LOGITS[0].log_softmax(-1)[0]))


def test_rows_of_other_settings_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 50, generator=generator)
    temperature, top_p = torch.tensor([1.0, 0.0, 0.7, 1.0]), torch.tensor([1.0, 1.0, 0.9, 0.3])
    drawn = torch.tensor([0.3, 0.3, 0.3, 0.99999], dtype=torch.float64)
    tokens, logprobs = sample(logits, temperature, top_p, drawn)
    for row in range(4):
        one = slice(row, row + 1)
        alone = sample(logits[one], temperature[one], top_p[one], drawn[one])
        assert (int(alone[0]), float(alone[1])) == (int(tokens[row]), pytest.approx(float(logprobs[row])))


def test_the_largest_number_that_can_be_drawn_gives_a_token_that_has_a_probability() -> None:
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, 3:700] = 0.0
    most = torch.tensor([np.nextafter(1.0, 0.0)])
    for drawn, token in ((most, 699), (torch.zeros(1, dtype=torch.float64), 3)):
        assert int(sample(logits, torch.ones(1), torch.ones(1), drawn)[0]) == token


def test_a_seed_draws_the_same_however_many_are_asked_for() -> None:
    assert (uniform(7, 3) == uniform(7, 100)[:3]).all() and (uniform(8, 3) != uniform(7, 3)).any()
