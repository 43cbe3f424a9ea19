"""What the full model thinks of a served answer: how much worse each token is than its own best."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.outputs import LogprobsTensors

_MOST_NATS = 100.0
"""A token that the model takes for impossible is as bad as that."""


def regrets_of(said: LogprobsTensors | None, count: int) -> tuple[float, ...]:
    """log p(best token) - log p(token) in nats, of the last `count` tokens of a prompt.

    `said`: what a runner reports with `prompt_logprobs=1`, a row for each token, or for each that
    it computed: the token's own value, then the best one's. Logits do as well: only differences
    count. Empty if there are fewer, or if one is no number.
    """
    if said is None or len(said.logprobs) < count:
        return ()
    served, best = said.logprobs[-count:, :2].double().unbind(1)
    regrets = best - served
    return () if regrets.isnan().any() else tuple(regrets.clamp(0, _MOST_NATS).tolist())


def is_greedy(sampling: SamplingParams | None) -> bool:
    """Whether each token of an answer is the model's best: no chance, and nothing that moves or
    forbids tokens. Then a token that the full model would not have chosen is an effect of reuse."""
    if sampling is None or sampling.temperature != 0:
        return False
    moved = (
        sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty - 1,
        sampling.logit_bias, sampling.min_tokens, sampling.allowed_token_ids, sampling.bad_words,
        sampling.structured_outputs, sampling.thinking_token_budget is not None,
        sampling.trace_decode_token_ids,
    )  # fmt: skip
    return not any(moved)


def cannot_score(config: VllmConfig) -> bool:
    """Whether the runner must not be asked for the probabilities of a prompt."""
    return bool(config.cache_config.kv_sharing_fast_prefill)
