"""Fields of requests that templates see, by chat completions and by `/apply-template`."""

import pytest

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


def test_the_prompt_of_a_conversation(serve):
    client, _, _ = serve(template_kwargs={"who": "A"}, chat_template="{{ who }}:{{ messages[0].content }}")
    ask = lambda **more: client.post("/apply-template", json={"messages": MESSAGES} | more).json()["prompt"]
    assert ask() == "A:hi"
    assert ask(chat_template_kwargs={"who": "B"}) == "B:hi"
    assert ask(chat_template_kwargs={"template": "x", "kwargs": "y"}) == "A:hi"


@pytest.mark.parametrize("name", ["tools", "messages", "bos_token", "tokenize", "self", "_x"])
@pytest.mark.parametrize("route", [CHAT, "/apply-template"])
def test_variables_that_a_request_may_not_name_are_refused(serve, route, name):
    client, engine, _ = serve(chat_template="{{ messages[0].content }}")
    body = {"messages": MESSAGES, "chat_template_kwargs": {name: "x"}}
    answer = client.post(route, json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "chat_template_kwargs"
    assert answer.json()["error"]["message"].startswith(
        f"chat_template_kwargs must not hold the key '{name}'"
    )
    assert not engine.submitted


def test_a_request_says_whether_to_think_by_either_name(serve):
    template = "{{ thinking }} {{ enable_thinking }}"
    client, _, _ = serve(template_kwargs={"enable_thinking": False}, chat_template=template)
    ask = lambda **kwargs: client.post(
        "/apply-template", json={"messages": MESSAGES, "chat_template_kwargs": kwargs}
    ).json()["prompt"]
    assert ask() == "False False"
    assert ask(thinking=True) == ask(enable_thinking=True) == "True True"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"reasoning_effort": "none"}, "False False"),
        ({"reasoning_effort": "minimal"}, "False False"),
        ({"reasoning_effort": "high"}, "True True"),
        ({"reasoning_effort": None}, "1 1"),
        ({"reasoning_effort": "high", "chat_template_kwargs": {"thinking": False}}, "False False"),
        ({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, "True True"),
    ],
    ids=["none", "minimal", "high", "null", "thinking said too", "enable_thinking said too"],
)
def test_reasoning_effort_says_whether_to_think(serve, fields, told):
    template = "{{ thinking }} {{ enable_thinking }}"
    client, engine, service = serve(template_kwargs={"thinking": 1}, chat_template=template)
    assert client.post("/apply-template", json={"messages": MESSAGES} | fields).json()["prompt"] == told
    assert client.post("/v1/chat/completions", json={"messages": MESSAGES} | fields).status_code == 200
    assert service.model.tokenizer.decode(engine.submitted[-1].request.prompt).strip() == told
