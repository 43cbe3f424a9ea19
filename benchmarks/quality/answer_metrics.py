"""How answers are scored: BLEU, Rouge-L, token F1, and how sure a difference is."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Sums = npt.NDArray[np.float64]


class Interval(NamedTuple):
    """A difference and where 95 % of the resampled ones lie."""

    difference: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


class Metric(NamedTuple):
    """A score of a set of answers that is a function of sums over them.

    `of` gives one answer's part (a row of numbers), `total` the score of the parts' sum.
    """

    name: str
    of: Callable[[str, Sequence[str]], list[float]]
    total: Callable[[Sums], float]

    def parts(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> Sums:
        """The parts of all answers, `[answers, numbers]`."""
        pairs = zip(answers, references, strict=True)
        return np.array([self.of(answer, accepted) for answer, accepted in pairs])


def paired_bootstrap(
    metric: Metric, parts: Sums, baseline: Sums, *, seed: int = 0, resamples: int = 1000
) -> Interval:
    """The score of `parts` minus that of `baseline`, over resampled answers to the same prompts."""
    if parts.shape != baseline.shape:
        raise ValueError("a paired bootstrap needs answers to the same prompts")
    random = np.random.default_rng(seed)
    differences = []
    for _ in range(resamples):
        drawn = random.integers(len(parts), size=len(parts))
        differences.append(metric.total(parts[drawn].sum(0)) - metric.total(baseline[drawn].sum(0)))
    low, high = np.quantile(differences, [0.025, 0.975])
    return Interval(
        metric.total(parts.sum(0)) - metric.total(baseline.sum(0)), float(low), float(high)
    )


def bleu() -> tuple[Metric, str]:
    """Corpus BLEU of sacrebleu (0 to 100) as sums over sentences, and its signature."""
    from sacrebleu.metrics import BLEU

    scorer = BLEU()
    # the signature names the number of references, which sacrebleu learns from what it scored
    scorer.corpus_score([""], [[""]])

    def of(answer: str, references: Sequence[str]) -> list[float]:
        score: Any = BLEU(effective_order=True).sentence_score(answer, list(references))
        return [*score.counts, *score.totals, score.sys_len, score.ref_len]

    def total(sums: Sums) -> float:
        counts, totals = sums[:4].astype(int).tolist(), sums[4:8].astype(int).tolist()
        score = BLEU.compute_bleu(counts, totals, int(sums[8]), int(sums[9]), smooth_method="exp")
        return float(score.score)

    return Metric("BLEU", of, total), str(scorer.get_signature())


def rouge_l() -> Metric:
    """Mean F of Rouge-L with stemming (rouge_score; 0 to 100), the best of the references."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)

    def of(answer: str, references: Sequence[str]) -> list[float]:
        return [max(scorer.score(ref, answer)["rougeL"].fmeasure for ref in references), 1.0]

    return Metric("Rouge-L", of, _mean)


def token_f1(tokenize: Callable[[str], Sequence[Any]] = str.split) -> Metric:
    """Mean F1 over tokens after SQuAD's normalisation (0 to 100), the best of the references.

    Rajpurkar et al. 2016 split at blanks; CacheBlend's scripts (Yao et al. 2025) split by the
    model's tokenizer: pass that as `tokenize`.
    """

    def of(answer: str, references: Sequence[str]) -> list[float]:
        said = tokenize(normalized(answer))
        return [max(_f1(said, tokenize(normalized(ref))) for ref in references), 1.0]

    return Metric("F1", of, _mean)


def normalized(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single blanks."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def _f1(said: Sequence[Any], wanted: Sequence[Any]) -> float:
    if not said or not wanted:
        return float(list(said) == list(wanted))
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted))


def _mean(sums: Sums) -> float:
    return float(100 * sums[0] / sums[1])
