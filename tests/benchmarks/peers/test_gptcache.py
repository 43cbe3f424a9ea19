"""GPTCache as a baseline."""

from pathlib import Path

import pytest

from benchmarks.peers.environment import PeerMissingError


@pytest.mark.slow
def test_gptcache_answers_with_what_it_has_for_a_similar_prompt(tmp_path: Path) -> None:
    from benchmarks.peers.gptcache import GptCacheBaseline

    try:
        baseline = GptCacheBaseline(tmp_path)
    except PeerMissingError:
        pytest.skip("needs `make bench-setup`")
    with baseline:
        baseline.put("How do I bake bread at home?", "Flour and water.")
        baseline.put("What is the capital of France?", "Paris.")
        assert baseline.ask("How can I bake bread in my home?") == "Flour and water."
        assert baseline.ask("Explain quantum tunnelling") is None
