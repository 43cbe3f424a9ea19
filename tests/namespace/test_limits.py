"""Limits of single tenants: whose they are, and what a file of them may say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvshare_store.config import StoreConfig
from kvshare_store.errors import ConfigError, LimitError
from kvshare_store.namespace import Namespace
from kvshare_store.namespace.limits import Limits, TenantLimits
from tests.support.oracle import Driver, prompt

Config = Callable[..., StoreConfig]
Open = Callable[..., Driver]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    found = tmp_path / "limits.yaml"
    found.write_text(
        "ann: {namespace_bytes: 2MiB, namespace_nodes: 1, plans_per_second: 1}\n"
        "bob: {namespace_nodes: 0}\n"
        '"": {saves_per_second: 0.1}\n'
    )
    return found


def test_whose_limits_they_are(config: Config, namespace: Namespace, file: Path) -> None:
    limits = TenantLimits(config(namespace_nodes=2, tenant_limits=str(file)))
    assert limits.of(namespace.for_tenant("ann")) == Limits(2 << 20, 1, 1.0, 0.0)
    assert limits.of(namespace.for_tenant("ann", "adapter")) == Limits(2 << 20, 1, 1.0, 0.0)
    assert limits.of(namespace.for_tenant("bob")) == Limits(), "0 lifts what the others have"
    assert limits.of(namespace) == Limits(0, 2, 0.0, 0.1), "requests without a tenant"
    assert limits.of(namespace.for_tenant("eve")) == limits.of(None) == Limits(0, 2)
    assert limits.of(namespace.in_pool("ann")) == Limits(), "a pool of that name is nobody's"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ann: {namespace_byte: 1}", "did you mean namespace_bytes"),
        ("ann: {home: /tmp}", "entry 1: .*home"),
        ("a: {}\nann: {namespace_bytes: lots}", "entry 2: .*lots"),
        ("ann: {plans_per_second: -1}", "negative"),
        ("ann: 5", "must hold"),
        ("- ann", "must hold"),
        ("{", "must hold"),
        ("ann: {namespace_nodes: 2024-99-99}", "must hold"),
        ("ann: {namespace_nodes: !!timestamp x}", "must hold"),
        ("!ann : {namespace_nodes: 1}", "must hold"),
        (f"ann: {{namespace_nodes: {2**63}}}", "entry 1: .*below"),
        (f"ann: {{namespace_bytes: '{'9' * 400}'}}", "entry 1: .*too large"),
    ],
)
def test_files_that_cannot_be_used(config: Config, file: Path, text: str, told: str) -> None:
    """The message names no tenant: without `tenant_key` its name gives access."""
    file.write_text(text)
    with pytest.raises(ConfigError, match=told) as caught:
        TenantLimits(config(tenant_limits=str(file)))
    assert "ann" not in str(caught.value).replace("cannot", "")
    file.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        TenantLimits(config(tenant_limits=str(file)))


def test_a_path_that_leads_nowhere(config: Config) -> None:
    for path in ("~nobody-of-that-name/limits.yaml", "a\0b"):
        with pytest.raises(ConfigError, match="cannot be read"):
            TenantLimits(config(tenant_limits=path))


@pytest.mark.parametrize("others", [0, 1, 1 << 30])
def test_a_tenant_over_its_own_quota_loses_no_more_than_that(
    driver: Open, file: Path, monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    """Its oldest prompt is shortened by what is too much, whatever the others may have."""
    monkeypatch.setattr("kvshare_store.config.reading._LEAST_BYTES", 1)
    layout = driver().namespace.layout
    quota = 120 * layout.row_bytes
    file.write_text(f"ann: {{namespace_bytes: {quota}}}")
    open_ = driver(tenant_limits=str(file), namespace_bytes=others)
    ann = Driver(open_.store, open_.namespace.for_tenant("ann"), open_.book)
    first, second = prompt(1, 80), prompt(2, 80)
    assert ann.save(first)
    assert ann.save(second)
    assert quota - 16 * layout.row_bytes <= open_.store.tree.bytes_of(ann.namespace.digest) <= quota
    assert ann.serve(second).exact == 79
    assert ann.serve(first).exact >= 24


def test_an_empty_file_limits_nobody(config: Config, namespace: Namespace, file: Path) -> None:
    file.write_text("")
    assert TenantLimits(config(tenant_limits=str(file))).of(namespace) == Limits()


def test_a_store_holds_them(driver: Open, config: Config, file: Path) -> None:
    open_ = driver(tenant_limits=str(file))
    store, space = open_.store, open_.namespace
    ann, bob, nobody = (
        Driver(store, space.for_tenant(tenant), open_.book) for tenant in ("ann", "bob", "")
    )
    for seed in range(3):
        assert ann.save(prompt(seed, 40))
        assert bob.save(prompt(seed, 40))
    assert store.tree.count_of(ann.namespace.digest) == 1
    assert store.tree.count_of(bob.namespace.digest) == 3
    assert ann.serve(prompt(2, 40)).reused
    assert ann.plan(prompt(2, 40)).declined == "too_many_plans"
    assert bob.serve(prompt(2, 40)).reused
    assert bob.serve(prompt(2, 40)).reused
    assert nobody.save(prompt(1, 40))
    with pytest.raises(LimitError):
        nobody.save(prompt(2, 40))
    file.write_text("bob: {namespace_nodes: 1}")
    store.reload(config(tenant_limits=str(file)))
    assert bob.save(prompt(7, 40))
    assert store.tree.count_of(bob.namespace.digest) == 1
    assert nobody.save(prompt(2, 40))
    file.write_text("bob: {}\nann: 1")
    with pytest.raises(ConfigError):
        store.reload(config(tenant_limits=str(file), namespace_nodes=7))
    assert store.config.namespace_nodes == 0, "what is wrong changes nothing"
