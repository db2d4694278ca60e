"""Greedy decoding of a batch against one row at a time, and the tree that judges each text once."""

from __future__ import annotations

from contextlib import nullcontext

import builders
import pytest
import torch

from excise.engine.decoding import ResponseTree, Transcript, greedy
from excise.engine.requests import Response
from excise.model.forward import Forward
from excise.prompts.tokens import left_pad

LIMIT = 14
ROWS = builders.token_ids(9, 21)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=builders.FAMILIES)
def model(request):
    # With biases a random Llama says one token for ever, and no two responses would differ.
    plain = {"attention_bias": False, "mlp_bias": False} if request.param == "llama" else {}
    return builders.loaded(request.param, 3 if plain else 0, **plain)


def alone(model, ids, ends, limit=LIMIT):
    """The response of one prompt, by whole passes without a cache."""
    out = []
    while len(out) < limit:
        logits = model.model(torch.tensor([[*ids, *out]])).logits[0, -1]
        out.append(int(logits.argmax()))
        if out[-1] in ends:
            break
    return tuple(out)


def decode(model, ends, *, deciders=None, limit=LIMIT, rows=ROWS):
    """All rows at once; the responses, and which rows were left each time that some were taken out."""
    forward = Forward(model.model, model.anatomy)
    tree = ResponseTree(model.tokenizer, deciders)
    transcript = Transcript(tree, len(rows), frozenset(ends), limit)
    batch = left_pad(rows, range(len(rows)), 0, CPU)
    groups = []

    def applied(alive):
        groups.append(alive)
        return nullcontext()

    with torch.inference_mode():
        cache = forward.cache(batch.ids.shape[1] + limit)
        hidden = forward.hidden(batch.ids, batch.mask, batch.positions, cache)
        first = forward.logits(hidden[:, -1]).argmax(-1)
        everyone = list(range(len(rows)))
        greedy(forward, transcript, everyone, first, batch.mask, cache, applied)
    assert groups[0] == everyone
    return transcript.responses(), groups[1:], cache


def test_a_tree_keeps_one_token_a_node_and_gives_all_of_them_back():
    """Prefixes kept whole would take memory with the square of the responses' length."""
    tree, node, said = ResponseTree(builders.tokenizer(), None), 0, []
    for token in range(200):
        said.append(5 + token % 7)
        node = tree.step(node, said[-1])
        assert tree.length(node) == len(said)
    assert tree.tokens(node) == tuple(said)
    assert tree.tokens(0) == ()
    assert tree.response(node, ended=True).tokens == tuple(said)
    held = [x for x in vars(tree).values() if isinstance(x, list)]
    assert all(not isinstance(e, tuple) or len(e) == 2 for x in held for e in x)


def likely_ends(model):
    """Tokens that end some responses early and others late: some of what the model says anyway."""
    said = [alone(model, ids, ()) for ids in ROWS]
    return {said[0][2], said[1][4], said[2][6], said[3][9]}


def test_without_ends_every_row_goes_to_the_limit(model):
    responses, groups, _ = decode(model, ())
    assert not groups
    for ids, response in zip(ROWS, responses, strict=True):
        assert response.tokens == alone(model, ids, ())
        assert not response.ended
        assert response.text == model.tokenizer.decode(response.tokens, skip_special_tokens=True)


def test_finished_rows_leave_and_the_others_do_not_notice(model):
    ends = likely_ends(model)
    responses, groups, cache = decode(model, ends)
    lengths = [len(response.tokens) for response in responses]
    assert len(set(lengths)) > 2
    for ids, response in zip(ROWS, responses, strict=True):
        assert response.tokens == alone(model, ids, ends)
        assert response.ended == (response.tokens[-1] in ends)
    assert groups
    for before, after in zip([list(range(len(ROWS))), *groups], groups, strict=False):
        assert set(after) < set(before)
        assert after == sorted(after)
        assert len(after) <= 0.75 * len(before)
    filled = [layer.keys for layer in cache.layers if layer.keys is not None]
    assert {keys.shape[0] for keys in filled} == {len(groups[-1])}


@pytest.mark.parametrize("limit", [1, 2])
def test_the_limit_counts_tokens(model, limit):
    for ids, response in zip(ROWS, decode(model, (), limit=limit)[0], strict=True):
        assert response.tokens == alone(model, ids, (), limit)


def test_one_row(model):
    responses, groups, _ = decode(model, (), rows=ROWS[:1])
    assert responses[0].tokens == alone(model, ROWS[0], ())
    assert not groups


def test_an_end_token_at_the_limit_has_ended(model):
    said = alone(model, ROWS[0], (), 3)
    (response,) = decode(model, {said[2]} - set(said[:2]), limit=3, rows=ROWS[:1])[0]
    assert response.tokens == said
    assert response.ended == (said[2] not in said[:2])


def test_a_decided_row_stops_as_soon_as_its_text_is_decided(model):
    def decided(text):
        return len(text) > 6

    whole = decode(model, ())[0]
    cut, groups, _ = decode(model, (), deciders=frozenset({decided}))
    assert groups
    for full, part in zip(whole, cut, strict=True):
        prefixes = [full.tokens[:n] for n in range(1, LIMIT + 1)]
        texts = [model.tokenizer.decode(p, skip_special_tokens=True) for p in prefixes]
        stop = next((n for n, text in enumerate(texts) if decided(text)), LIMIT - 1)
        assert part.tokens == prefixes[stop]
        assert part.ended is False
    assert any(len(part.tokens) < LIMIT for part in cut)


def test_decoding_goes_on_from_what_rows_have_said(model):
    """Rows that come with different numbers of tokens end as they would have, at the same limit."""
    ends = likely_ends(model)
    forward = Forward(model.model, model.anatomy)
    whole = [alone(model, ids, ends) for ids in ROWS]
    transcript = Transcript(ResponseTree(model.tokenizer, None), len(ROWS), frozenset(ends), LIMIT)
    for row, tokens in enumerate(whole):
        for token in tokens[: row % 4]:
            transcript.append(row, token)
    rows = transcript.open_rows()
    assert len({len(transcript.tokens(row)) for row in rows}) > 2
    batch = left_pad([(*ROWS[row], *transcript.tokens(row)) for row in rows], rows, 0, CPU)
    with torch.inference_mode():
        cache = forward.cache(batch.ids.shape[1] + max(map(transcript.room, rows)))
        hidden = forward.hidden(batch.ids, batch.mask, batch.positions, cache)
        first = forward.greedy(hidden[:, -1])
        greedy(forward, transcript, rows, first, batch.mask, cache, lambda _alive: nullcontext())
    assert [response.tokens for response in transcript.responses()] == whole


# -- the tree --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return builders.tokenizer()


def walk(tree, tokens):
    node = 0
    for token in tokens:
        node = tree.step(node, token)
    return node


def test_a_text_is_judged_once_however_often_it_is_said(tokenizer):
    judged = []
    tree = ResponseTree(tokenizer, frozenset({lambda text: judged.append(text)}))
    ids = tokenizer("the tarn kettle")["input_ids"]
    nodes = {walk(tree, ids) for _ in range(5)}
    assert len(nodes) == 1
    assert judged == [tokenizer.decode(ids[:n]) for n in range(1, len(ids) + 1)]
    walk(tree, [*ids[:2], 5])
    assert len(judged) == len(ids) + 1


def test_different_texts_have_different_nodes(tokenizer):
    tree = ResponseTree(tokenizer, None)
    paths = [(7,), (7, 8), (8, 7), (8,), (7, 7), (7, 8, 9)]
    nodes = [walk(tree, path) for path in paths]
    assert len(set(nodes)) == len(paths)
    for path, node in zip(paths, nodes, strict=True):
        assert tree.response(node, True) == Response(path, tokenizer.decode(path), True)
        assert tree.response(node, False).ended is False


def test_a_response_is_decided_when_every_decider_says_so(tokenizer):
    tree = ResponseTree(
        tokenizer, frozenset({lambda text: "tarn" in text, lambda text: "kettle" in text})
    )
    ids = tokenizer("the tarn kettle is")["input_ids"]
    found = [tree.is_decided(walk(tree, ids[:n])) for n in range(len(ids) + 1)]
    texts = [tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]
    assert found == ["tarn" in t and "kettle" in t for t in texts]
    assert found[-1]


def test_without_deciders_nothing_is_decided(tokenizer):
    tree = ResponseTree(tokenizer, None)
    assert not any(tree.is_decided(walk(tree, range(5, n))) for n in range(6, 20))


def test_special_tokens_are_no_text(tokenizer):
    tree = ResponseTree(tokenizer, None)
    (word,) = tokenizer("the")["input_ids"][:1]
    response = tree.response(walk(tree, [word, tokenizer.eos_token_id]), True)
    assert response.text == tokenizer.decode([word])
    assert response.tokens == (word, tokenizer.eos_token_id)
