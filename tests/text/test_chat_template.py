"""Chat templates: what transformers offers them, and what goes wrong in them."""

from __future__ import annotations

import pytest

from toka.errors import ConfigError, RequestError
from toka.text.chat_template import ChatTemplate


def _render(source: str, messages: list[dict] | None = None, **kwargs: object) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages or [{"role": "user", "content": "hi"}], **kwargs)


def test_special_tokens_and_generation_prompt() -> None:
    source = "{{ bos_token }}{{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}"
    assert _render(source) == "<s>hi>"
    assert _render(source, add_generation_prompt=False) == "<s>hi"


def test_blocks_are_trimmed_as_in_transformers() -> None:
    assert _render("{% if true %}\n  {% if true %}\nx\n  {% endif %}\n{% endif %}\n") == "x\n"


def test_tojson_keeps_html_and_unicode() -> None:
    assert _render("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'


def test_loop_controls_generation_tag_and_dates() -> None:
    assert _render("{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert _render("{% generation %}x{% endgeneration %}") == "x"
    assert len(_render("{{ strftime_now('%Y') }}")) == 4


def test_variables_reach_the_template() -> None:
    assert _render("{{ enable_thinking }}", variables={"enable_thinking": False}) == "False"


def test_text_parts_become_one_string() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert _render("{{ messages[0]['content'] + '!' }}", [{"role": "user", "content": parts}]) == "a\nb!"


def test_developer_is_system_to_templates_that_do_not_know_it() -> None:
    messages = [{"role": "developer", "content": "x"}]
    assert _render("{{ messages[0].role }}", messages) == "system"
    assert _render("{# developer #}{{ messages[0].role }}", messages) == "developer"


def test_a_refusal_of_the_template_names_the_messages() -> None:
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        _render("{{ raise_exception('roles must alternate') }}")
    assert (caught.value.param, caught.value.status) == ("messages", 400)


@pytest.mark.parametrize("source", ["{{ messages[7].content }}", "{{ 1 / 0 }}", "{{ messages[0].content + 1 }}"])
def test_a_template_that_fails_on_the_messages_is_the_requests_fault(source: str) -> None:
    with pytest.raises(RequestError):
        _render(source)


@pytest.mark.parametrize("source", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"])
def test_templates_cannot_reach_out_of_the_sandbox(source: str) -> None:
    with pytest.raises(RequestError):
        _render(source)


def test_bad_jinja_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="line 1"):
        ChatTemplate("{% if %}", {})
