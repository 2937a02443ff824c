"""Which file CONFIG means: a local one, a shipped one by its name, or a refusal that lists what there is."""

from pathlib import Path

import pytest

from lsr_scale import cli, config
from lsr_scale.config.shipped import find_run, shipped
from lsr_scale.errors import UserError
from tests.helpers.run_text import CONFIGS, MINIMAL


def test_the_package_has_every_configuration_of_the_checkout():
    assert {name: path.read_text() for name, path in shipped().items()} == {
        path.stem: path.read_text() for path in CONFIGS.glob("*.yaml")
    }


@pytest.mark.parametrize("words", ["mistral_lsr", "mistral_lsr.yaml", "configs/mistral_lsr.yaml"])
def test_a_shipped_run_is_found_by_its_name_from_an_empty_folder(words):
    assert find_run(words).read_text() == (CONFIGS / "mistral_lsr.yaml").read_text()
    assert config.load_run(words).model.name == "mistralai/Mistral-7B-v0.1"


@pytest.mark.parametrize("words", ["mistral_lsr", "mistral_lsr.yaml"])
def test_a_local_file_of_that_name_wins(words):
    Path("mistral_lsr.yaml").write_text(MINIMAL)
    assert find_run(words) == Path("mistral_lsr.yaml")
    assert config.load_run(words).model.name == "some/model"


def test_a_local_file_without_ending_wins_over_one_with_it():
    Path("mistral_lsr").write_text(MINIMAL)
    Path("mistral_lsr.yaml").write_text(MINIMAL.replace("some/model", "some/other"))
    assert config.load_run("mistral_lsr").model.name == "some/model"


def test_a_folder_of_that_name_is_no_configuration():
    Path("mistral_lsr").mkdir()
    assert find_run("mistral_lsr") == shipped()["mistral_lsr"]


def test_a_local_folder_configs_is_the_users():
    Path("configs").mkdir()
    with pytest.raises(UserError, match=r"configs/mistral_lsr.yaml: no such file; did you mean mistral_lsr"):
        find_run("configs/mistral_lsr.yaml")


@pytest.mark.parametrize("words", ["other/mistral_lsr.yaml", "./mistral_lsr", "mistral_lsr.json", "../mistral_lsr"])
def test_a_path_is_never_taken_for_a_name(words):
    with pytest.raises(UserError, match="no such file"):
        find_run(words)


def test_a_name_near_others_lists_those_alone():
    Path("run.yaml").write_text(MINIMAL)
    for wrong, meant in {"runn.yaml": "run.yaml", "mistral_lrs": "mistral_lsr"}.items():
        with pytest.raises(UserError) as caught:
            find_run(wrong)
        assert str(caught.value) == f"{wrong}: no such file; did you mean {meant}?"


def test_a_name_near_none_lists_what_there_is():
    Path("mine.yaml").write_text(MINIMAL)
    with pytest.raises(UserError) as caught:
        find_run("zzz")
    said = str(caught.value)
    assert said.startswith("zzz: no such file; there are files: mine.yaml")
    assert set(said.rpartition("by name, with the package: ")[2].split(", ")) == set(shipped())


def test_commands_take_a_name_and_say_which_file_it_is(capsys):
    assert cli.main(["config", "glue_mrpc_lsr", "--set", "adapter.rank=2"]) == 0
    said = capsys.readouterr()
    assert "rank: 2\n" in said.out
    assert said.err == f"note: glue_mrpc_lsr is {shipped()['glue_mrpc_lsr']}\n"
    Path("own.yaml").write_text(MINIMAL)
    assert cli.main(["config", "own.yaml"]) == 0
    assert capsys.readouterr().err == ""
