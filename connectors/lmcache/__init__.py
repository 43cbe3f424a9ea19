"""KVShare's store under LMCache's multiprocess server: an L2 adapter.

LMCache imports the adapter by the path `kvshare_connectors.lmcache.adapter`. Only that module
and `settings` need LMCache.
"""
