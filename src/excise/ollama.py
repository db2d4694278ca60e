"""The Modelfile that Ollama makes a model from: files, template, sampling parameters, licence.

Ollama's templates are Go's, not Jinja. One is derived by asking the tokenizer's own template to render
probe conversations, and is used only where its pieces give those renderings back to the letter; a
template that is not made of such pieces is left to Ollama, which reads the one in the GGUF.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError

_Chat = list[tuple[str, str]]  # (role, content)
_SYSTEM, _USER, _ANSWER, _MORE = "Probe-one", "Probe-two", "Probe-three", "Probe-four"
# generation_config.json's names and Ollama's.
_PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


@dataclass(frozen=True)
class Pieces:
    """What a chat template puts around each turn.

    `default` stands at the beginning of a conversation without a system message; `system` is None
    where the template takes none.
    """

    begin: str
    default: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str

    def render(self, chat: _Chat) -> str:
        """A conversation up to where the response begins."""
        has_system = any(role == "system" for role, _ in chat)
        out = self.begin if has_system else self.begin + self.default
        for role, content in chat:
            before, after = getattr(self, role)
            out += before + content + after
        return out + self.prompt


def sampling(generation: Mapping[str, Any]) -> dict[str, float]:
    """Ollama's sampling parameters, from a generation config's."""
    found = {
        theirs: generation[ours]
        for ours, theirs in _PARAMETERS.items()
        if isinstance(generation.get(ours), int | float)
    }
    if generation.get("do_sample") is False:
        found["temperature"] = 0
    return found


def modelfile(
    model: str,
    tokenizer: Any,
    generation: Mapping[str, Any],
    *,
    projector: str | None = None,
    licence: str | None = None,
) -> str:
    """The text of a Modelfile.

    Args:
        model: the GGUF's name, in the same folder.
        tokenizer: the model's, for its chat template and stop tokens.
        generation: the checkpoint's generation config.
        projector: the mmproj file's name, of a multimodal model.
        licence: the text or name of the base model's licence.
    """
    lines = ["# ollama create NAME -f Modelfile"]
    if "-00001-of-" in model:
        lines.append(
            "# Ollama takes one file: merge the parts with llama-gguf-split --merge first."
        )
    lines.append(f"FROM ./{model}")
    if projector is not None:
        lines.append(f"FROM ./{projector}")
    pieces = probe(tokenizer)
    if pieces is None:
        lines.append("# The chat template is the one in the GGUF: Ollama's form cannot express it.")
    else:
        lines.append(f'TEMPLATE """{go_template(pieces)}"""')
    lines += [f"PARAMETER {name} {value:g}" for name, value in sampling(generation).items()]
    lines += [f"PARAMETER stop {_quoted(text)}" for text in _stops(tokenizer, generation)]
    if licence:
        text = licence.strip().replace('"""', "'''")
        lines.append(f'LICENSE """{text}"""')
    return "\n".join(lines) + "\n"


def probe(tokenizer: Any) -> Pieces | None:
    """The pieces of a tokenizer's chat template; None where it is not made of pieces."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    one = _render(tokenizer, [("user", _USER)])
    bare = _render(tokenizer, [("user", _USER)], prompt=False)
    two = _render(tokenizer, [("user", _USER), ("assistant", _ANSWER), ("user", _MORE)])
    if one is None or bare is None or two is None:
        return None
    found = _dissect(tokenizer, one, bare, two)
    if found is None:
        return None
    chats: list[_Chat] = [
        [("user", _USER)],
        [("user", _USER), ("assistant", _ANSWER), ("user", _MORE)],
    ]
    if found.system is not None:
        chats += [[("system", _SYSTEM), *chat] for chat in chats]
    same = all(_expected(tokenizer, chat) == found.render(chat) for chat in chats)
    return found if same and '"""' not in go_template(found) else None


def go_template(pieces: Pieces) -> str:
    """The pieces as a Go template over Ollama's messages, all on one line: Go keeps literal newlines."""
    out = _literal(pieces.begin)
    if pieces.default:
        out += "{{ if not .System }}" + _literal(pieces.default) + "{{ end }}"
    out += "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
    branches = [("user", pieces.user)]
    if pieces.system is not None:
        branches.append(("system", pieces.system))
    word = "if"
    for role, (before, after) in branches:
        out += f'{{{{ {word} eq .Role "{role}" }}}}'
        out += f"{_literal(before)}{{{{ .Content }}}}{_literal(after)}"
        word = "else if"
    before, after = pieces.assistant
    out += f'{{{{ else if eq .Role "assistant" }}}}{_literal(before)}{{{{ .Content }}}}'
    out += f"{{{{ if not $last }}}}{_literal(after)}{{{{ end }}}}{{{{ end }}}}"
    asked = _literal(pieces.prompt)
    return out + f'{{{{ if and $last (ne .Role "assistant") }}}}{asked}{{{{ end }}}}{{{{ end }}}}'


def _dissect(tokenizer: Any, one: str, bare: str, two: str) -> Pieces | None:
    """Cut the renderings of a one-turn and a two-turn conversation at the probes."""
    head, tail = _cut(one, _USER)
    after_user = _cut(bare, _USER)[1]
    _, rest = _cut(two, _USER)
    middle, rest = _cut(rest, _ANSWER)
    between, _ = _cut(rest, _MORE)
    if not tail.startswith(after_user) or not middle.startswith(after_user):
        return None
    # Turns that end alike are cut there; else at the longest text that is before every user's.
    before_user = between.removeprefix(after_user)
    if before_user == between or not head.endswith(before_user):
        before_user = _common_end(head, between)
    begin = head.removesuffix(before_user)
    system, default = None, ""
    with_system = _render(tokenizer, [("system", _SYSTEM), ("user", _USER)])
    if with_system is not None and _SYSTEM in with_system:
        opening, rest = _cut(with_system, _SYSTEM)
        closing = _cut(rest, _USER)[0]
        if not closing.endswith(before_user):
            return None  # it is put into the first user turn
        start = _start(tokenizer, opening)
        system = (opening.removeprefix(start), closing.removesuffix(before_user))
        default = begin.removeprefix(start)
        begin = start
    begin = begin.removeprefix(_bos(tokenizer))  # llama.cpp adds it, as it adds it everywhere
    return Pieces(
        begin=begin,
        default=default,
        system=system,
        user=(before_user, after_user),
        assistant=(middle.removeprefix(after_user), between.removesuffix(before_user)),
        prompt=tail.removeprefix(after_user),
    )


def _common_end(a: str, b: str) -> str:
    pairs = zip(reversed(a), reversed(b), strict=False)
    length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return a[len(a) - length :]


def _start(tokenizer: Any, opening: str) -> str:
    bos = _bos(tokenizer)
    return bos if bos and opening.startswith(bos) else ""


def _bos(tokenizer: Any) -> str:
    return str(tokenizer.bos_token or "")


def _expected(tokenizer: Any, chat: _Chat) -> str | None:
    text = _render(tokenizer, chat)
    return None if text is None else text.removeprefix(_bos(tokenizer))


def _render(tokenizer: Any, chat: _Chat, *, prompt: bool = True) -> str | None:
    messages = [{"role": role, "content": content} for role, content in chat]
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        )
    except (TemplateError, ValueError, TypeError):
        return None


def _cut(text: str, at: str) -> tuple[str, str]:
    before, _, after = text.partition(at)
    return before, after


def _stops(tokenizer: Any, generation: Mapping[str, Any]) -> list[str]:
    ids = generation.get("eos_token_id", tokenizer.eos_token_id)
    ids = ids if isinstance(ids, list) else [ids]
    texts = [tokenizer.convert_ids_to_tokens(number) for number in ids if number is not None]
    return list(dict.fromkeys(text for text in texts if text))


def _literal(text: str) -> str:
    """Text that Go's templates leave alone."""
    return text.replace("{{", '{{ "{{" }}')


def _quoted(text: str) -> str:
    return f'"{text}"' if '"' not in text else f'"""{text}"""'
