import json

import pytest

from mtrain.data.formats import Conversation, read_conversations
from mtrain.data.rows import BadRow, Place, Row


def convert(*rows, columns=None):
    placed = [Row(Place("f.jsonl", number), row) for number, row in enumerate(rows, start=1)]
    return list(read_conversations(placed, columns=columns))


def said(conversation):
    return [(message["role"], message["content"]) for message in conversation.messages]


def test_alpaca_joins_instruction_and_input():
    row = {"instruction": "Add.", "input": "1 + 1", "output": "2", "system": "Be brief."}
    (result,) = convert({**row, "history": [["Hi", "Hello"]]})
    assert said(result) == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Add.\n1 + 1"),
        ("assistant", "2"),
    ]
    (without,) = convert({"instruction": "Add.", "input": None, "output": "2"})
    assert said(without) == [("user", "Add."), ("assistant", "2")]


def test_query_and_response_take_a_history():
    (result,) = convert({"query": "q2", "response": "r2", "history": '[["q1", "r1"]]'})
    assert [text for _, text in said(result)] == ["q1", "r1", "q2", "r2"]


def test_sharegpt_roles_calls_and_tools():
    call = {"name": "add", "arguments": {"a": 1}}
    (result,) = convert(
        {
            "conversations": [
                {"from": "human", "value": "1 + 1?"},
                {"from": "function_call", "value": json.dumps(call)},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "It is 2."},
            ],
            "system": "Use tools.",
            "tools": json.dumps([{"name": "add", "parameters": {}}]),
        }
    )
    assert said(result) == [
        ("system", "Use tools."),
        ("user", "1 + 1?"),
        ("assistant", ""),
        ("tool", "2"),
        ("assistant", "It is 2."),
    ]
    assert result.messages[2]["tool_calls"] == [{"type": "function", "function": call}]
    assert result.tools == ({"type": "function", "function": {"name": "add", "parameters": {}}},)


def test_messages_keep_reasoning_calls_and_loss():
    call = {"id": "1", "function": {"name": "add", "arguments": '{"a": 1}'}}
    (result,) = convert(
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hi"}], "loss": None},
                {"role": "assistant", "content": None, "tool_calls": [call], "loss": False},
                {"role": "tool", "content": "2", "tool_call_id": "1"},
                {"role": "assistant", "content": "2", "reasoning_content": "easy", "loss": True},
            ]
        }
    )
    user, calling, tool, answer = result.messages
    assert user == {"role": "user", "content": "hi"}
    assert calling["loss"] is False
    assert calling["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert tool["tool_call_id"] == "1"
    assert (answer["loss"], answer["reasoning_content"]) == (True, "easy")


def test_columns_are_renamed():
    (result,) = convert({"Q": "q", "A": "a"}, columns={"Q": "query", "A": "response"})
    assert said(result) == [("user", "q"), ("assistant", "a")]


def test_text_rows_are_plain_documents():
    (result,) = convert({"text": "Once upon a time."})
    assert (result.messages, result.text) == ((), "Once upon a time.")


def test_an_unknown_layout_names_the_columns_found():
    with pytest.raises(ValueError, match=r"f\.jsonl, line 1: no known layout .* 'a', 'b'; use"):
        convert({"a": 1, "b": 2})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": None}, "messages must be a non-empty list, found null"),
        ({"messages": []}, "messages must be a non-empty list"),
        ({"messages": "[1"}, "messages is not valid JSON"),
        ({"messages": ["hi"]}, r"messages\[0\] must be an object, found str"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\].content .* null"),
        ({"messages": [{"role": "user", "content": 3}]}, "must be text, found int"),
        ({"messages": [{"role": "owl", "content": ""}]}, "role is 'owl'; known are system"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "no assistant message"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "no assistant message"),
        ({"query": "q", "response": float("nan")}, "no 'messages' column, unlike the file's first"),
        (
            {"messages": [{"role": "assistant", "content": "hi"}], "images": ["1.jpg"]},
            "has images; only text",
        ),
        (
            {"messages": [{"role": "assistant", "content": "hi"}], "tools": 3},
            "tools must be a list of objects, found int",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"arguments": {}}]}]},
            "a tool call needs a name",
        ),
    ],
)
def test_a_row_that_does_not_fit_is_bad_with_its_reason(row, reason):
    """T27."""
    good = {"messages": [{"role": "assistant", "content": "hi"}]}
    first, bad, last = convert(good, row, good)
    assert isinstance(first, Conversation)
    assert isinstance(last, Conversation)
    assert isinstance(bad, BadRow)
    assert bad.place.number == 2
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(bad.reason)


@pytest.mark.parametrize("row", [{"query": "\ud800", "response": "r"}, {"text": "\udfff"}])
def test_half_a_surrogate_pair_is_a_bad_row(row):
    """T27: JSON can spell it (`\\ud800`), UTF-8 and hence tokenizers cannot."""
    (result,) = convert(json.loads(json.dumps(row)))
    assert isinstance(result, BadRow)
    assert result.reason == "holds half of a surrogate pair, which is no text"


def test_whole_surrogate_pairs_are_text():
    (result,) = convert(json.loads('{"query": "\\ud83d\\ude00", "response": "r"}'))
    assert said(result)[0] == ("user", "\U0001f600")


def test_null_answers_are_bad():
    """T27."""
    (bad,) = convert({"instruction": "Add.", "input": "", "output": None})
    assert bad.reason == "output must be text, found null"


def test_bad_lines_pass_through():
    bad = BadRow(Place("f.jsonl", 1), "invalid JSON")
    assert list(read_conversations([bad])) == [bad]
