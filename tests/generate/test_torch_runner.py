"""The torch runner by itself: pages against plain passes, whatever lay in them or in the contiguous cache
before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from chatwright.generate.runner import Feed
from chatwright.generate.torch_runner import TorchRunner
from chatwright.model.gpt import GPT

BOUND = 1e-4
"""As in test_engine.py."""

MakeModel = Callable[..., GPT]
A, B = list(range(20, 50)), list(range(100, 130))


@pytest.fixture
def model(make_model: MakeModel) -> GPT:
    model = make_model()
    with torch.no_grad():
        model.embed.weight[13] = float("nan")
    return model


@pytest.fixture
def runner(model: GPT) -> TorchRunner:
    runner = TorchRunner(model)
    runner.allocate(40, 16)
    return runner


def check(model: GPT, logits: torch.Tensor, *texts: list[int]) -> None:
    """Each row of logits is what a plain pass over the text gives behind its last token."""
    with torch.inference_mode():
        expected = torch.stack([model(torch.tensor([text]))[0, -1] for text in texts])
    torch.testing.assert_close(logits, expected, atol=BOUND, rtol=0)


def test_feeds_of_all_kinds_in_one_call(model: GPT, runner: TorchRunner) -> None:
    runner.forward([Feed(A[:20], 0, [3, 1], 0), Feed(B[:3], 0, [0], 0)])
    logits = runner.forward([Feed(A[20:21], 20, [3, 1]), Feed(B[:18], 0, [2, 4], 2), Feed(B[3:5], 3, [0], 2)])
    check(model, logits, A[:21], B[:17], B[:18], B[:4], B[:5])
    assert runner.forward([Feed(A[21:22], 21, [3, 1], 0)]).shape == (0, 512)


def test_rows_that_change_places(model: GPT, runner: TorchRunner) -> None:
    """Growing side by side, one leaves, one joins, another order, and a guess that was wrong."""
    pages = {"a": [0], "b": [1], "c": [2], "d": [3]}
    texts = {"a": A[:5], "b": B[:9], "c": B[10:13], "d": A[7:10]}
    runner.forward([Feed(texts[name], 0, pages[name], 0) for name in pages])
    for names in ("abc", "abc", "ca", "cab", "dcab", "bd", "acdb", "a", "abcd"):
        for name in names:
            texts[name] = [*texts[name], 60 + len(texts[name])]
        logits = runner.forward([Feed(texts[name][-1:], len(texts[name]) - 1, pages[name]) for name in names])
        check(model, logits, *(texts[name] for name in names))
    text = texts["a"]
    runner.forward([Feed([70, 71, 72], len(text), pages["a"], 3)])
    check(model, runner.forward([Feed([80], len(text) + 1, pages["a"])]), [*text, 70, 80])


def test_a_page_that_was_written_over(model: GPT, runner: TorchRunner) -> None:
    def answer(ids: list[int], page: int) -> None:
        runner.forward([Feed(ids[:4], 0, [page], 0)])
        check(model, runner.forward([Feed(ids[4:5], 4, [page])]), ids[:5])

    answer(A, 0)
    answer(B, 0)  # read into the same page: the copy of A must not be gone on with
    answer(A, 1)
    runner.copy_page(0, 1)
    check(model, runner.forward([Feed([7], 5, [1])]), [*B[:5], 7])


@pytest.mark.parametrize("many", [False, True])
def test_numbers_that_are_none_stay_where_they_were(model: GPT, runner: TorchRunner, many: bool) -> None:
    runner.forward([Feed(A[:9], 0, [0], 0), Feed(A[:9], 0, [1], 0), Feed(A[:12], 0, [2], 0)])
    bad = runner.forward([Feed([13], 9, [0]), Feed([13], 9, [1]), Feed(A[12:13], 12, [2])])
    assert bad[:2].isnan().all()
    check(model, bad[2:], A[:13])
    runner.forward([Feed(B[:2], 0, [0], 0)])
    if many:  # a chunk that is laid out from its pages
        check(model, runner.forward([Feed(B[2:12], 2, [0]), Feed(A[13:30], 13, [2, 3])]), B[:12], A[:30])
    else:  # rows of the contiguous cache
        runner.forward([Feed(B[:2], 0, [1], 0)])
        feeds = [Feed(B[2:3], 2, [0]), Feed(B[2:3], 2, [1]), Feed(A[13:14], 13, [2])]
        check(model, runner.forward(feeds), B[:3], B[:3], A[:14])


def test_without_memory_for_copies_answers_are_laid_out_anew(model: GPT, runner: TorchRunner) -> None:
    runner._bench.most = 70  # enough for three short ones
    test_rows_that_change_places(model, runner)
    assert 0 < runner._bench.keys.shape[1] * runner._bench.keys.shape[3] <= 70
    runner._bench.clear()
    pages = [[5, 4], [7, 6], [9, 8]]  # three long ones are too much
    runner.forward([Feed(A, 0, own, 0) for own in pages])
    check(
        model,
        runner.forward([Feed([token], 30, own) for token, own in enumerate(pages)]),
        *([*A, at] for at in range(3)),
    )
    assert runner._bench.keys.numel() == 0


def test_a_copy_is_of_all_pages_of_a_sequence(model: GPT, runner: TorchRunner) -> None:
    """Two sequences with the same last page and different first ones, as no scheduler of ours would have
    them."""
    runner.forward([Feed(A[:20], 0, [3, 1], 0), Feed(B[:16], 0, [4], 0)])
    runner.forward([Feed(A[20:21], 20, [3, 1])])
    mixed = Feed(A[21:22], 21, [4, 1])
    logits = runner.forward([mixed])
    runner._bench.clear()
    runner._bench.most = 0
    torch.testing.assert_close(logits, runner.forward([mixed]), atol=BOUND, rtol=0)


def test_room_in_the_contiguous_cache_is_for_the_new_tokens_too(model: GPT, runner: TorchRunner) -> None:
    runner._bench.most = 8
    runner.forward([Feed(A[:6], 0, [0], 0)])
    check(model, runner.forward([Feed(A[6:8], 6, [0])]), A[:8])
    check(model, runner.forward([Feed(A[8:11], 8, [0])]), A[:11])


def test_a_pass_that_fails_leaves_no_wrong_copy(
    model: GPT, runner: TorchRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.forward([Feed(A[:6], 0, [0], 0), Feed(B[:6], 0, [1], 0)])
    runner.forward([Feed(A[6:7], 6, [0])])
    lay_out = runner._bench._lay_out

    def interrupt(row: int, feed: Feed) -> None:
        lay_out(row, feed)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner._bench, "_lay_out", interrupt)
        with pytest.raises(KeyboardInterrupt):
            runner.forward([Feed(B[6:7], 6, [1])])
    check(model, runner.forward([Feed(A[7:8], 7, [0])]), A[:8])
