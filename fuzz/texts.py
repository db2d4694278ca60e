"""Damaged prompts, markers, templates and settings."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from fuzz.case import Case, Place
from fuzz.ground import ROWS, SIDES
from fuzz.harmless import commented, reedited
from fuzz.mutations import change_bytes, change_lines
from fuzz.values import odd, shown, to_json

_TEXTS = (
    *(
        "",
        " ",
        "\u3000",
        "e",
        "\u200b",
        "\ufeffa",
        "a\x00b",
        "a\x1b[31mb",
        "\u202eabc",
        "e\u0301te\u0301",
        "\U0001f469\u200d\U0001f52c",
    ),
    *(
        "<|user|>hi<eos>",
        "<eos>",
        "{{ 1 }}",
        "a\nb",
        "a\u2028b",
        "a\x85b",
        "a\x0bb",
        "a\x0cb",
        '"quoted"',
        "x,y",
        "#x",
    ),
    *(
        "v" * 3000,
        "nan",
        "NaN",
        "null",
        "None",
        "1",
        "1.0",
        "true",
        "-",
        "a\tb",
        "\\",
        "'",
        "velm " * 600,
    ),
)


def prompts_txt(place: Place) -> Case:
    """A prompt file with one a line."""
    return _prompts(place, ".txt", change_bytes, change_lines, _insert(lambda text: text))


def prompts_jsonl(place: Place) -> Case:
    """A prompt file of JSON lines."""

    def line(data: bytes, draw: Random) -> tuple[bytes, str]:
        lines = data.splitlines(keepends=True)
        value = odd(draw)
        row: Any = draw.choice(
            [{"text": value}, {"text": value}, {"text": value}, {"other": "x"}, value]
        )
        text = to_json(row)
        if draw.random() < 0.15:
            text = '{"text": "a", "text": "b"}'
        at = draw.randrange(len(lines))
        lines[at] = text.encode("utf-8", "surrogatepass") + b"\n"
        return b"".join(lines), f"line {at} = {shown(text)}"

    insert = _insert(lambda text: json.dumps({"text": text}, ensure_ascii=len(text) % 2 == 0))
    return _prompts(place, ".jsonl", change_bytes, change_lines, line, line, insert)


def prompts_csv(place: Place) -> Case:
    """A prompt file of comma-separated values."""

    def head(data: bytes, draw: Random) -> tuple[bytes, str]:
        names = [
            "text,text",
            "number;text",
            '"number","text"',
            "Number,Text",
            "text",
            "",
            "number, text",
            "\ufefftext,number",
        ]
        name = draw.choice(names)
        return name.encode() + data[data.index(b"\n") :], f"header {name!r}"

    insert = _insert(lambda text: '99,"' + text.replace('"', '""') + '"')
    raw = _insert(lambda text: "99," + text)
    return _prompts(place, ".csv", change_bytes, change_lines, head, insert, raw)


def _insert(form: Any) -> Any:
    def change(data: bytes, draw: Random) -> tuple[bytes, str]:
        lines, text = data.splitlines(keepends=True), draw.choice(_TEXTS)
        at = draw.randrange(len(lines) + 1)
        lines.insert(at, form(text).encode() + b"\n")
        return b"".join(lines), f"{shown(text)} as line {at}"

    return change


def _prompts(place: Place, suffix: str, *ways: Any) -> Case:
    prompts = {side: place.ground.folder / f"{side}{suffix}" for side in SIDES}
    side = place.draw.choice(SIDES)
    prompts[side] = place.copied(f"{side}{suffix}")
    place.change(prompts[side], *ways, harmless=[reedited])
    return place.job(place.setup(prompts=prompts, more=_planned(place)))


def _planned(place: Place) -> tuple[str, ...]:
    """Some runs find for themselves how large a pass should be, also with long prompts in it."""
    alone = place.draw.random() < 0.15 and not place.sound
    return ("--set", "engine.rows=0") if alone else ()


def prompts_parquet(place: Place) -> Case:
    """A parquet file of prompts: other types, other columns, other bytes."""
    prompts = {side: place.ground.folder / f"{side}.parquet" for side in SIDES}
    side = place.draw.choice(SIDES)
    path = prompts[side] = place.copied(f"{side}.parquet")
    if place.draw.random() < 0.35 or place.sound:
        place.change(path, change_bytes)
    else:
        _write_parquet(place, path)
    return place.job(place.setup(prompts=prompts, more=_planned(place)))


def _write_parquet(place: Place, path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    texts: list[Any] = parquet.read_table(path).column("text").to_pylist()
    draw, at = place.draw, place.draw.randrange(ROWS)
    floats = [float(i) + 0.5 for i in range(ROWS)]
    makers: dict[str, Any] = {
        "null": lambda: pyarrow.array([None if i == at else t for i, t in enumerate(texts)]),
        "all null": lambda: pyarrow.array([None] * ROWS),
        "integers": lambda: pyarrow.array([i * 7 + len(path.name) for i in range(ROWS)]),
        "floats": lambda: pyarrow.array(
            [float("nan") if i == at else f for i, f in enumerate(floats)]
        ),
        "infinities": lambda: pyarrow.array(
            [float("inf") if i == at else f for i, f in enumerate(floats)]
        ),
        "lists": lambda: pyarrow.array([[t] for t in texts]),
        "tables": lambda: pyarrow.array([{"text": t} for t in texts]),
        "bytes": lambda: pyarrow.array([t.encode() for t in texts]),
        "truths": lambda: pyarrow.array([i % 2 == 0 for i in range(ROWS)]),
        "times": lambda: pyarrow.array(range(ROWS), pyarrow.timestamp("s")),
        "dictionary": lambda: pyarrow.array(texts).dictionary_encode(),
        "large strings": lambda: pyarrow.array(texts, pyarrow.large_string()),
        "far times": lambda: pyarrow.array([2**60] * ROWS, pyarrow.timestamp("us")),
        "decimals": lambda: pyarrow.array(range(ROWS)).cast(pyarrow.decimal128(25, 2)),
        "one long": lambda: pyarrow.array(
            ["v" * 10**6 if i == at else t for i, t in enumerate(texts)]
        ),
        "many": lambda: pyarrow.array(["velm " * 2000] * 60_000),
        "odd text": lambda: pyarrow.array(
            [draw.choice(_TEXTS) if i == at else t for i, t in enumerate(texts)]
        ),
    }
    kind = draw.choice(list(makers))
    name = draw.choice(["text"] * 8 + ["other", "Text", ""])
    columns, names = [makers[kind]()], [name]
    if draw.random() < 0.1:
        columns, names = columns * 2, names * 2
    parquet.write_table(pyarrow.Table.from_arrays(columns, names=names), path)
    place.said.append(f"{path.name}: column {name!r} of {kind}")


_MARKERS = (
    *(
        "",
        "#",
        "# e",
        "\ufeffe",
        "e\u0301",
        "\uff45",
        "E",
        "*",
        "`e`",
        "e\r\n",
        "\u200be",
        "e\u00ad",
        "\x00",
        "  e  ",
        "\u2019",
    ),
    *(
        "x" * 10_000,
        "\u1e9e",
        "\u0130",
        "\u017f",
        "(?i)e",
        ".",
        "[",
        "\x1b[31me",
        "e\u2028s",
        "\u00e9",
        "\u212b",
        " ",
        "\u00a0",
    ),
)


def markers(place: Place) -> Case:
    """The markers file."""
    path = place.copied("markers.txt")

    def other(data: bytes, draw: Random) -> tuple[bytes, str]:
        lines = draw.sample(_MARKERS, draw.choice([1, 1, 2, 4]))
        text = "\n".join(lines)
        return text.encode(
            draw.choice(["utf-8", "utf-8", "utf-8", "utf-16", "latin-1"]), "replace"
        ), shown(text)

    alike = [reedited, commented]
    place.change(path, change_bytes, change_lines, other, other, harmless=alike)
    return place.job(place.setup(markers=path))


_TEMPLATES = (
    *("", " ", "hello", "{{ messages }}", "{{ messages[0]['content'] }}",
        "{{ messages[1]['content'] }}", "{%", "{{", "{{ x.y.z }}"),
    *("{% for i in range(10**9) %}x{% endfor %}", "{% for i in range(10**12) %}{% endfor %}",
        "{{ 'a' * 10**10 }}"),
    *("{{ raise_exception('no\\nway\\x1b[31m') }}", "{{ 10 ** 10 ** 10 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
    "{% if messages[0].role != 'system' %}{{ raise_exception('needs a system turn') }}{% endif %}"
    "{{ messages[1].content }}",
    *("{{ strftime_now('%Y') }}{{ messages[0].content }}",
        "{{ strftime_now(7) }}{{ messages[0].content }}", "\ufeff{{ messages[0].content }}"),
    *("{{ messages[0].content[:3] }}", "{{ messages[0].content | upper }}",
        "{{ messages[0].content | no_such }}", "{{ bos_token }}" * 3),
    *("{% include 'x' %}{{ messages[0].content }}",
        "{{ ''.__class__.__mro__ }}{{ messages[0].content }}", "{{ messages[0].content }}\x00"),
    *("{{ messages[0].content | replace('e', '') }}",
        "{% set x = messages.append(1) %}{{ messages[0].content }}", "{{ messages[0].content }}" * 40),
    *("<think>{{ messages[0].content }}</think>",
        "{{ messages[0].content }}{% if add_generation_prompt %}<think>\n{% endif %}"),
    *("{% if enable_thinking %}t{% else %}n{% endif %}{{ messages[0].content }}",
        "{{ messages[0].content }}{{ reasoning_effort == 'none' }}"),
    *("{% generation %}{{ messages[0].content }}{% endgeneration %}",
        "{% for m in messages %}{% break %}{% endfor %}{{ messages[0].content }}"),
    *("{{ messages[0].content }}{{ [1] * 10**9 }}",
        "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"),
    *('{"chat_template": "hi {{ messages[0].content }}"}', '{"other": 1}',
        '[{"name": "default", "template": "{{ messages[0].content }}"}]'),
    *('"{{ messages[0].content }}"', "{" * 3000, "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
        "{{ '%s' % messages[0].content }}", "{{ cycler }}"),
    "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9) %}{% endfor %}{% endfor %}"
    "{% endfor %}{{ messages[0].content }}",
)  # fmt: skip


def template(place: Place) -> Case:
    """A chat template: the model's own, or one that is given."""
    own = place.draw.random() < 0.5
    model = place.copied("model")
    path = model / "chat_template.jinja"
    if not own:
        path = path.rename(
            place.folder / place.draw.choice(["given.jinja", "given.json", "given.txt"])
        )
        (model / "chat_template.jinja").write_bytes(path.read_bytes())

    def other(data: bytes, draw: Random) -> tuple[bytes, str]:
        text = draw.choice(_TEMPLATES)
        return text.encode(), shown(text)

    place.change(path, change_bytes, other, other, other)
    if own:
        return place.model(model, run=0.9)
    return place.job(place.setup(model=model, template=path))
