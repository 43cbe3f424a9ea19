"""Contract tests for whoever implements an interface of KVShare.

    from kvshare_store.testing.tiers import TierTests

    class TestMyTier(TierTests):
        async def make_tier(self, folder, budget):
            return MyTier(folder, budget)

Needs pytest and hypothesis, which nothing else in the package does.
"""

import pytest

pytest.register_assert_rewrite(
    "kvshare_store.testing.embedders",
    "kvshare_store.testing.eviction",
    "kvshare_store.testing.file_tiers",
    "kvshare_store.testing.remotes",
    "kvshare_store.testing.tier_contract",
    "kvshare_store.testing.tiers",
    "kvshare_store.testing.tiers_at_once",
    "kvshare_store.testing.tiers_damaged",
)
