"""A base that the command line does not name is the one that the folder of an adapter names."""

import json

import pytest

from mtrain.config import (
    ExportConfig,
    ModelConfig,
    SftConfig,
    TunerConfig,
    config_to_dict,
    resolve_export,
    resolve_sft,
)
from mtrain.config.saved_arguments import fill_base

COMMANDS = (ExportConfig, SftConfig)


def write(folder, **arguments):
    """An args.json; returns the name of its folder."""
    folder.mkdir(exist_ok=True)
    (folder / "args.json").write_text(json.dumps(arguments))
    return str(folder)


def filled(command=ExportConfig, *, adapters=(), mcore_adapter=None, **model):
    tuner = TunerConfig(adapters=adapters, mcore_adapter=mcore_adapter)
    return fill_base(command(model=ModelConfig(**model), tuner=tuner)).model


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["adapters", "mcore_adapter"])
def test_an_adapter_goes_with_the_base_that_it_names(tmp_path, command, flag):
    folder = write(tmp_path, model="owner/base", mcore_model=None, lr=3.0, adapters=["x"])
    given = {flag: (folder,) if flag == "adapters" else folder}
    assert filled(command, **given) == ModelConfig(model="owner/base")


def test_what_was_resolved_and_saved_is_found_again(tmp_path):
    for resolve, command in ((resolve_sft, SftConfig), (resolve_export, ExportConfig)):
        saved = config_to_dict(resolve(command(model=ModelConfig(model="a/b", use_hf=True))))
        model = filled(mcore_adapter=write(tmp_path, **saved))
        assert (model.model, model.mcore_model, model.use_hf) == ("a/b", None, True)


@pytest.mark.parametrize("given", [{"model": "mine"}, {"mcore_model": "mine"}])
def test_the_command_line_wins(tmp_path, given):
    folder = write(tmp_path, model="owner/base", mcore_model="/other", use_hf=True)
    model = filled(adapters=(folder,), **given)
    assert model == ModelConfig(**given)


def test_only_the_base_is_taken(tmp_path):
    saved = {"model": "owner/base", "torch_dtype": "float16", "model_type": "x", "hub_token": "x"}
    model = filled(adapters=(write(tmp_path, **saved),))
    assert model == ModelConfig(model="owner/base")


@pytest.mark.parametrize(
    ("saved", "given", "expected"), [(True, False, True), (False, True, True), (None, True, True)]
)
def test_the_hub_is_the_one_that_the_name_was_for(tmp_path, saved, given, expected):
    folder = write(tmp_path, model="owner/base", use_hf=saved)
    assert filled(adapters=(folder,), use_hf=given).use_hf is expected


def test_the_hub_is_not_changed_by_a_folder_that_names_no_base(tmp_path):
    assert filled(adapters=(write(tmp_path, use_hf=True),)).use_hf is ModelConfig().use_hf


@pytest.mark.parametrize("command", COMMANDS)
def test_a_torch_dist_model_without_a_config_names_where_it_came_from(tmp_path, command):
    folder = write(tmp_path, model="owner/base", mcore_model="/elsewhere")
    assert filled(command, mcore_model=folder) == ModelConfig(
        model="owner/base", mcore_model=folder
    )


def test_a_torch_dist_model_with_a_config_needs_no_other(tmp_path):
    folder = write(tmp_path, model="owner/base")
    (tmp_path / "config.json").write_text("{}")
    assert filled(mcore_model=folder) == ModelConfig(mcore_model=folder)


def test_an_adapter_of_a_torch_dist_model_leads_to_what_that_names(tmp_path):
    base = write(tmp_path / "base", model="owner/base")
    adapter = write(tmp_path / "adapter", model=None, mcore_model=base)
    assert filled(mcore_adapter=adapter) == ModelConfig(model="owner/base", mcore_model=base)


@pytest.mark.parametrize("saved", [{}, {"model": None}, {"model": 3}, {"model": ["a"]}], ids=str)
def test_a_folder_that_names_nothing_leaves_all_as_it_is(tmp_path, saved):
    """The checks then ask for --model."""
    assert filled(adapters=(write(tmp_path, **saved),)) == ModelConfig()


def test_folders_without_the_file_or_that_are_missing_are_left_to_the_checks(tmp_path):
    for adapter in (tmp_path, tmp_path / "missing", "owner/adapter"):
        assert filled(adapters=(str(adapter),)) == ModelConfig()
    missing = str(tmp_path / "missing")
    assert filled(mcore_model=missing) == ModelConfig(mcore_model=missing)
    assert filled() == ModelConfig()


@pytest.mark.parametrize(
    ("text", "reason"), [("{", "not a JSON file"), ("\udcff", "not a JSON file"), ("[]", "must be")]
)
def test_a_file_that_is_not_sound_is_refused_in_one_line(tmp_path, text, reason):
    (tmp_path / "args.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError) as caught:
        filled(adapters=(str(tmp_path),))
    assert str(caught.value).startswith(f"{tmp_path}/args.json: {reason}")
    assert "\n" not in str(caught.value)


def test_a_file_beside_a_base_that_is_given_is_not_opened(tmp_path):
    (tmp_path / "args.json").write_text("{")
    assert filled(adapters=(str(tmp_path),), model="mine") == ModelConfig(model="mine")
