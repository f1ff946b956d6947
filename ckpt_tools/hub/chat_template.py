"""Owns the tokens at which a chat template closes an assistant's turn.

The template is rendered by transformers in a child process, because a template may fail or never end.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any

from ckpt_tools.errors import CkptError, UsageError
from ckpt_tools.hub.reference.process import ask, question_and_answers
from ckpt_tools.hub.rendering import in_time
from ckpt_tools.hub.tokenizer import Role, Tokenizer

_ROLES: tuple[Role, ...] = ("eos", "bos", "pad")
# Words that no template changes, and that are not tokens of any tokenizer.
_ASKED, _ANSWERED = "Sentinelquestion", "Sentinelanswer"


def closing_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """The token that follows an assistant's words, with its id: in a later turn, and at the end.

    A template may close the last turn with another token than the turns before it, as OLMo's does.

    Raises:
        UsageError: the template cannot be rendered.
    """
    special = {f"{role}_token": tokenizer.special(role) for role in _ROLES}
    question = {
        "template": tokenizer.chat_template,
        "special": {key: token for key, token in special.items() if token is not None},
    }
    try:
        answer = ask(__name__, json.dumps(question))
    except CkptError as error:
        answer = {"failure": error.fact}
    if "failure" in answer:
        raise UsageError(
            f"the chat template cannot be rendered: {answer['failure']}",
            path=tokenizer.template,
            hint="Correct the template, or pass --generation-config none|FILE, which does not render it.",
        )
    added = {token: number for token, number in tokenizer.added_tokens.items() if token.strip()}
    closing = (_first(tail, added) for tail in answer["tails"])
    return {token: added[token] for token in closing if token is not None}


def own_closing_tokens(tokenizer: Tokenizer, ends: Collection[int]) -> dict[str, int]:
    """The closing tokens of a template that nobody asked to attach; none if its text shows no other end.

    The look at the text saves the child process that renders the template. A token that the text does not
    write, and that no role stands for, is not seen.

    Raises:
        UsageError: the template cannot be rendered.
    """
    template, added = tokenizer.chat_template or "", tokenizer.added_tokens
    known = {token: number for token, number in added.items() if token.strip()}
    for role in _ROLES:
        token = tokenizer.special(role)
        if token is not None and token in added:
            known[f"{role}_token"] = added[token]
    after = (_first(part, known) for part in template.split("content")[1:])
    if any(token is not None and known[token] not in ends for token in after):
        return closing_tokens(tokenizer)
    return {}


def _first(text: str, tokens: Iterable[str]) -> str | None:
    """The first token in a text; the longest of those that begin at one place."""
    pattern = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
    found = re.search(pattern, text) if pattern else None
    return None if found is None else found[0]


def _main() -> None:
    """In the child: render the template of the question."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # saves a second; no tensor is made
    with question_and_answers() as (question, answers):
        json.dump(_rendered(question), answers)


def _rendered(question: Mapping[str, Any]) -> dict[str, Any]:
    """The text after an assistant's words, in the middle of a conversation and at its end."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def text(words: list[str], system: bool, parts: bool) -> str:
        said = list(zip(["user", "assistant"] * 2, words, strict=False))
        if system:
            said.insert(0, ("system", "Earlier"))
        chat = [
            {"role": role, "content": [{"type": "text", "text": word}] if parts else word}
            for role, word in said
        ]
        rendered = render_jinja_template(
            conversations=[chat], chat_template=question["template"], **question["special"]
        )
        return str(rendered[0][0])

    failure = "no part of a conversation appears in its text"
    # Templates differ in the form of content, and in whether they need a system turn.
    for system, parts in ((False, False), (True, False), (False, True), (True, True)):
        texts = []
        for words in ([_ASKED, _ANSWERED], ["Earlier", _ANSWERED, _ASKED]):
            try:
                answer = in_time(partial(text, words, system, parts))
            except ImportError as error:
                return {"failure": str(error)}
            if answer.get("certain"):
                return {"failure": answer["failure"]}
            failure = answer.get("failure", failure)
            texts.append(answer.get("text", ""))
        last, middle = texts
        if _ANSWERED in last and middle:
            between = middle.partition(_ANSWERED)[2].partition(_ASKED)[0]
            return {"tails": [between, last.rpartition(_ANSWERED)[2]]}
    return {"failure": failure}


if __name__ == "__main__":
    _main()
