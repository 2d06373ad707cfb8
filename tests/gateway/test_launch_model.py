"""Model names, and the manifest that proves a prepared folder whole."""

import json

import pytest

from gateway.launch.errors import LaunchError
from gateway.launch.model import MANIFEST, prepare, whats_wrong, write_manifest


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text('{"max_position_embeddings": 2048}')
    (made / "model.safetensors").write_bytes(bytes(1000))
    return made


def test_a_folder_is_whole_only_with_its_manifest(folder):
    assert whats_wrong(folder) == "it is unfinished"
    write_manifest(folder)
    assert whats_wrong(folder) == ""


def test_one_flipped_bit_is_noticed(folder):
    write_manifest(folder)
    (folder / "model.safetensors").write_bytes(bytes(999) + b"\x01")
    assert whats_wrong(folder) == "model.safetensors has changed"


def test_a_missing_file_is_noticed(folder):
    write_manifest(folder)
    (folder / "config.json").unlink()
    assert whats_wrong(folder) == "config.json is missing"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"recipe": 1, "files": 3}'])
def test_a_manifest_that_makes_no_sense_is_a_reason_not_a_crash(folder, text):
    (folder / MANIFEST).write_text(text)
    assert whats_wrong(folder) == "its manifest cannot be read"


def test_another_recipe_is_made_again(folder):
    write_manifest(folder)
    manifest = json.loads((folder / MANIFEST).read_text()) | {"recipe": 0}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert whats_wrong(folder) == "made by another version"


def test_a_directory_is_used_where_it_is(folder, tmp_path):
    model = prepare(str(folder), tmp_path)
    assert (model.path, model.name, model.context_tokens) == (folder, "model", 2048)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "~/nothing-here", "nothing", "a/b/c"])
def test_a_model_that_is_nowhere_is_a_sentence(name, tmp_path):
    with pytest.raises(LaunchError, match="no model directory at"):
        prepare(name, tmp_path)


def test_a_directory_without_config_or_weights_is_a_sentence(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(LaunchError, match=r"no \*\.safetensors"):
        prepare(str(folder), tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(LaunchError, match=r"no config\.json"):
        prepare(str(folder), tmp_path)
