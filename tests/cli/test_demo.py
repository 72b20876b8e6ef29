import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from mtrain.cli import demo


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


def test_a_folder_with_files_is_left_alone(folder):
    with pytest.raises(ValueError, match="not empty"):
        demo.run(["--output_dir", str(folder)])
