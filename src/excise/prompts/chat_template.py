"""Decide how a prompt is put to the model: chat template, thinking switches, system prompt, answer header.

Decided once per run, by what the template itself says and renders, never by a model's name. What was
decided is in the record. Knows text only: `tokens` makes token ids, and `template_rendering` renders.
"""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import cycle, zip_longest
from pathlib import Path
from typing import Any

from excise.config import PromptSection
from excise.errors import ModelError
from excise.prompts.template_rendering import Chat, Renderer, TemplateFacts, TemplateRefusal
from excise.prompts.template_sources import own_template, read_template

# Format of prompts without a chat template, documented in the README.
PLAIN_FORMAT = "Question: {prompt}\nAnswer:"

# Variables by which templates switch thinking, with their values for off and on (None: no value).
_SWITCHES: dict[str, tuple[Any, Any]] = {
    "enable_thinking": (False, True),
    "thinking": (False, True),
    "reasoning": (False, True),
    "thinking_budget": (0, None),
}
_EFFORT = "reasoning_effort"  # off is "none", in templates that know this value
# How templates write an empty thinking block: opening tag, inside, closing tag.
_BLOCKS = (
    ("<think>", "\n\n", "</think>\n\n"),
    ("<thinking>", "\n\n", "</thinking>\n\n"),
    ("<thought>", "\n\n", "</thought>\n\n"),
    ("<seed:think>", "", "</seed:think>"),
    ("[THINK]", "", "[/THINK]"),
    ("<|START_THINKING|>", "", "<|END_THINKING|>"),
    ("<|channel>thought", "\n", "<channel|>"),
)
_QUESTION, _ANSWER = "What is the capital of France?", "It is Paris."
_SYSTEM = "Answer in one sentence."


@dataclass(frozen=True)
class ChatFormat:
    """Everything that stands around a prompt's text.

    Attributes:
        template: the chat template; None for the plain format.
        origin: what the template is, in words.
        system: the system prompt.
        folded: the template takes no system turn, so the system prompt opens the user's turn.
        listed: the template wants a message's content as a list of parts.
        variables: what the template is given beside the messages and the special tokens.
        tokens: the special tokens: "bos_token" and such.
        header: text after the generation prompt, up to where an answer begins.
        notes: what was decided, a sentence each.
    """

    template: str | None
    origin: str
    system: str | None = None
    folded: bool = False
    listed: bool = False
    variables: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, Any] = field(default_factory=dict)
    header: str = ""
    notes: tuple[str, ...] = ()

    def render(self, renderer: Renderer, texts: Sequence[str]) -> list[str]:
        """Render prompts as the model sees them, up to where their answers begin.

        Raises:
            ModelError: the chat template cannot render one, or leaves its text out.
        """
        if self.template is None:
            plain = [PLAIN_FORMAT.format(prompt=text) for text in texts]
            return plain if self.system is None else [f"{self.system}\n\n{text}" for text in plain]
        found = [turns + self.header for turns in self.turns(renderer, texts)]
        for number, (text, turns) in enumerate(zip(texts, found, strict=True), start=1):
            if not holds_text(text, turns):
                raise ModelError(
                    f"{self.origin} leaves out the text of prompt {number}, {text!r:.60}: give another "
                    "one with --chat-template"
                )
        return found

    def turns(
        self, renderer: Renderer, texts: Sequence[str], answer: str | None = None
    ) -> list[str]:
        """Render conversations of one question each, and of its answer if there is one.

        Raises:
            ModelError: the template cannot render one.
        """
        answers = [] if answer is None else [answer]
        chats = [self._chat([text, *answers]) for text in texts]
        return self._rendered(renderer, chats, prompt=answer is None)

    def conversations(self, renderer: Renderer, chats: Sequence[Sequence[str]]) -> list[str]:
        """Render conversations up to where the next answer begins: user's and model's texts in turn.

        Raises:
            ModelError: the chat template cannot render one, or leaves its last text out.
        """
        if self.template is None:
            return ["\n\n".join(self._plain(chat)) for chat in chats]
        found = self._rendered(renderer, [self._chat(chat) for chat in chats], prompt=True)
        if not all(holds_text(c[-1], text) for c, text in zip(chats, found, strict=True)):
            raise ModelError(f"{self.origin} leaves out the text of the last message")
        return [text + self.header for text in found]

    def _plain(self, chat: Sequence[str]) -> list[str]:
        answers = [f" {text.strip()}" for text in chat[1::2]]
        asked = [PLAIN_FORMAT.format(prompt=text) for text in chat[::2]]
        parts = [text + answer for text, answer in zip_longest(asked, answers, fillvalue="")]
        return parts if self.system is None else [self.system, *parts]

    def _rendered(self, renderer: Renderer, chats: Sequence[Chat], *, prompt: bool) -> list[str]:
        assert self.template is not None
        variables = {**self.tokens, **self.variables}
        return renderer.render(self.template, self.origin, chats, variables, prompt=prompt)

    def _chat(self, texts: Sequence[str]) -> Chat:
        system, (first, *rest) = self.system, texts
        messages = []
        if system is not None and self.folded:
            first = f"{system}\n\n{first}"
        elif system is not None:
            messages.append({"role": "system", "content": self._content(system)})
        for text, role in zip((first, *rest), cycle(("user", "assistant"))):
            messages.append({"role": role, "content": self._content(text)})
        return messages

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self.listed else text

    def as_dict(self) -> dict[str, Any]:
        """Return what the record and the study keep: JSON-ready, without the system prompt's text."""
        text = self.template
        return {
            "template": self.origin,
            "template_sha256": None if text is None else hashlib.sha256(text.encode()).hexdigest(),
            "variables": self.variables,
            "header": self.header,
            "notes": list(self.notes),
        }


def choose_format(
    tokenizer: Any, section: PromptSection, renderer: Renderer, folder: Path | None = None
) -> ChatFormat:
    """Decide how prompts are put to the model of this tokenizer.

    Args:
        tokenizer: the model's.
        section: what the configuration says of prompts.
        renderer: renders the template.
        folder: the model's, which may keep a template beside the tokenizer's files.

    Raises:
        ModelError: the chat template cannot be read, cannot render, or leaves out what it is given.
    """
    given = section.chat_template
    found = own_template(tokenizer, folder) if given is None else read_template(given)
    if found is None:
        note = "No chat template: prompts are put in the plain format that the README shows."
        return ChatFormat(None, "plain format", section.system, notes=(note,))
    text, origin = found
    notes = [] if given is None else [f"Prompts are put with the {origin}."]
    facts = renderer.analyse(text, origin, _EFFORT)
    held = _freeze_clock(facts, section.date)
    variables, said = _switches(facts, section.thinking)
    tokens = special_tokens(tokenizer)
    plain = ChatFormat(held + text, origin, variables=variables, tokens=tokens)
    chat_format = _with_system(plain, renderer, section.system)
    header = "" if section.thinking else _header(chat_format, renderer)
    notes += said
    if held:
        notes.append(f"The template writes the date: it is held at {section.date} (prompts.date).")
    if chat_format.folded:
        notes.append("The template takes no system turn: the system prompt opens the user's turn.")
    if header:
        notes.append(f"Every prompt is led up to the answer, past its thinking: {header!r}.")
    return replace(chat_format, header=header, notes=tuple(notes))


def after_answer(chat_format: ChatFormat, renderer: Renderer) -> str:
    """Return what the template writes after a response; "" where it cannot render one."""
    if chat_format.template is None:
        return ""
    try:
        (answered,) = chat_format.turns(renderer, [_QUESTION], _ANSWER)
    except TemplateRefusal:
        return ""
    _, found, after = answered.rpartition(_ANSWER)
    return after.strip() if found else ""


def holds_text(text: str, rendered: str) -> bool:
    """Return whether a template's output holds a text, as it is or escaped, white space aside.

    Templates trim; a few write text as HTML or JSON, and the model was trained to read it so.
    """
    forms = [(text, rendered), (text, html.unescape(rendered))]
    forms += [(json.dumps(text, ensure_ascii=a)[1:-1], rendered) for a in (False, True)]
    return any("".join(form.split()) in "".join(whole.split()) for form, whole in forms)


def close_thinking(text: str) -> str:
    """Close the thinking block that `text` has opened and left empty; "" where there is none."""
    for opened, inside, closed in _BLOCKS:
        _, tag, rest = text.rpartition(opened)
        if tag and not rest.strip():
            return inside.removeprefix(rest) + closed
    return ""


def after_thinking(text: str) -> str:
    """Return the part of a response's beginning that stands after any thinking block."""
    for _, _, closed in _BLOCKS:
        text = text.rpartition(closed.strip())[2]
    return text


def answer_in(response: str, before: str) -> str | None:
    """Return what a response says after its chain of thought; None where that has not ended.

    Args:
        response: with its special tokens: some models' tags are such.
        before: the end of what it responds to, where templates open a thinking block.
    """
    if any(closed.strip() in response for _, _, closed in _BLOCKS):
        return after_thinking(response)
    opens = (tag in response or before.rstrip().endswith(tag) for tag, _, _ in _BLOCKS)
    return None if any(opens) else response


# -- templates -------------------------------------------------------------------------------------


def special_tokens(tokenizer: Any) -> dict[str, Any]:
    """Return the tokenizer's special tokens by name, as Transformers gives them to templates."""
    return {
        name: [str(one) for one in value] if isinstance(value, list | tuple) else str(value)
        for name, value in tokenizer.special_tokens_map.items()
    }


def _freeze_clock(facts: TemplateFacts, day: date) -> str:
    """Return template source that fixes the template's clock; "" where it has none.

    Token ids that change from day to day could not be resumed, exported or compared.
    """
    if facts.clock is None:
        return ""
    known = {text: _written(day, text) for text in facts.clock}
    return (
        "{% macro strftime_now(format) %}"
        "{{ " + json.dumps(known) + f'.get(format, "{day}")' + " }}{% endmacro %}{{ '' }}"
    )


def _written(day: date, form: str) -> str:
    try:
        return day.strftime(form)
    except ValueError:  # not a date format, or a lone surrogate
        return str(day)


def _switches(facts: TemplateFacts, thinking: bool) -> tuple[dict[str, Any], list[str]]:
    """Return the values of the template's thinking switches, and notes about them."""
    values = {
        name: (on if thinking else off)
        for name, (off, on) in _SWITCHES.items()
        if name in facts.names and (off, on)[thinking] is not None
    }
    if _EFFORT in facts.names and not thinking and "none" in facts.values:
        values[_EFFORT] = "none"
    if not values:
        return {}, []
    said = ", ".join(f"{name}={json.dumps(value)}" for name, value in values.items())
    return values, [f"Thinking is switched {'on' if thinking else 'off'} in the template: {said}."]


def _with_system(plain: ChatFormat, renderer: Renderer, system: str | None) -> ChatFormat:
    """Choose the form of messages that the template renders whole.

    Raises:
        ModelError: there is none.
    """
    form, refusal = _form(plain, renderer, system)
    if form is not None:
        return form
    if system is None:
        with_one, _ = _form(plain, renderer, _SYSTEM)
        if with_one is not None and not with_one.folded:
            raise ModelError(
                f"{plain.origin} needs a system turn: give one, --set prompts.system=TEXT"
            )
    raise refusal or ModelError(
        f"{plain.origin} leaves out the text of prompts: give another one with --chat-template"
    )


def _form(
    plain: ChatFormat, renderer: Renderer, system: str | None
) -> tuple[ChatFormat | None, TemplateRefusal | None]:
    """Return the first form of messages that is rendered whole, else the first refusal."""
    folds = (False,) if system is None else (False, True)
    forms = [replace(plain, system=system, folded=folded) for folded in folds]
    # Templates of multimodal models often loop over a message's parts.
    forms += [replace(form, listed=True) for form in forms]
    first = None
    for form in forms:
        try:
            (turns,) = form.turns(renderer, [_QUESTION])
        except TemplateRefusal as refusal:
            first = first or refusal
            continue
        whole = holds_text(_QUESTION, turns) and holds_text(system or "", turns)
        if whole and "'type':" not in turns:  # not a list of parts as Python would write it
            return form, None
    return None, first


def _header(chat_format: ChatFormat, renderer: Renderer) -> str:
    """Return what stands between the generation prompt and an answer, where it is more than white space.

    The template itself shows it: in a conversation that has been answered (gpt-oss names the final
    channel there), or by leaving a thinking block open.
    """
    (prompt,) = chat_format.turns(renderer, [_QUESTION])
    try:
        (answered,) = chat_format.turns(renderer, [_QUESTION], _ANSWER)
    except TemplateRefusal:
        answered = ""
    if answered.startswith(prompt):
        header, found, _ = answered[len(prompt) :].partition(_ANSWER)
        if found and header.strip():
            return header
    return close_thinking(prompt)
