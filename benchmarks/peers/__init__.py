"""Other systems beside KVShare: LMCache, SemBlend, GPTCache."""
