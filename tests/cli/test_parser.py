"""Command lines and YAML files become configurations."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mtrain.cli.parser import format_help, parse_config
from mtrain.config import ExportConfig, SftConfig, config_to_dict
from mtrain.config.fields import flag_specs
from mtrain.config.later import LATER
from mtrain.config.names import ABSENT, ARCHITECTURE, RENAMED
from tests.cli.commands import Command, commands_in

ROOT = Path(__file__).parents[2]
COMMANDS = commands_in(Path(__file__).with_name("commands.txt").read_text("utf-8"))
REFERENCE = ROOT.parent / "shared" / "reference" / "commands.md"
RECIPES = sorted((ROOT / "examples").rglob("*.sh"))


def parse(*words: str) -> SftConfig:
    return parse_config(SftConfig, words)


def message_of(*words: str) -> str:
    with pytest.raises(ValueError) as caught:
        parse(*words)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_commands_of_other_tools_users_are_read_as_written(command: Command) -> None:
    given = [word[2:] for word in command.words if word.startswith("--")]
    settings = config_to_dict(command.parse())
    assert len(given) >= 2
    assert set(given) <= settings.keys()


def test_all_commands_of_the_list_are_found() -> None:
    assert [command.name for command in COMMANDS] == ["sft", "export", "sft", "sft"] + [
        "export"
    ] * 5


@pytest.mark.skipif(not REFERENCE.is_file(), reason="the reference list is not part of the project")
def test_the_list_is_that_of_the_reference() -> None:
    reference = commands_in(REFERENCE.read_text("utf-8"))
    assert [c.parse() for c in reference] == [c.parse() for c in COMMANDS]


def test_recipes_are_read_by_the_parser() -> None:
    for path in RECIPES:
        text = path.read_text("utf-8")
        commands = commands_in(text)
        assert commands or "megatron sft" not in text, path
        for command in commands:
            command.parse()


def test_values_get_the_types_of_their_fields() -> None:
    config = parse(
        *("--lr", "1e-4", "--packing", "true", "--micro_batch_size", "2", "--max_length", "none"),
        *("--dataset", "a.json#10", "b/c", "--rope_scaling", '{"factor": 2.0}', "--report_to"),
        *("--moe_aux_loss_coeff", "1e-3", "--bf16", "false", "--recompute_granularity", "none"),
    )
    assert config.optimizer.lr == 1e-4
    assert config.data.packing is True
    assert config.training.micro_batch_size == 2
    assert config.template.max_length is None
    assert config.data.dataset == ("a.json#10", "b/c")
    assert config.model.rope_scaling == {"factor": 2.0}
    assert config.logging.report_to == ()
    assert config.moe.moe_aux_loss_coeff == (1e-3,)
    assert config.model.bf16 is False
    assert config.training.recompute_granularity == "none"


def test_the_last_of_repeated_flags_wins() -> None:
    config = parse("--lr", "1", "--dataset", "a", "b", "--lr=2", "--dataset", "c")
    assert config.optimizer.lr == 2
    assert config.data.dataset == ("c",)


def test_dashes_in_names_and_negative_numbers_are_understood() -> None:
    config = parse("--eval-iters", "-1", "--micro-batch-size=3", "--system", "- be brief")
    assert config.training.eval_iters == -1
    assert config.training.micro_batch_size == 3
    assert config.template.system == "- be brief"


def test_a_switch_without_value_is_true() -> None:
    assert parse("--packing", "--lr", "1").data.packing is True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--lr",), "--lr needs one value, got none"),
        (("--lr", "1", "2"), "--lr needs one value, got ['1', '2']"),
        (("--lr", "fast"), "--lr fast: must be a number"),
        (("--save_steps", "1.5"), "--save_steps 1.5: must be a whole number"),
        (("--packing", "yes"), "--packing yes: must be true or false"),
        (("--rope_scaling", "{a"), "--rope_scaling {a: not JSON"),
        (("--rope_scaling", "[1]"), "--rope_scaling [1]: must be a JSON object"),
        (("model", "--lr", "1"), "unexpected word 'model'"),
        (
            ("--micro_batchsize", "1"),
            "unknown flag --micro_batchsize: did you mean --micro_batch_s",
        ),
        (("--xqzvk", "1"), "unknown flag --xqzvk: see --help"),
        (("--train_type", "lora"), "--train_type is now --tuner_type"),
        (("--save", "x"), "--save is now --output_dir"),
        (("--num_layers", "4"), "--num_layers is read from the model's config.json"),
        (("--trust_remote_code", "true"), "--trust_remote_code is not a flag of mtrain: code of a"),
        (("--external_plugins", "x"), "--external_plugins is not a flag of mtrain: code of users"),
    ],
)
def test_mistakes_are_named_in_one_line(words: tuple[str, ...], message: str) -> None:
    assert message_of(*words).startswith(message)


def test_old_names_lead_to_flags_that_exist() -> None:
    known = config_to_dict(SftConfig()).keys()
    for old, new in RENAMED.items():
        assert new.split()[0].removeprefix("--") in known, old
    assert not known & (RENAMED.keys() | ABSENT.keys() | ARCHITECTURE)
    assert {row.flag for row in LATER} <= known | config_to_dict(ExportConfig()).keys()


def test_a_yaml_file_gives_flags_and_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: m\nlr: 1e-4\nmax_length: null\npacking: true\ndataset: [a, 'b#3']\n"
        "system: '--careful'\nrope_scaling: {factor: 2}\nval_dataset: []\nsave-steps: 7\n"
    )
    config = parse("--save_steps", "9", "--config", str(path), "--lr", "3e-4")
    assert config.model.model == "m"
    assert config.optimizer.lr == 3e-4
    assert config.template.max_length is None
    assert config.template.system == "--careful"
    assert config.data.packing is True
    assert config.data.dataset == ("a", "b#3")
    assert config.data.val_dataset == ()
    assert config.model.rope_scaling == {"factor": 2}
    assert config.checkpoint.save_steps == 9


def test_saved_arguments_are_a_config_file(tmp_path: Path) -> None:
    import json

    config = parse("--model", "m", "--dataset", "a", "b", "--lr", "3e-5", "--adam_eps", "1e-15")
    path = tmp_path / "args.json"
    path.write_text(json.dumps(config_to_dict(config)))
    assert parse("--config", str(path)) == config


def test_epochs_of_the_command_line_win_over_iterations_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "args.json"
    path.write_text('{"train_iters": 5, "num_train_epochs": null}')
    training = parse("--config", str(path), "--num_train_epochs", "3").training
    assert (training.train_iters, training.num_train_epochs) == (None, 3)
    both = parse("--config", str(path), "--num_train_epochs", "3", "--train_iters", "7").training
    assert (both.train_iters, both.num_train_epochs) == (7, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lrr: 1", "run.yaml: unknown flag --lrr: did you mean --lr?"),
        ("save_interval: 1", "run.yaml: --save_interval is now --save_steps"),
        ("- a", "run.yaml: must be a mapping of flag names to values"),
        ("a: [", "run.yaml: not a YAML file"),
        (None, "run.yaml: No such file"),
    ],
)
def test_a_wrong_yaml_file_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_text(content)
    assert message in message_of("--config", str(path))


@pytest.mark.parametrize("command", [SftConfig, ExportConfig])
def test_help_lists_every_flag_with_its_default(command: type) -> None:
    text = format_help(command, usage="megatron x")
    for name in config_to_dict(command()):
        assert f"\n  --{name} " in text
    assert "with the adapter. Only none for now." in text
    assert max(len(line) for line in text.splitlines()) <= 130


def test_every_flag_has_a_sentence_of_help() -> None:
    from mtrain.cli.parser import _sections

    for section in _sections(SftConfig).values():
        for spec in flag_specs(section):
            assert spec.help.endswith("."), spec.name


def test_help_answers_within_a_second_without_torch() -> None:
    code = (
        "import sys; from mtrain.cli.main import main; code = main(['sft', '--help']); "
        "heavy = {'torch', 'megatron', 'transformers', 'datasets', 'numpy', 'yaml'}; "
        "sys.exit(code or ', '.join(heavy & set(sys.modules)) or 0)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "--tensor_model_parallel_size" in done.stdout
    # Of a processor, because others may use the machine as well.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
