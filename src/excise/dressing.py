"""How a prompt is put to the model: its chat template, thinking switches, and where an answer begins.

Decided once per run, by what the template itself says and renders, never by a model's name; whatever
was decided is in the record. Knows text only: token ids are made in `tokens`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser

from excise.config import PromptSection
from excise.errors import ModelError, first_line

# What a model without a chat template is given: documented in the README.
PLAIN_FORMAT = "Question: {prompt}\nAnswer:"

# Variables by which templates switch thinking, with their values for off and on (None: no value).
_SWITCHES: dict[str, tuple[Any, Any]] = {
    "enable_thinking": (False, True),
    "thinking": (False, True),
    "reasoning": (False, True),
    "thinking_budget": (0, None),
}
_EFFORT = "reasoning_effort"  # off is "none", in templates that know this value
# How templates write an empty thinking block: opened, what stands inside, closed.
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
_FAILURES = (TemplateError, ValueError, TypeError, ArithmeticError, LookupError, SyntaxError)


@dataclass(frozen=True)
class Dressing:
    """Everything that stands around a prompt's text.

    Attributes:
        template: the chat template; None for the plain format.
        origin: what the template is, in words.
        system: the system prompt.
        folded: the template takes no system turn, so the system prompt opens the user's.
        listed: the template wants a message's content as a list of parts.
        variables: what the template is given beside the messages.
        header: text after the generation prompt, up to where an answer begins.
        notes: what was decided, a sentence each.
    """

    template: str | None
    origin: str
    system: str | None = None
    folded: bool = False
    listed: bool = False
    variables: dict[str, Any] = field(default_factory=dict)
    header: str = ""
    notes: tuple[str, ...] = ()

    def render(self, tokenizer: Any, text: str) -> str:
        """The prompt as the model sees it, up to where its answer begins.

        Raises:
            ModelError: the chat template cannot render it.
        """
        if self.template is None:
            plain = PLAIN_FORMAT.format(prompt=text)
            return plain if self.system is None else f"{self.system}\n\n{plain}"
        try:
            return self.turns(tokenizer, text) + self.header
        except _FAILURES as error:
            raise ModelError(f"{self.origin} cannot render a prompt: {first_line(error)}") from None

    def turns(self, tokenizer: Any, text: str, answer: str | None = None) -> str:
        """What the template makes of a question, and of its answer if there is one."""
        system, messages = self.system, []
        if system is not None and self.folded:
            text = f"{system}\n\n{text}"
        elif system is not None:
            messages.append({"role": "system", "content": self._content(system)})
        messages.append({"role": "user", "content": self._content(text)})
        if answer is not None:
            messages.append({"role": "assistant", "content": self._content(answer)})
        return str(
            tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=answer is None,
                **self.variables,
            )
        )

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self.listed else text

    def as_dict(self) -> dict[str, Any]:
        """What the record and the study keep: JSON-ready, without the system prompt's text."""
        text = self.template
        return {
            "template": self.origin,
            "template_sha256": None if text is None else hashlib.sha256(text.encode()).hexdigest(),
            "variables": self.variables,
            "header": self.header,
            "notes": list(self.notes),
        }


def dress(tokenizer: Any, section: PromptSection) -> Dressing:
    """Decide how prompts are put to the model of this tokenizer.

    Raises:
        ModelError: the chat template cannot be read, or cannot render.
    """
    found = _template(tokenizer, section.chat_template)
    if found is None:
        note = "No chat template: prompts are put in the plain format that the README shows."
        return Dressing(None, "plain format", section.system, notes=(note,))
    text, origin = found
    notes = [] if section.chat_template is None else [f"Prompts are put with the {origin}."]
    try:
        tree = _environment().parse(text)
        held = _hold_date(tree, section.date)
        variables, said = _switches(tree, section.thinking)
        plain = Dressing(held + text, origin, variables=variables)
        dressing = _with_system(plain, tokenizer, section.system)
        header = "" if section.thinking else _header(dressing, tokenizer)
    except _FAILURES as error:
        raise ModelError(f"{origin} cannot render a prompt: {first_line(error)}") from None
    notes += said
    if held:
        notes.append(f"The template writes the date: it is held at {section.date} (prompts.date).")
    if dressing.folded:
        notes.append("The template takes no system turn: the system prompt opens the user's turn.")
    if header:
        notes.append(f"Every prompt is led up to the answer, past its thinking: {header!r}.")
    return replace(dressing, header=header, notes=tuple(notes))


def closing(text: str) -> str:
    """What closes the thinking block that `text` opens last and has nothing in yet; "" without one."""
    for opened, inside, closed in _BLOCKS:
        _, tag, rest = text.rpartition(opened)
        if tag and not rest.strip():
            return inside.removeprefix(rest) + closed
    return ""


def after_markup(text: str) -> str:
    """The part of a response's beginning that stands after any thinking block."""
    for _, _, closed in _BLOCKS:
        text = text.rpartition(closed.strip())[2]
    return text


# -- templates -------------------------------------------------------------------------------------


def _template(tokenizer: Any, source: str | None) -> tuple[str, str] | None:
    if source is not None:
        return read_template(source)
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        return str(tokenizer.get_chat_template()), "the tokenizer's chat template"
    except ValueError as error:
        raise ModelError(f"the tokenizer's chat template: {first_line(error)}") from None


def read_template(source: str) -> tuple[str, str]:
    """A chat template and its name in words, from a file or from another model's folder or Hub id.

    Raises:
        ModelError: there is none.
    """
    path = Path(source)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), f"chat template {path.name}"
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"chat template {path} cannot be read: {first_line(error)}") from None
    beside = path / "chat_template.jinja"
    if beside.is_file():  # a folder without the rest of a tokenizer will do
        return read_template(str(beside))[0], f"chat template of {path.name}"
    from transformers import AutoTokenizer

    if not path.is_dir() and (path.is_absolute() or source.count("/") != 1):
        raise ModelError(f"chat template {source!r} is neither a file nor a model's folder or id")
    try:
        other = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        text = other.get_chat_template()
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"no chat template in {source}: {first_line(error)}") from None
    return str(text), f"chat template of {path.name if path.is_dir() else source}"


class _Generation(Extension):
    """`{% generation %}`, which templates mark a model's own turns with: here it has no effect."""

    tags = {"generation"}  # noqa: RUF012 (as the base class has it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The block's body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> Environment:
    # It only parses: templates are rendered in Transformers' sandbox.
    return Environment(extensions=[_Generation, LoopControlExtension], autoescape=True)


def _hold_date(tree: nodes.Template, day: date) -> str:
    """Source that goes before the template so that its clock stands still; "" where it has none.

    Token ids that change from day to day could not be resumed, exported or compared.
    """
    calls = [c for c in tree.find_all(nodes.Call) if getattr(c.node, "name", "") == "strftime_now"]
    formats = {c.args[0].value for c in calls if c.args and isinstance(c.args[0], nodes.Const)}
    if not calls:
        return ""
    known = {text: day.strftime(text) for text in sorted(map(str, formats))}
    return (
        "{% macro strftime_now(format) %}"
        "{{ " + json.dumps(known) + f'.get(format, "{day}")' + " }}{% endmacro %}{{ '' }}"
    )


def _switches(tree: nodes.Template, thinking: bool) -> tuple[dict[str, Any], list[str]]:
    """Values of the template's thinking switches, and what to say about them."""
    names = meta.find_undeclared_variables(tree)
    values = {
        name: (on if thinking else off)
        for name, (off, on) in _SWITCHES.items()
        if name in names and (off, on)[thinking] is not None
    }
    if _EFFORT in names and not thinking and "none" in _compared(tree, _EFFORT):
        values[_EFFORT] = "none"
    if not values:
        return {}, []
    said = ", ".join(f"{name}={json.dumps(value)}" for name, value in values.items())
    return values, [f"Thinking is switched {'on' if thinking else 'off'} in the template: {said}."]


def _compared(tree: nodes.Template, name: str) -> set[str]:
    """The strings that a template compares a variable with."""
    found: set[str] = set()
    for compare in tree.find_all(nodes.Compare):
        if any(n.name == name for n in compare.find_all(nodes.Name)):
            values = [constant.value for constant in compare.find_all(nodes.Const)]
            parts = [v if isinstance(v, list | tuple) else [v] for v in values]
            found |= {v for part in parts for v in part if isinstance(v, str)}
    return found


def _with_system(plain: Dressing, tokenizer: Any, system: str | None) -> Dressing:
    """The form of messages that the template takes, and renders whole."""
    if _QUESTION not in plain.turns(tokenizer, _QUESTION):
        # Templates of multimodal models often loop over a message's parts.
        listed = replace(plain, listed=True)
        if _QUESTION in listed.turns(tokenizer, _QUESTION):
            plain = listed
    if system is None:
        return plain
    own = replace(plain, system=system)
    try:
        refused = system.strip() not in own.turns(tokenizer, _QUESTION)
    except _FAILURES:
        refused = True
    return replace(own, folded=True) if refused else own


def _header(dressing: Dressing, tokenizer: Any) -> str:
    """What stands between the generation prompt and an answer, where that is more than white space.

    The template itself shows it: in a conversation that has been answered (gpt-oss names the final
    channel there), or by leaving a thinking block open.
    """
    prompt = dressing.turns(tokenizer, _QUESTION)
    try:
        answered = dressing.turns(tokenizer, _QUESTION, _ANSWER)
    except _FAILURES:
        answered = ""
    if answered.startswith(prompt):
        header, found, _ = answered[len(prompt) :].partition(_ANSWER)
        if found and header.strip():
            return header
    return closing(prompt)
