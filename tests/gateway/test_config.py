import pytest

from cacheengine.config import ConfigError
from gateway.config import GatewayConfig


def load(**env: str) -> GatewayConfig:
    return GatewayConfig.load(env={f"CAIRN_{name.upper()}": value for name, value in env.items()})


def test_workers_are_read_from_one_variable() -> None:
    config = load(workers="a=http://h:1, org/b=https://h:2/")
    assert [(w.model, w.url) for w in config.static_workers()] == [
        ("a", "http://h:1"),
        ("org/b", "https://h:2"),
    ]
    assert config.sources() == []


def test_names_to_resolve_and_a_file_are_sources_of_their_own() -> None:
    config = load(workers="file:///w.yaml,a=dns://svc:8000,a=http://h:1")
    assert len(config.static_workers()) == 1
    assert [source.name for source in config.sources()] == ["file", "dns"]


def test_an_alias_names_a_model() -> None:
    assert load(aliases="gpt-4=org/m, small=m2").alias_map() == {"gpt-4": "org/m", "small": "m2"}


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({"workers": "http://h:1"}, "should read model=http"),
        ({"policy": "best"}, "none of predicted_ttft"),
        ({"policy": ""}, "none of predicted_ttft"),
        ({"shadow_policy": "best"}, "none of predicted_ttft"),
        ({"aliases": "a"}, "should read alias=model"),
        ({"workers": "m=dns://h"}, "should read model=http"),
        ({"port": "99999"}, "port"),
        ({"max_body_bytes": "lots"}, "max_body_bytes"),
        ({"idle_timeout_seconds": "0"}, "greater than 0"),
    ],
)
def test_a_bad_value_is_one_sentence_to_act_on(env: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load(**env)


def test_every_knob_says_what_it_is_for() -> None:
    assert all(field.description for field in GatewayConfig.model_fields.values())
