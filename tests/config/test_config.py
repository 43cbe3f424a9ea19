"""Where settings come from, and what bad ones are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvshare_store.config import (
    FIELDS,
    StoreConfig,
    default_home,
    load_config,
    load_settings,
    parse_size,
    policy_names,
    unknown_variables,
)
from kvshare_store.errors import ConfigError


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "kvshare.yaml"
    file.write_text(text)
    return file


def test_precedence(tmp_path: Path) -> None:
    file = write(tmp_path, "block_tokens: 16\npolicy: faithful\ncandidates: 3\n")
    environ = {"KVSHARE_POLICY": "exact", "KVSHARE_CANDIDATES": "4", "HOME": "/nowhere"}
    config = load_config({"candidates": 5}, file=file, environ=environ)
    assert (config.block_tokens, config.policy, config.candidates) == (16, "exact", 5)
    assert config.max_donors == StoreConfig().max_donors


@pytest.mark.parametrize("way", ["argument", "setting", "environment"])
def test_ways_to_name_the_file(tmp_path: Path, way: str) -> None:
    file = write(tmp_path, "block_tokens: 16")
    config = load_config(
        {"config": str(file)} if way == "setting" else {},
        file=file if way == "argument" else None,
        environ={"KVSHARE_CONFIG": str(file)} if way == "environment" else {},
    )
    assert config.block_tokens == 16


def test_the_argument_wins_over_the_setting_that_names_a_file(tmp_path: Path) -> None:
    file = write(tmp_path, "block_tokens: 16")
    config = load_config({"config": str(tmp_path / "other.yaml")}, file=file, environ={})
    assert config.block_tokens == 16


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_config(file=write(tmp_path, "# nothing\n"), environ={}) == load_config(environ={})


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_can_come_from_the_environment(name: str) -> None:
    others: dict[str, str] = {
        "home": "/elsewhere", "disk": "false", "disk_codec": "zstd", "remote_codec": "int8",
        "encryption_key": "env:key", "tenant_key": "env:key", "policy": "faithful",
        "eviction": "lru", "huge_pages": "never",
        "delimiters": "true", "semantic": "never", "embedder": "another", "log_requests": "true",
        "log_prompts": "true", "log_format": "json", "start_daemon": "false",
        "disk_write": "back", "remote_write": "through", "store_answers": "false",
        "second_look": "0.25", "source_key": "env:key", "unconfirmed_share": "0.25",
        "second_look_control": "0.5",
        "quality_bound": "0.02", "quality_confidence": "0.99",
    }  # fmt: skip
    size = name.endswith("_bytes")
    given = others.get(name, "8000000" if size else "77")
    config = load_config(environ={f"KVSHARE_{name.upper()}": given})
    value = getattr(config, name)
    assert value != getattr(StoreConfig(), name)
    assert str(value).lower() in (given, f"{given}.0")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("4096B", 4096),
        ("2k", 2000),
        ("2KiB", 2048),
        ("512MiB", 512 * 2**20),
        ("4GB", 4 * 10**9),
        ("1.5g", 1_500_000_000),
        ("1.5 GiB", 3 * 2**29),
        ("1TiB", 2**40),
    ],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size
    if size >= 2**20:
        assert load_config({"host_bytes": text}, environ={}).host_bytes == size


@pytest.mark.parametrize("text", ["", "4 apples", "GiB", "-1", "1e9", True, 1.5, None, [1]])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ConfigError, match="host_bytes"):
        parse_size(text, "host_bytes")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"blok_tokens": 3}, "blok_tokens"),
        ({"block_tokens": "many"}, "block_tokens"),
        ({"block_tokens": 0}, "block_tokens must be greater than zero"),
        ({"host_bytes": 0}, "host_bytes must be greater than zero"),
        ({"disk_bytes": "0"}, "disk_bytes must be greater than zero"),
        ({"host_bytes": "lots"}, "'4GiB'"),
        ({"host_bytes": 1}, "the least that makes sense is 1MiB"),
        ({"disk_bytes": "32"}, "the least that makes sense is 1MiB"),
        ({"plan_deadline_ms": 0}, "plan_deadline_ms must be greater than zero"),
        ({"plan_deadline_ms": "nan"}, "plan_deadline_ms"),
        ({"edit_growth": "nan"}, "edit_growth"),
        ({"edit_growth": -1}, "edit_growth"),
        ({"second_look": "now"}, "second_look must be off or idle or a number, got 'now'"),
        ({"second_look": 0.6}, "second_look must be off, idle or a share up to 0.5"),
        ({"unconfirmed_share": 1.5}, "unconfirmed_share must be a share from 0 to 1"),
        ({"second_look": 0}, "second_look"),
        ({"second_look_control": 1.5}, "second_look_control must be from 0 to 1, got 1.5"),
        ({"second_look_control": -0.1}, "second_look_control must not be negative"),
        ({"quality_bound": 2}, "quality_bound must be below 1, got 2"),
        ({"quality_bound": -0.1}, "quality_bound must not be negative"),
        ({"quality_confidence": 95}, "quality_confidence must be from 0.5 to below 1, got 95"),
        ({"quality_confidence": 0.05}, "quality_confidence must be from 0.5 to below 1"),
        ({"quality_confidence": "nan"}, "quality_confidence"),
        ({"lease_seconds": -1}, "lease_seconds must be greater than zero"),
        ({"lease_seconds": float("inf")}, "lease_seconds"),
        ({"min_run": -1}, "min_run must not be negative"),
        ({"tail": "x"}, "tail"),
        ({"policy": "reckless"}, "policy"),
        ({"disk_codec": "lzma"}, "disk_codec"),
        ({"remote_codec": "int4"}, "remote_codec"),
        ({"encryption_key": "secret"}, "file:PATH"),
        ({"encryption_key": "env:"}, "env:NAME"),
        ({"semantic": "sometimes"}, "semantic"),
        ({"disk": "no"}, "disk must be true or false, got 'no'"),
        ({"tail": "x"}, "tail must be a whole number, got 'x'"),
        ({"policy": "lax"}, "policy must be one of off, exact, faithful, balanced, aggressive, "),
        ({"policy": "lax"}, "got 'lax'"),
        ({"lease_seconds": "long"}, "lease_seconds must be a number, got 'long'"),
        ({"polcy": "exact"}, "unknown setting 'polcy'; did you mean policy?"),
        ({"frobnicate": "1"}, "unknown setting 'frobnicate'; `kvshare config` lists all"),
        ({"home": 7}, "home"),
        ({"max_generation": 1.5}, "max_generation"),
    ],
)
def test_bad_settings_get_one_clear_line(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(settings, environ={})
    message = str(caught.value)
    assert says in message
    assert message.startswith("kvshare settings: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("block_tokens: [", "is not YAML"),
        ("\tblock_tokens: 3", "is not YAML"),
        ("- block_tokens", "must hold 'field: value' lines"),
        ("just text", "must hold 'field: value' lines"),
        ("1: 2", "unknown setting 1"),
        ("block_tokens: {a: 1}", "block_tokens"),
        ("host_bytes: {a: 1}", "host_bytes"),
    ],
)
def test_bad_files_get_one_clear_line(tmp_path: Path, text: str, says: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(file=file, environ={})
    message = str(caught.value)
    assert says in message
    assert "\n" not in message
    assert str(file) in message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(file=path, environ={})


@pytest.mark.parametrize("name", [5, 1.5, ["a.yaml"]])
def test_the_name_of_a_settings_file_is_text(name: object) -> None:
    """An engine's settings are JSON."""
    with pytest.raises(ConfigError, match="config must be the path of a file, got"):
        load_config({"config": name}, environ={})


def test_the_source_of_a_bad_value_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^environment variable KVSHARE_POLICY must .* 'lax'"):
        load_config(environ={"KVSHARE_POLICY": "lax"})
    with pytest.raises(ConfigError, match=r"^environment variable KVSHARE_HOST_BYTES: 'lots'"):
        load_config(environ={"KVSHARE_HOST_BYTES": "lots"})
    with pytest.raises(ConfigError, match=r"^config file .*: tail must not be negative"):
        load_config({"tail": 4}, file=write(tmp_path, "tail: -1"), environ={})


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_home() == Path("/cache/kvshare/store")
    assert Path(load_config(environ={}).home) == default_home()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/someone")
    assert default_home() == Path("/someone/.cache/kvshare/store")
    assert StoreConfig(home="~/store").home_path == Path("/someone/store")


def test_policies_from_strict_to_lax() -> None:
    assert policy_names() == ("off", "exact", "faithful", "balanced", "aggressive")


# --- names that are nearly right, and where a value came from -------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("KVSHARE_POLICI", "KVSHARE_POLICY"),
        ("KVSHARE_HOST_BYTE", "KVSHARE_HOST_BYTES"),
        ("KVSHARE_CONFIGS", "KVSHARE_CONFIG"),
    ],
)
def test_a_mistyped_variable_is_refused_with_the_name_that_was_meant(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"^environment variable {name}: did you mean {meant}\?"):
        load_config(environ={name: "exact"})


def test_variables_that_others_put_there_are_let_be() -> None:
    """Kubernetes makes these for every container beside a service named `kvshare`."""
    environ = {
        "KVSHARE_SERVICE_HOST": "10.0.0.1", "KVSHARE_SERVICE_PORT": "80",
        "KVSHARE_PORT": "tcp://10.0.0.1:80", "KVSHARE_PORT_80_TCP": "tcp://10.0.0.1:80",
        "KVSHARE_PORT_80_TCP_ADDR": "10.0.0.1", "KVSHARE_TAIL": "3",
    }  # fmt: skip
    assert load_config(environ=environ).tail == 3
    assert unknown_variables(environ) == sorted(environ.keys() - {"KVSHARE_TAIL"})


def test_where_each_value_came_from(tmp_path: Path) -> None:
    file = write(tmp_path, "tail: 1\nmin_run: 2\n")
    found = load_settings(
        {"candidates": 5},
        file=file,
        environ={"KVSHARE_TAIL": "3"},
        defaults={"idle_exit_s": 600},
    )
    assert {name: found.sources[name] for name in ("tail", "min_run", "candidates")} == {
        "tail": "environment",
        "min_run": f"config file {file}",
        "candidates": "given",
    }
    assert set(found.sources) == set(FIELDS)
    assert (found.config.idle_exit_s, found.sources["idle_exit_s"]) == (600, "default")
    assert found.given() == {"tail": 3, "min_run": 2, "candidates": 5}
