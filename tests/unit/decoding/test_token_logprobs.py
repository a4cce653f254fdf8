import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.server.decoding.logprobs import token_logprobs

torch.set_num_threads(1)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_against_plain_numpy(data: st.DataObject) -> None:
    n_rows, vocab = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 12))
    values = st.integers(-3, 3).map(float) | st.just(-np.inf)  # few values: many ties
    logits = np.array(
        data.draw(
            st.lists(st.lists(values, min_size=vocab, max_size=vocab), min_size=n_rows, max_size=n_rows)
        ),
        dtype=np.float32,
    )
    logits[:, 0] = 1.0
    tokens = data.draw(st.lists(st.integers(0, vocab - 1), min_size=n_rows, max_size=n_rows))
    counts = data.draw(st.lists(st.integers(0, vocab), min_size=n_rows, max_size=n_rows))
    for row, entry in enumerate(token_logprobs(torch.from_numpy(logits), tokens, counts)):
        x = logits[row].astype(np.float64)
        expected = x - np.log(np.exp(x).sum())
        order = sorted(range(vocab), key=lambda token: (-x[token], token))[: counts[row]]
        assert entry.token_id == tokens[row]
        assert entry.logprob == pytest.approx(expected[tokens[row]], abs=1e-5)
        assert [token for token, _ in entry.top] == order
        assert [value for _, value in entry.top] == pytest.approx(list(expected[order]), abs=1e-5)


def test_many_rows_and_a_large_vocabulary_keep_their_order() -> None:
    logits = torch.randn(150, 5000, generator=torch.Generator().manual_seed(0)) * 5
    logits[::3] = logits[::3].round()  # ties, also at the cut
    tokens = torch.randint(5000, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    entries = token_logprobs(logits, tokens, [i % 21 for i in range(150)])
    assert len(entries) == 150
    expected = logits.double().log_softmax(-1)
    ranked = logits.sort(dim=-1, descending=True, stable=True).indices
    for i, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(expected[i, tokens[i]].item(), abs=1e-4)
        assert [token for token, _ in entry.top] == ranked[i, : i % 21].tolist()
        assert all(isinstance(token, int) and isinstance(value, float) for token, value in entry.top)


def test_huge_logits_and_no_rows() -> None:
    [entry] = token_logprobs(torch.tensor([[1e30, -1e30, 1e30]]), [2], [2])
    assert entry.logprob == pytest.approx(np.log(0.5))
    assert [token for token, _ in entry.top] == [0, 2]
    assert token_logprobs(torch.zeros(0, 5), [], []) == []
