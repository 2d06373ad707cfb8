"""Generated pages are what the code says now, and every knob and metric is explained."""

import tomllib

import pytest

from gateway import docs


def test_the_configuration_page_is_fresh():
    assert (docs.ROOT / "docs" / "config.md").read_text() == docs.config_page(), "run `make docs`"


def test_the_metrics_page_is_fresh():
    assert (docs.ROOT / "docs" / "metrics.md").read_text() == docs.metrics_page(), "run `make docs`"


@pytest.mark.parametrize("config", [section[2] for section in docs.SECTIONS])
def test_every_knob_is_explained(config):
    assert all(field.description for field in config.model_fields.values())


def test_there_are_at_most_60_knobs():
    assert len({name for section in docs.SECTIONS for name in section[2].model_fields}) <= 60


def test_every_dependency_says_why_it_is_here():
    project = tomllib.loads((docs.ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(d for group in project["optional-dependencies"].values() for d in group),
    ]
    page = (docs.ROOT / "docs" / "dependencies.md").read_text()
    assert [name for d in wanted if f"`{(name := d.partition('==')[0])}`" not in page] == []
