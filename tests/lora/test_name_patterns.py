"""Which key of a pattern a name takes: PEFT is the judge; hostile keys end in time."""

import signal
import time

import pytest
from peft.utils.other import get_pattern_key

from mtrain.lora import name_patterns
from mtrain.lora.name_patterns import first_matches, match_names

NAMES = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 1, 11)
    for name in (
        "self_attn.q_proj",
        "self_attn.qk_proj",
        "mlp.gate.weight",
        "mlp.up_proj",
        "mlp.experts.gate_up_proj",
        "mlp.experts.0.up_proj",
        "mlp.experts.10.up_proj",
    )
] + ["model.embed_tokens", "lm_head"]

KEYS = [
    ["q_proj"],
    ["proj", "up_proj"],
    ["layers.1.self_attn.q_proj", "q_proj", "model.layers.1.self_attn.q_proj"],
    [r"layers\.1\.self_attn\.q_proj"],
    ["^model.layers.0.mlp.up_proj", "^layers.1.mlp.up_proj", "^up_proj"],
    [r".*\.gate_up_proj"],
    [r"experts.\d+.up_proj", "up_proj"],
    [r"layers.\d+.mlp.experts.\d+.up_proj"],
    [r"layers.\d+.mlp.experts.0.up_proj"],
    ["up_proj", r"experts\.0\.up_proj"],
    [r"(q|k)_proj", "q_proj"],
    ["q_proj", r"(q|k)_proj"],
    [r".*q.*"],
    [r"layers\.[01]\..*", "lm_head"],
    ["lm_head$"],
    ["q.*|up_proj"],
    [r"experts\.1\d\.up_proj"],
    ["mlp.gate.weight"],
    ["mlp.gate"],
    [],
]


@pytest.mark.parametrize("keys", KEYS, ids=str)
def test_names_take_the_key_that_peft_gives_them(keys):
    expected = {name: get_pattern_key(keys, name) for name in NAMES}
    expected = {name: key for name, key in expected.items() if key in keys}
    assert first_matches(keys, NAMES) == expected


def test_a_whole_name_is_a_key_too():
    assert first_matches(NAMES, NAMES) == {name: name for name in NAMES}


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (r"(.*)*\.(.*)*\.(.*)*x", "takes more than"),
        (r"(a|a|.)*(.*.*.*.*.*)*b", "takes more than"),
        ("(", "is not a regular expression"),
        ("[a", "is not a regular expression"),
        ("(" * 5000, "is longer than"),
    ],
)
def test_hostile_keys_are_refused_in_time(key, reason):
    start = time.monotonic()
    with pytest.raises(ValueError, match=reason):
        first_matches([key], NAMES)
    assert time.monotonic() - start < 15


def test_many_slow_keys_end_together():
    slow = [rf"(.*.*.*.*.*)*_{index}" for index in range(10_000)]
    start = time.monotonic()
    with pytest.raises(ValueError, match="take"):
        first_matches(slow, ["a" * 12])
    assert time.monotonic() - start < 30


def test_a_key_for_each_of_many_modules_is_quick():
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.up_proj"
        for layer in range(48)
        for expert in range(128)
    ]
    start = time.monotonic()
    assert first_matches(names, names) == {name: name for name in names}
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(.*)*(.*)*(.*)*x", "more than 0.1 seconds"),
        (r"((a|.)+)+!", "more than 0.1 seconds"),
        ("(?i)" + "[\\x00-\U0010ffff]" * 100, "more than 0.1 seconds"),
        ("(" * 490 + ")" * 490, "nested"),
        ("a{99999999999}", "not a regular expression"),
        ("a" * 1001, "longer than 1,000 characters"),
    ],
    ids=["repeats", "choices", "classes", "groups", "count", "length"],
)
def test_a_hostile_pattern_ends_soon_and_is_refused(pattern, message, monkeypatch):
    """T26"""
    monkeypatch.setattr(name_patterns, "_PATTERN_SECONDS", 0.1)
    handler = signal.getsignal(signal.SIGVTALRM)
    start = time.monotonic()
    with pytest.raises(ValueError, match=message):
        match_names(pattern, ["model.layers.10.self_attn.q_proj" * 2])
    assert time.monotonic() - start < 5
    assert signal.getsignal(signal.SIGVTALRM) == handler
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_patterns_match_whole_names_or_anywhere():
    names = ["a.q_proj", "b.q_proj", "b.q_proj.more"]
    assert match_names(r".\.q_proj", names) == {"a.q_proj", "b.q_proj"}
    assert match_names("q_proj", names) == set()
    assert match_names("b.q", names, anywhere=True) == {"b.q_proj", "b.q_proj.more"}
