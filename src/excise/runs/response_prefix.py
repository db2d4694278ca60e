"""Find what a model's responses begin with, whatever the prompt: on tokens, from a majority.

An empty thinking block, a channel's header, a fixed phrase: it is appended to every prompt, so that
residuals are captured, and responses measured, where responses begin to differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from excise.checkpoints.loading import Loaded
from excise.engine.engine import Engine, Plan
from excise.engine.requests import Responses
from excise.engine.stacking import ORIGINAL
from excise.prompts.chat_template import after_thinking, close_thinking
from excise.prompts.measured_sets import LONGEST, Opening
from excise.prompts.tokens import end_tokens

PROMPTS = 32  # of each side: enough to see what a majority does
_TOKENS = 2**15  # of a pass: all prompts of usual length at once
_FIRST = 8  # tokens of each response that are looked at first
_ROUNDS = 3  # a thinking block that is closed by us shows what comes after it


def given_opening(tokenizer: Any, text: str) -> Opening:
    """Make the opening that the configuration names; "" means none."""
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()
    note = "Every response begins with prompts.response_prefix." if ids else ""
    return Opening(ids, spoken_part(tokenizer, ids), {}, note)


def find_opening(
    loaded: Loaded,
    prompts: dict[str, list[list[int]]],
    *,
    thinking: bool,
    shows: Callable[[str], bool],
) -> Opening:
    """Find the longest token prefix that most responses of each side share.

    Args:
        loaded: the original model.
        prompts: side -> token ids of its prompts; the first `PROMPTS` of each are answered.
        thinking: leave a thinking block that most responses open as it is, instead of closing it.
        shows: whether a text shows the behaviour: that is never taken away from the responses.
    """
    tokenizer, closed = loaded.tokenizer, False
    ids: list[int] = []
    shares: dict[str, float] = {}
    for _ in range(_ROUNDS):
        responses, found = _look(loaded, prompts, ids)
        if not thinking:
            found = _up_to_thinking(tokenizer, found)
        if len(found) >= LONGEST:
            found = []
        while found and shows(_text(tokenizer, [*ids, *found])):
            found.pop()
        if not found:
            break
        for side, share in _shares(responses, found).items():
            shares[side] = min(share, shares.get(side, 1.0))
        ids += found
        rest = "" if thinking else close_thinking(tokenizer.decode(ids))
        if not rest:
            break
        closed = True
        ids += tokenizer(rest, add_special_tokens=False)["input_ids"]
    spoken = spoken_part(tokenizer, ids)
    markup = "" if spoken or not ids else tokenizer.decode(ids)
    return Opening(tuple(ids), spoken, shares, _note(len(ids), shares, markup, closed))


def shared_beginning(
    responses: dict[str, list[tuple[int, ...]]], ends: frozenset[int]
) -> list[int]:
    """Return the longest token prefix of more than half of every side's responses, without end tokens."""
    found: list[int] = []
    while True:
        nexts = set()
        for rows in responses.values():
            place = len(found)
            counts = Counter(r[place] for r in rows if len(r) > place and list(r[:place]) == found)
            token, count = max(counts.items(), key=lambda item: item[1], default=(-1, 0))
            nexts.add(token if 2 * count > len(rows) else -1)
        token = nexts.pop()
        if nexts or token == -1 or token in ends:
            return found
        found.append(token)


def spoken_part(tokenizer: Any, ids: Sequence[int]) -> tuple[int, ...]:
    """Return those of `ids` that come after all markup; none where that is white space only."""
    added = tokenizer.added_tokens_decoder
    marks = [n for n, i in enumerate(ids) if i in added and _is_markup(added[i])]
    rest = list(ids[max(marks, default=-1) + 1 :])
    spoken = after_thinking(tokenizer.decode(rest)).strip()
    while rest and len(tokenizer.decode(rest).strip()) > len(spoken):
        rest = rest[1:]  # a thinking tag that is spelt with ordinary tokens
    return tuple(rest) if spoken else ()


def _is_markup(token: Any) -> bool:
    text = str(token).strip()
    return token.special or (text[:1] in ("<", "[") and text[-1:] in (">", "]"))


def _up_to_thinking(tokenizer: Any, found: list[int]) -> list[int]:
    """Cut `found` where it opens a thinking block that it does not close."""
    for count in range(1, len(found) + 1):
        head, rest = tokenizer.decode(found[:count]), tokenizer.decode(found[count:])
        if close_thinking(head):
            return found if after_thinking(rest) != rest else found[:count]
    return found


def _look(
    loaded: Loaded, prompts: dict[str, list[list[int]]], ids: list[int]
) -> tuple[dict[str, list[tuple[int, ...]]], list[int]]:
    """Return how responses after `ids` begin, and the tokens that they share.

    A few tokens are enough where they share fewer.
    """
    for limit in (_FIRST, LONGEST):
        responses = _begin(loaded, prompts, ids, limit)
        found = shared_beginning(responses, end_tokens(loaded.model, loaded.tokenizer))
        if len(found) < limit:
            break
    return responses, found


def _begin(
    loaded: Loaded, prompts: dict[str, list[list[int]]], ids: list[int], limit: int
) -> dict[str, list[tuple[int, ...]]]:
    """Decode the first `limit` tokens of the original's responses to some prompts of each side."""
    rows = {side: [[*row, *ids] for row in rows[:PROMPTS]] for side, rows in prompts.items()}
    engine = Engine(loaded, (), rows, max_new_tokens=limit, plan=Plan(tokens=_TOKENS))
    evidence = engine.measure([ORIGINAL], [Responses(side) for side in rows])[0]
    return {side: [r.tokens for r in evidence.responses[side]] for side in rows}


def _shares(responses: dict[str, list[tuple[int, ...]]], found: list[int]) -> dict[str, float]:
    return {
        side: round(sum(list(r[: len(found)]) == found for r in rows) / len(rows), 4)
        for side, rows in responses.items()
    }


def _text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(spoken_part(tokenizer, ids), skip_special_tokens=True))


def _note(count: int, shares: dict[str, float], markup: str, closed: bool) -> str:
    if not count:
        return ""
    said = " and ".join(f"{100 * share:.0f} % of {side}" for side, share in shares.items())
    what = f" ({markup!r})" if markup else ""
    note = (
        f"Most responses begin alike ({said} prompts): these {count} tokens{what} end every prompt."
    )
    return note + (" They close the thinking block that the responses open." if closed else "")
