"""Settings: where a value comes from, and what a wrong one says."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest

from ollama_distributed.base.errors import Invalid
from ollama_distributed.node.cluster.live import read_live, with_live
from ollama_distributed.node.durations import duration_s
from ollama_distributed.node.ollama_environment import OLLAMA_NAMES, ollama_host
from ollama_distributed.node.settings import PREFIX, Settings, read_settings
from ollama_distributed.node.settings_errors import unknown_setting, unknown_variables


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*Settings.model_fields, "listen"]:
        monkeypatch.delenv(PREFIX + name.upper(), raising=False)
    for variable in [*OLLAMA_NAMES.values(), "OLLAMA_HOST"]:
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("300", 300),
        ("5m", 300),
        ("1h30m", 5400),
        ("-1", -1),
        ("-1m", -60),
        ("250ms", 0.25),
        ("0", 0),
        ("1.5s", 1.5),
    ],
)
def test_durations_are_gos(text: str, seconds: float) -> None:
    assert duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["5x", "", "m", "5 m", "1h-3m", "--1"])
def test_a_wrong_duration_is_refused_by_name(text: str) -> None:
    with pytest.raises(Invalid, match="keep_alive"):
        read_settings(keep_alive=text)


def test_flags_win_over_environment_over_file_over_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "node.yaml"
    config.write_text("num_parallel: 2\nmax_queue: 7\nkeep_alive: 10m\n")
    assert read_settings(config).num_parallel == 2
    monkeypatch.setenv("OLLAMA_NUM_PARALLEL", "3")
    assert read_settings(config).num_parallel == 3
    monkeypatch.setenv("OLLAMA_DISTRIBUTED_NUM_PARALLEL", "5")
    assert read_settings(config).num_parallel == 5
    settings = read_settings(config, num_parallel=6, max_queue=None)
    assert (settings.num_parallel, settings.max_queue, settings.keep_alive) == (6, 7, 600)
    assert read_settings().max_queue == 512


def test_lists_and_engines_come_from_one_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_DISTRIBUTED_ALLOWED_HOSTS", "llm.home, box ")
    monkeypatch.setenv("OLLAMA_DISTRIBUTED_ENGINES", '[{"name": "e", "kind": "echo"}]')
    settings = read_settings()
    assert settings.allowed_hosts == ["llm.home", "box"]
    assert settings.engines[0].kind == "echo"


@pytest.mark.parametrize("name", ["engines", "registries", "oidc"])
def test_a_variable_that_is_no_yaml_is_named_without_its_text(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"OLLAMA_DISTRIBUTED_{name.upper()}", "[{password: hunter2")
    with pytest.raises(Invalid, match=rf"{name}: it is no YAML: .*column") as refused:
        read_settings()
    assert "hunter2" not in refused.value.message


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1", "127.0.0.1:11434"),
        (":9000", "127.0.0.1:9000"),
        ("http://localhost:80/x", "localhost:80"),
        ("::1", "[::1]:11434"),
        ("[::1]:5", "[::1]:5"),
    ],
)
def test_ollama_host_replaces_ollamas_listener(
    text: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ollama_host(text) == address
    monkeypatch.setenv("OLLAMA_HOST", text)
    assert read_settings().listen == ["127.0.0.1:8080", address]
    assert read_settings(listen=["127.0.0.1:1"]).listen == ["127.0.0.1:1"]


def test_an_unknown_or_damaged_setting_is_named(tmp_path: Path) -> None:
    config = tmp_path / "node.yaml"
    with pytest.raises(Invalid, match="no settings file"):
        read_settings(config)
    config.write_text("num_paralel: 2\n")
    with pytest.raises(Invalid, match="num_paralel"):
        read_settings(config)
    config.write_text("- a\n")
    with pytest.raises(Invalid):
        read_settings(config)
    config.write_text("a: [")
    with pytest.raises(Invalid):
        read_settings(config)


def test_every_origin_is_never_allowed() -> None:
    with pytest.raises(Invalid, match="every web page"):
        read_settings(allowed_origins="*")


def test_a_key_of_an_engine_never_shows() -> None:
    settings = read_settings(engines=[{"name": "v", "kind": "openai", "api_key": "sk-canary"}])
    assert "sk-canary" not in repr(settings)
    assert "sk-canary" not in settings.model_dump_json()


def test_labels_come_as_pairs_from_flags_environment_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_settings(labels=["zone=a", "gpu=h200"]).labels == {"zone": "a", "gpu": "h200"}
    monkeypatch.setenv("OLLAMA_DISTRIBUTED_LABELS", "zone=b,rack=")
    assert read_settings().labels == {"zone": "b", "rack": ""}
    config = tmp_path / "node.yaml"
    config.write_text("labels:\n  zone: c\n")
    monkeypatch.delenv("OLLAMA_DISTRIBUTED_LABELS")
    assert read_settings(config).labels == {"zone": "c"}


@pytest.mark.parametrize("label", ["zone", "=a", "zo ne=a", "zone=a b", "a" * 64 + "=x"])
def test_a_label_that_is_none_is_refused(label: str) -> None:
    with pytest.raises(Invalid, match="labels"):
        read_settings(labels=[label])


def test_what_the_cluster_sets_is_read_as_the_nodes_own_file_would_be() -> None:
    values = read_live(
        {"keep_alive": "10m", "allowed_origins": "https://a,https://b", "flash_attention": "auto"}
    )
    assert values == {
        "keep_alive": 600.0,
        "allowed_origins": ["https://a", "https://b"],
        "flash_attention": None,
    }
    settings = read_settings(max_queue=7)
    assert with_live(settings, {"keep_alive": "1m"}).keep_alive == 60.0
    assert with_live(settings, {"keep_alive": "1m"}).max_queue == 7


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"keep_alive": "soon"}, "keep_alive: .*duration"),
        ({"max_queue": 0}, "max_queue: .*greater than or equal to 1"),
        ({"allowed_origins": ["*"]}, "allowed_origins: .*every web page"),
        ({"data_dir": "/tmp"}, "data_dir belongs to each node"),
        ({"nonsense": 1}, "there is no setting 'nonsense'; all of them are in docs"),
        ({"kep_alive": 1}, "there is no setting 'kep_alive'; did you mean keep_alive"),
    ],
)
def test_what_the_cluster_may_not_set_is_refused_by_name(values: dict[str, object], why: str) -> None:
    with pytest.raises(Invalid, match=why):
        read_live(values)


def test_a_slip_in_a_setting_is_told_with_what_was_meant(tmp_path: Path) -> None:
    file = tmp_path / "node.yaml"
    file.write_text("keep_alve: 10m\nmax_queue: soon\nload_timeout: later\nengines: [{nmae: x}]\n")
    with pytest.raises(Invalid) as refused:
        read_settings(file)
    said = refused.value.message
    assert "there is no setting 'keep_alve'; did you mean keep_alive?" in said
    assert "load_timeout: 'later' is not a duration" in said
    assert "max_queue: " in said
    assert "engines.0." in said


def test_variables_that_are_no_settings_are_told() -> None:
    names = ["OLLAMA_DISTRIBUTED_KEEP_ALVE", "OLLAMA_DISTRIBUTED_KEEP_ALIVE", "OLLAMA_DISTRIBUTED_API_KEY"]
    names += ["OLLAMA_DISTRIBUTED_XYZZY", "OLLAMA_HOST", "_OLLAMA_DISTRIBUTED_COMPLETE"]
    assert unknown_variables(names, PREFIX, Settings.model_fields) == [
        "OLLAMA_DISTRIBUTED_KEEP_ALVE is ignored: there is no such setting; "
        "did you mean OLLAMA_DISTRIBUTED_KEEP_ALIVE?",
        "OLLAMA_DISTRIBUTED_XYZZY is ignored: there is no such setting",
    ]


def test_of_a_megabyte_that_is_no_setting_only_the_beginning_is_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(difflib, "get_close_matches", lambda name, *_: asked.append(name) or [])
    unknown_setting("x" * 1_000_000, ["keep_alive"])
    assert [len(name) for name in asked] == [80]
