import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from mtrain.cli import demo
from mtrain.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "model"
    assert demo.run(["--output_dir", str(folder), "--hidden_size", "64", "--num_layers", "2"]) == 0
    return folder


def test_transformers_loads_the_demo_checkpoint_with_nothing_missing(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.num_hidden_layers == 2


def test_the_tokenizer_fits_the_model_and_gives_every_text_back(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id
    for text in ("Who are you?", "你是谁？", "unseen: žluťoučký 🐎"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_chat_template_ends_every_message(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_writing_it_again_gives_the_same_files(folder, tmp_path):
    demo.run(["--output_dir", str(tmp_path), "--hidden_size", "64", "--num_layers", "2"])
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--output_dir"),
        (["--output_dir", "{new}", "--hidden_size", "96"], "--hidden_size 96: must be a multiple"),
        (["--output_dir", "{new}", "--hidden_size", "x"], "--hidden_size"),
        (["--output_dir", "{new}", "--num_layers", "0"], "--num_layers 0: must be at least 1"),
        (["--output_dir", "{full}"], "not an empty folder"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(words, message, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("mine")
    places = {"new": tmp_path / "new", "full": full}
    with pytest.raises(ValueError, match=message) as caught:
        demo.run([word.format(**places) for word in words])
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert [path.name for path in full.iterdir()] == ["file"]


def test_a_mistake_ends_the_command_with_exit_code_2(capsys):
    assert main(["demo", "--output_dirs", "x"]) == 2
    assert capsys.readouterr().err.startswith("megatron demo: error: ")
