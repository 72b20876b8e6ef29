from pathlib import Path

import pytest

from mtrain.data.formats import Conversation, read_conversations
from mtrain.data.rows import Place, Row, read_rows
from mtrain.data.template import ChatTemplate, SampleRefused, load_tokenizer
from tests.data.tiny_tokenizer import (
    CHATML,
    INSTRUCT,
    MARKED,
    MOVING_TOOLS,
    NEVER_ENDING,
    REWRITING,
    WITHOUT_PROMPT,
    make_tokenizer,
    save_tokenizer,
)

SHARED = Path(__file__).parents[3] / "shared" / "data"
QWEN3 = SHARED / "qwen3_tokenizer"
TOOLS = ({"type": "function", "function": {"name": "add", "parameters": {}}},)


def chat(*texts, tools=(), **last):
    """User and assistant in turns; keywords go to the last message."""
    messages = [
        {"role": ("user", "assistant")[index % 2], "content": text}
        for index, text in enumerate(texts)
    ]
    messages[-1].update(last)
    return Conversation(Place("f", 1), tuple(messages), tools)


def spans(template, conversation):
    rendered = template.render(conversation)
    return [rendered.text[start:end] for start, end in rendered.spans]


@pytest.mark.parametrize(
    ("source", "end"),
    [(CHATML, "<|im_end|>"), (MARKED, "<|im_end|>"), (WITHOUT_PROMPT, "<|im_end|>")],
)
def test_loss_is_on_answers_and_their_end_of_turn_alone(source, end):
    template = ChatTemplate(make_tokenizer(source))
    assert spans(template, chat("q1", "a1", "q2", "a2")) == [f"a1{end}", f"a2{end}"]


def test_a_template_without_a_generation_prompt_keeps_the_space_of_the_answer():
    template = ChatTemplate(make_tokenizer(INSTRUCT))
    conversation = chat("q1", "a1", "q2", "a2")
    assert spans(template, conversation) == [" a1</s>", " a2</s>"]
    assert template.render(conversation).text.count("<s>") == 1


def test_a_template_that_rewrites_history_gives_the_spans_of_the_final_text():
    template = ChatTemplate(make_tokenizer(REWRITING))
    conversation = chat("q1", "<think>\nlong\n</think>\n\na1", "q2", "<think>\nwhy\n</think>\n\na2")
    assert spans(template, conversation) == [
        "a1<|im_end|>",
        "<think>\nwhy\n</think>\n\na2<|im_end|>",
    ]


def test_an_empty_think_block_is_learnt_unless_the_prompt_has_it():
    conversation = chat("q1", "a1", "q2", "a2")
    thinking = ChatTemplate(make_tokenizer(REWRITING))
    assert spans(thinking, conversation)[1] == "<think>\n\n</think>\n\na2<|im_end|>"
    not_thinking = ChatTemplate(make_tokenizer(REWRITING), enable_thinking=False)
    assert spans(not_thinking, conversation) == ["a1<|im_end|>", "a2<|im_end|>"]


def test_reasoning_in_front_of_a_tool_call_is_dropped_later_and_still_right():
    """The prompt of the first turn holds what the final text does not: the second proof is used."""
    messages = (
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "<think>\nfirst\n</think>\n\ncalling"},
        {"role": "tool", "content": "result"},
        {"role": "assistant", "content": "<think>\nsecond\n</think>\n\na1"},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "a2"},
    )
    template = ChatTemplate(make_tokenizer(REWRITING))
    assert spans(template, Conversation(Place("f", 1), messages)) == [
        "calling<|im_end|>",
        "a1<|im_end|>",
        "<think>\n\n</think>\n\na2<|im_end|>",
    ]


def test_tools_that_move_with_the_last_question_do_not_disturb_earlier_turns():
    template = ChatTemplate(make_tokenizer(MOVING_TOOLS))
    conversation = chat("q1", "a1", "q2", "a2", tools=TOOLS)
    assert spans(template, conversation) == ["a1<|im_end|>", "a2<|im_end|>"]
    assert template.render(conversation).text.index("TOOLS") > 0


def test_tool_calls_have_loss_and_results_do_not():
    messages = (
        {"role": "user", "content": "1 + 1?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}],
        },
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    )
    template = ChatTemplate(make_tokenizer(CHATML))
    call, answer = spans(template, Conversation(Place("f", 1), messages, TOOLS))
    assert call == '<call>{"name": "add", "arguments": {}}</call><|im_end|>'
    assert answer == "It is 2.<|im_end|>"


@pytest.mark.parametrize("source", [CHATML, MARKED])
def test_a_message_can_be_kept_out_of_the_loss(source):
    template = ChatTemplate(make_tokenizer(source))
    assert spans(template, chat("q1", "a1", "q2", "a2", loss=False)) == ["a1<|im_end|>"]
    with pytest.raises(SampleRefused, match="no assistant message with loss"):
        template.render(chat("q1", "a1", loss=False))


def test_what_follows_the_last_answer_is_left_out():
    template = ChatTemplate(make_tokenizer(CHATML))
    assert template.render(chat("q1", "a1", "q2")) == template.render(chat("q1", "a1"))


def test_the_default_system_message_gives_way_to_the_conversation():
    template = ChatTemplate(make_tokenizer(CHATML), system="default")
    assert "system\ndefault<|im_end|>" in template.render(chat("q", "a")).text
    own = Conversation(
        Place("f", 1), ({"role": "system", "content": "own"}, *chat("q", "a").messages)
    )
    assert "default" not in template.render(own).text


def test_a_turn_ends_at_its_first_end_token_whatever_the_user_writes():
    """The last turn ends with another token than the earlier ones, which the user quotes."""
    source = CHATML.replace("'<|im_end|>\\n'", "'</s>' if loop.last else '<|im_end|>\\n'")
    assert source != CHATML
    template = ChatTemplate(make_tokenizer(source))
    found = spans(template, chat("q", "a1", "what is </s>?", "a2"))
    assert found == ["a1<|im_end|>", "a2</s>"]


def test_an_answer_with_the_end_of_turn_token_is_refused():
    template = ChatTemplate(make_tokenizer(CHATML))
    with pytest.raises(SampleRefused, match=r"contains the end-of-turn token <\|im_end\|>"):
        template.render(chat("q", "say <|im_end|> twice"))


def test_messages_that_the_template_rejects_are_refused_with_its_words():
    template = ChatTemplate(make_tokenizer(INSTRUCT), system="x")
    with pytest.raises(SampleRefused, match="rejects the messages: only user and assistant"):
        template.render(chat("q", "a"))


def test_a_template_that_leaves_an_answer_out_is_refused():
    cut = CHATML.replace("m.content }}", "m.content[:30] }}")
    template = ChatTemplate(make_tokenizer(cut))
    with pytest.raises(SampleRefused, match="leaves out text"):
        template.render(chat("q", "x" * 31))


def test_a_template_that_shouts_at_the_past_is_refused():
    """What comes before an answer depends on what follows it, and there is no way to be sure."""
    loud = CHATML.replace(
        "'<|im_start|>' + m.role",
        "('<|IM_START|>' if messages | length > 4 and not loop.last else '<|im_start|>') + m.role",
    )
    template = ChatTemplate(make_tokenizer(loud))
    assert len(spans(template, chat("q", "a"))) == 1
    with pytest.raises(SampleRefused, match="rewrites the conversation before"):
        template.render(chat("q", "a", "q", "a", "q", "a"))


def test_templates_cannot_leave_the_sandbox():
    """T27."""
    template = ChatTemplate(make_tokenizer(CHATML))
    template._tokenizer.chat_template = "{{ messages.__class__.__mro__ }}"
    with pytest.raises(SampleRefused, match="rejects the messages"):
        template.render(chat("q", "a"))


def test_a_base_model_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"no chat template \(a base model\?\)"):
        ChatTemplate(make_tokenizer(None))


def test_a_template_that_never_ends_a_turn_is_refused():
    with pytest.raises(ValueError, match="ends no assistant turn with a special token"):
        ChatTemplate(make_tokenizer(NEVER_ENDING))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_folder_runs_no_code(tmp_path):
    """T25."""
    folder = save_tokenizer(tmp_path)
    config = folder / "tokenizer_config.json"
    config.write_text(
        config.read_text().replace("{", '{"auto_map": {"AutoTokenizer": ["evil.T", null]},', 1)
    )
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    assert load_tokenizer(folder).is_fast


@pytest.mark.skipif(not QWEN3.is_dir(), reason="needs the shared Qwen3 tokenizer")
@pytest.mark.parametrize("name", ["alpaca_en_demo", "alpaca_zh_demo", "glaive_toolcall_en_demo"])
@pytest.mark.parametrize("enable_thinking", [None, False])
def test_every_real_conversation_gives_exactly_its_answers(name, enable_thinking):
    """The real Qwen3 template on real data: nothing is refused, each span is one message."""
    template = ChatTemplate(load_tokenizer(QWEN3), enable_thinking=enable_thinking)
    for conversation in list(read_conversations(read_rows(SHARED / f"{name}.json")))[:60]:
        answers = [m for m in conversation.messages if m["role"] == "assistant"]
        found = spans(template, conversation)
        assert len(found) == len(answers)
        for index, (span, message) in enumerate(zip(found, answers, strict=True)):
            empty = "<think>\n\n</think>\n\n"
            learns_empty = index == len(answers) - 1 and enable_thinking is None
            body = span.removeprefix(empty)
            assert span.startswith(empty) == learns_empty
            if "tool_calls" in message:
                assert body.startswith('<tool_call>\n{"name": "')
                assert body.endswith("}\n</tool_call><|im_end|>")
            else:
                assert body.strip("\n") == message["content"].lstrip("\n") + "<|im_end|>"


def test_rows_go_from_columns_to_spans():
    (conversation,) = read_conversations([Row(Place("f", 1), {"query": "q", "response": "r"})])
    assert spans(ChatTemplate(make_tokenizer(CHATML)), conversation) == ["r<|im_end|>"]
