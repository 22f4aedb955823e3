"""The requests are drawn anew and their values compared; the score is given planted faults."""

import json

import pytest

from lora_lib.calls import PARTS, PHRASINGS, TOOLS, VALUES, chats, few_shot, requests, score

ANSWER = '{"name": "get_weather", "arguments": {"city": "Oslo", "day": "05-17"}}'


def test_the_parts_share_no_phrasing_and_no_value():
    for i, part in enumerate(PARTS):
        for other in PARTS[i + 1:]:
            for tool in TOOLS:
                assert not set(PHRASINGS[tool][part]) & set(PHRASINGS[tool][other])
            for values in VALUES.values():
                assert values[part] and not set(values[part]) & set(values[other])


@pytest.mark.parametrize("part", PARTS)
def test_every_answer_is_a_valid_call(part):
    pairs = requests(500, 0, part)
    assert len(dict(pairs)) == 500
    for prompt, answer in pairs:
        assert all(score(answer, answer).values()), answer
        assert "{" not in prompt


def test_the_score_sees_each_fault():
    def verdict(said):
        return "".join(key[0] for key, right in score(said, ANSWER).items() if right)

    call = json.loads(ANSWER)
    assert verdict(ANSWER) == verdict(f"\n {ANSWER}\n") == "evn"
    assert verdict(json.dumps({"arguments": {"day": "05-17", "city": "Oslo"},
                               "name": "get_weather"})) == "evn"
    assert verdict(json.dumps(call | {"arguments": {"city": "Oslo"}})) == "vn"
    assert verdict(json.dumps(call | {"arguments": {"day": "05-17"}})) == "n"
    assert verdict(json.dumps(call | {"arguments": {"city": "Oslo", "room": "hall"}})) == "n"
    assert verdict(json.dumps(call | {"id": 1})) == "n"
    for said in ("", "Oslo", "[]", "null", f"```json\n{ANSWER}\n```", ANSWER + ".", "[" * 10**5):
        assert verdict(said) == "", said


def test_messages():
    (system, user, assistant), = chats(1, 3, "test")
    assert [user["content"], assistant["content"]] == list(requests(1, 3, "test")[0])
    assert [m["role"] for m in (system, user, assistant)] == ["system", "user", "assistant"]
    assert [m["role"] for m in few_shot(2, 0)] == ["user", "assistant"] * 2


def test_bad_input():
    with pytest.raises(ValueError, match="part must be .* got 'dev'"):
        requests(1, 0, "dev")
    with pytest.raises(ValueError, match="n must be between 0 and 2000, got 2001"):
        requests(2001, 0)
