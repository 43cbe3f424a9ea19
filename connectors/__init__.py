"""Engines that KVShare serves, one package each."""
