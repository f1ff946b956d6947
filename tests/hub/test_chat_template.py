"""A chat template that computes for ever, or takes all memory, is given up with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from ckpt_tools.hub import chat_template, rendering

POWER = "{% set n = 10 ** 9 %}{{ (7 ** n) % 7 }}"


def answer(template: str) -> dict[str, Any]:
    """What the child would answer."""
    return chat_template._rendered({"template": template, "special": {}})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (POWER, "it was not rendered within 1 seconds"),
        ("{% set n = 10 ** 10 %}{{ 'x' * n }}", "it takes more than a gigabyte of memory"),
        (
            "{% if messages|length > 2 %}" + POWER + "{% endif %}{{ messages[-1].content }}",
            "seconds",
        ),
    ],
    ids=["one-step", "memory", "only-in-a-long-conversation"],
)
def test_a_template_that_no_signal_handler_ends_is_given_up(
    template: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 1 if "seconds" in reason else 60)
    found = answer(template)
    assert list(found) == ["failure"] and reason in found["failure"]


def test_the_form_that_a_template_takes_is_found() -> None:
    template = "{% for m in messages %}{{ m.content[0]['text'] + '<end>' }}{% endfor %}"
    assert answer(template) == {"tails": ["<end>", "<end>"]}


def test_what_a_template_raises_is_the_reason() -> None:
    assert answer("{{ raise_exception('roles must alternate') }}") == {
        "failure": "roles must alternate"
    }
