"""Scores: equal to the libraries' own where there is one, known values where there is not."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.quality.answer_metrics import bleu, normalized, paired_bootstrap, rouge_l, token_f1

ANSWERS = ["the cat sat on the mat today", "a dog ran far away from home", "no"]
REFERENCES = [
    ["the cat sat on a mat today"],
    ["the dog ran very far away from home"],
    ["yes it is"],
]


def test_bleu_from_sums_is_sacrebleus_corpus_bleu():
    from sacrebleu.metrics import BLEU

    metric, signature = bleu()
    theirs = BLEU().corpus_score(ANSWERS, [[r[0] for r in REFERENCES]]).score
    assert metric.total(metric.parts(ANSWERS, REFERENCES).sum(0)) == pytest.approx(theirs)
    assert 10 < theirs < 90
    assert signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_rouge_stems_and_takes_the_best_reference():
    metric = rouge_l()
    parts = metric.parts(["he runs home"], [["nothing alike", "he running home"]])
    assert metric.total(parts.sum(0)) == pytest.approx(100)


def test_f1_counts_each_token_once():
    metric = token_f1()
    parts = metric.parts(["the Exeter Exeter college!"], [["Exeter College"]])
    # 3 words said, 2 wanted, 2 shared
    assert metric.total(parts.sum(0)) == pytest.approx(80)


def test_f1_of_an_empty_answer_is_zero_unless_nothing_was_wanted():
    metric = token_f1()
    assert metric.total(metric.parts([""], [["Exeter"]]).sum(0)) == 0
    assert metric.total(metric.parts(["the"], [["a"]]).sum(0)) == 100


def test_f1_splits_by_the_tokenizer_that_is_given():
    letters = token_f1(list)
    assert letters.total(letters.parts(["ab"], [["bc"]]).sum(0)) == pytest.approx(50)


def test_normalisation():
    assert normalized("The  U.S. and an Apple, a day") == "us and apple day"


def test_bootstrap_of_equal_answers_is_exactly_zero():
    metric = token_f1()
    parts = metric.parts(ANSWERS, REFERENCES)
    assert paired_bootstrap(metric, parts, parts) == (0, 0, 0)


def test_bootstrap_tells_a_clear_loss_from_chance():
    metric = token_f1()
    random = np.random.default_rng(1)
    good = np.stack([random.uniform(0.5, 1.0, 200), np.ones(200)], axis=1)
    worse = good - [0.1, 0]
    lost = paired_bootstrap(metric, worse, good)
    assert lost.difference == pytest.approx(-10)
    assert lost.clear
    noisy = good + np.stack([random.normal(0, 0.3, 200), np.zeros(200)], axis=1) * [[1, 0]]
    shifted = paired_bootstrap(metric, noisy - [noisy[:, 0].mean() - good[:, 0].mean(), 0], good)
    assert not shifted.clear


def test_bootstrap_refuses_different_prompts():
    metric = token_f1()
    parts = metric.parts(ANSWERS, REFERENCES)
    with pytest.raises(ValueError, match="same prompts"):
        paired_bootstrap(metric, parts[:2], parts)
