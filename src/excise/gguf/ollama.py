"""The Modelfile that Ollama makes a model from: files, template, sampling parameters, licence.

Ollama's templates are Go's, not Jinja. One is derived by asking the tokenizer's own template to render
probe conversations, and is used only where its pieces give those renderings back to the letter; a
template that is not made of such pieces is left to Ollama, which reads the one in the GGUF.

Ollama gives the text to llama.cpp, which puts the BOS token before it where the file says so
(`adds_bos`); the template must write it exactly where the file does not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from excise.checkpoints.gguf_header import GgufFile, shard_names
from excise.checkpoints.loading import Loaded
from excise.checkpoints.model_folder import read_generation
from excise.errors import ModelError
from excise.prompts.chat_template import special_tokens
from excise.prompts.template_rendering import Renderer, TemplateRefusal
from excise.prompts.template_sources import own_template
from excise.prompts.tokens import end_tokens
from excise.reading import is_file

_Chat = list[tuple[str, str]]  # (role, content)
_SYSTEM, _USER, _ANSWER, _MORE = "Probe-one", "Probe-two", "Probe-three", "Probe-four"
_NAME = "the chat template"
# Byte-level vocabularies for which llama.cpp adds a BOS token where a file says nothing.
_BOS_BEFORE = frozenset(
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano tekken "
    "chameleon".split()
)
# generation_config.json's names and Ollama's.
_PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
_LARGEST = 1e6  # of a sampling parameter that can be meant
_LICENCE = 1 << 20  # characters of a licence's text that go into a Modelfile


@dataclass(frozen=True)
class Template:
    """A model's chat template, with the special tokens that it may name."""

    text: str
    tokens: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bos(self) -> str:
        """The text of the BOS token; "" where there is none."""
        return str(self.tokens.get("bos_token") or "")


@dataclass(frozen=True)
class Pieces:
    """What a chat template puts around each turn.

    `begin` may hold the BOS token. `default` stands at the beginning of a conversation without a
    system message; `system` is None where the template takes none.
    """

    begin: str
    default: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str

    def render(self, chat: _Chat) -> str:
        """Render a conversation up to where the response begins."""
        has_system = any(role == "system" for role, _ in chat)
        out = self.begin if has_system else self.begin + self.default
        for role, content in chat:
            before, after = getattr(self, role)
            out += before + content + after
        return out + self.prompt


def sampling(generation: Mapping[str, Any]) -> dict[str, float]:
    """Translate a generation config to Ollama's sampling parameters."""
    found = {
        theirs: generation[ours]
        for ours, theirs in _PARAMETERS.items()
        if type(generation.get(ours)) in (int, float) and abs(generation[ours]) < _LARGEST
    }
    if generation.get("do_sample") is False:
        found["temperature"] = 0
    return found


def adds_bos(head: GgufFile) -> bool:
    """Return whether llama.cpp prepends the BOS token for this file, by its own rules."""
    kind, said = (head.keys.get(f"tokenizer.ggml.{name}") for name in ("model", "add_bos_token"))
    if kind == "gemma4":  # whatever the file says
        return True
    if isinstance(said, bool):
        return said
    return kind in ("llama", "bert") or head.keys.get("tokenizer.ggml.pre") in _BOS_BEFORE


def modelfile_of(
    loaded: Loaded, licence: str | None, head: GgufFile, model: str, projector: str | None
) -> str:
    """Return the Modelfile of a loaded model's GGUF, the file `model` with the header `head`.

    Its licence is the text beside the checkpoint, where there is one, else `licence`.
    """
    tokenizer = loaded.tokenizer
    found = own_template(tokenizer, loaded.folder)
    ends = sorted(end_tokens(loaded.model, tokenizer))
    file = next((path for path in sorted(loaded.folder.glob("LICENSE*")) if is_file(path)), None)
    if file is not None:
        with file.open(encoding="utf-8", errors="replace") as opened:
            licence = opened.read(_LICENCE)
    return modelfile(
        model,
        head,
        None if found is None else Template(found[0], special_tokens(tokenizer)),
        [str(tokenizer.decode([number])) for number in ends],
        read_generation(loaded.folder),
        projector=projector,
        licence=licence,
    )


def modelfile(
    model: str,
    head: GgufFile,
    template: Template | None,
    ends: Sequence[str],
    generation: Mapping[str, Any],
    *,
    projector: str | None = None,
    licence: str | None = None,
) -> str:
    """Write a Modelfile.

    Args:
        model: the GGUF's name, in the same folder.
        head: its header.
        template: the model's chat template.
        ends: the texts of the tokens that end a response.
        generation: the checkpoint's generation config.
        projector: the mmproj file's name, of a multimodal model.
        licence: the text or name of the base model's licence.
    """
    lines = ["# ollama create NAME -f Modelfile"]
    if len(shard_names(model)) > 1:
        lines.append(
            "# Ollama takes one file: merge the parts with llama-gguf-split --merge first."
        )
    lines.append(f"FROM ./{model}")
    if projector is not None:
        lines.append(f"FROM ./{projector}")
    pieces = None if template is None else probe(template)
    if template is not None and pieces is not None and adds_bos(head):
        begin = pieces.begin.removeprefix(template.bos)
        if template.bos and begin == pieces.begin:
            lines.append(
                "# llama.cpp begins with a BOS token here, which the model's template does not."
            )
        pieces = replace(pieces, begin=begin)
    if pieces is None:
        lines.append("# The chat template is the one in the GGUF: Ollama's form cannot express it.")
    else:
        lines.append(f'TEMPLATE """{go_template(pieces)}"""')
    lines += [f"PARAMETER {name} {value:g}" for name, value in sampling(generation).items()]
    lines += [_stop(text) for text in dict.fromkeys(ends)]
    if licence:
        text = licence.strip().replace('"""', "'''")
        lines.append(f'LICENSE """{text}"""')
    return "\n".join(lines) + "\n"


def probe(template: Template) -> Pieces | None:
    """Find the pieces of a chat template; None where it is not made of pieces."""
    with Renderer() as renderer:
        try:
            # What is true of today only has no place in a file.
            if renderer.analyse(template.text, _NAME, "").clock is not None:
                return None
            return _probe(_Asked(renderer, template))
        except ModelError:  # it takes too long, or too much memory
            return None


@dataclass(frozen=True)
class _Asked:
    renderer: Renderer
    template: Template

    def render(self, chat: _Chat, *, prompt: bool = True) -> str | None:
        """Render a conversation; None where the template refuses it."""
        messages = [{"role": role, "content": content} for role, content in chat]
        text, tokens = self.template.text, dict(self.template.tokens)
        try:
            return self.renderer.render(text, _NAME, [messages], tokens, prompt=prompt)[0]
        except TemplateRefusal:
            return None


def _probe(asked: _Asked) -> Pieces | None:
    one = asked.render([("user", _USER)])
    bare = asked.render([("user", _USER)], prompt=False)
    two = asked.render([("user", _USER), ("assistant", _ANSWER), ("user", _MORE)])
    if one is None or bare is None or two is None:
        return None
    found = _dissect(asked, one, bare, two)
    if found is None:
        return None
    chats: list[_Chat] = [
        [("user", _USER)],
        [("user", _USER), ("assistant", _ANSWER), ("user", _MORE)],
    ]
    if found.system is not None:
        chats += [[("system", _SYSTEM), *chat] for chat in chats]
    same = all(asked.render(chat) == found.render(chat) for chat in chats)
    return found if same and '"""' not in go_template(found) else None


def go_template(pieces: Pieces) -> str:
    """Write the pieces as a Go template over Ollama's messages, on one line: Go keeps literal newlines."""
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


def _dissect(asked: _Asked, one: str, bare: str, two: str) -> Pieces | None:
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
    with_system = asked.render([("system", _SYSTEM), ("user", _USER)])
    if with_system is not None and _SYSTEM in with_system:
        opening, rest = _cut(with_system, _SYSTEM)
        closing = _cut(rest, _USER)[0]
        if not closing.endswith(before_user):
            return None  # it is put into the first user turn
        start = asked.template.bos if opening.startswith(asked.template.bos) else ""
        system = (opening.removeprefix(start), closing.removesuffix(before_user))
        default = begin.removeprefix(start)
        begin = start
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


def _cut(text: str, at: str) -> tuple[str, str]:
    before, _, after = text.partition(at)
    return before, after


def _literal(text: str) -> str:
    """Escape text for Go's templates: braces that they could take for their own."""
    return re.sub(r"\{{2,}|\{$", lambda found: f'{{{{ "{found[0]}" }}}}', text)


def _stop(text: str) -> str:
    if '"""' in text or not text.strip() or not text.isprintable():
        return "# One end token has no form here: its text holds quotes, control characters, or nothing."
    return f'PARAMETER stop "{text}"' if '"' not in text else f'PARAMETER stop """{text}"""'
