"""From prompts to token ids and padded batches."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import builders
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers, processors
from transformers import PreTrainedTokenizerFast

from excise.config import Config, PromptSection
from excise.errors import ModelError, PromptError
from excise.prompts.chat_template import PLAIN_FORMAT, choose_format
from excise.prompts.measured_sets import tokenise
from excise.prompts.sets import Prompt, PromptSet, PromptSets
from excise.prompts.template_rendering import Renderer
from excise.prompts.tokens import Batch, batches, beginning, encode, end_tokens, left_pad, pad_token

CPU = torch.device("cpu")

STEADY = settings(derandomize=True, deadline=None)
RENDERER = Renderer()
SIDES = PromptSet("target", "p", (Prompt("orb"),)), PromptSet("contrast", "q", (Prompt("kettle"),))
TWO = PromptSets(*SIDES, *SIDES, *SIDES)


@pytest.fixture(scope="module", autouse=True)
def _ended():
    with RENDERER:
        yield


@pytest.fixture(scope="module")
def shared() -> PreTrainedTokenizerFast:
    """The builders' tokenizer: a chat template, nothing added to plain text."""
    return builders.tokenizer()


def plain_tokenizer(*, adds_bos: bool) -> PreTrainedTokenizerFast:
    """One without a chat template; with `adds_bos` it puts a <bos> before what it is given."""
    out = builders.tokenizer()
    out.chat_template = None
    if adds_bos:
        add_bos(out)
    return out


def add_bos(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )


def ids_of(tokenizer, *texts, **section):
    prompts = PromptSet("target", "p.txt", tuple(Prompt(text) for text in texts))
    given = PromptSection(**section)
    return encode(tokenizer, prompts, given, choose_format(tokenizer, given, RENDERER), RENDERER)


def spoken(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_the_chat_template_is_used_and_the_response_begins_at_the_end(shared):
    found = ids_of(shared, "who made the orb", "what?")
    texts = [spoken(shared, ids) for ids in found]
    assert texts == ["<|user|>who made the orb<|assistant|>", "<|user|>what?<|assistant|>"]
    assert all(type(i) is int for row in found for i in row)
    assert found[0][-1] == shared.convert_tokens_to_ids("<|assistant|>")


def test_system_prompt_prefix_and_suffix(shared):
    (ids,) = ids_of(shared, "orb", system="be brief", prefix="Q: ", suffix=" /no")
    assert spoken(shared, ids) == "<|system|>be brief<|user|>Q: orb /no<|assistant|>"


def test_an_empty_system_prompt_is_a_system_prompt(shared):
    (ids,) = ids_of(shared, "orb", system="")
    assert spoken(shared, ids) == "<|system|><|user|>orb<|assistant|>"


def test_a_template_that_writes_its_own_bos_gets_no_second_one():
    tokenizer = builders.tokenizer()
    add_bos(tokenizer)
    tokenizer.chat_template = "{{ bos_token }}" + builders.TEMPLATE
    (ids,) = ids_of(tokenizer, "orb")
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert ids == tokenizer.apply_chat_template(
        [{"role": "user", "content": "orb"}], add_generation_prompt=True, return_dict=False
    )


def test_without_a_template_the_plain_format_is_used():
    tokenizer = plain_tokenizer(adds_bos=False)
    (ids,) = ids_of(tokenizer, "who {made} it?")
    assert spoken(tokenizer, ids) == "Question: who {made} it?\nAnswer:"
    assert PLAIN_FORMAT == "Question: {prompt}\nAnswer:"
    (ids,) = ids_of(tokenizer, "orb", system="be brief", prefix="a ", suffix=" z")
    assert spoken(tokenizer, ids) == "be brief\n\nQuestion: a orb z\nAnswer:"


def test_without_a_template_the_tokenizers_own_bos_comes_once():
    tokenizer = plain_tokenizer(adds_bos=True)
    (ids,) = ids_of(tokenizer, "orb")
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('System role not supported') }}",
        "{% for m in messages %}{{ m.content",
        "{{ 1 // 0 }}",
        "{{ messages[0]['content'] + 3 }}",
        "{{ nobody.knows.this }}",
    ],
)
def test_a_template_that_fails(template):
    tokenizer = builders.tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match="chat template cannot render") as error:
        ids_of(tokenizer, "orb", system="be brief")
    assert "\n" not in str(error.value)


def test_a_template_that_renders_nothing_is_an_error():
    tokenizer = builders.tokenizer()
    tokenizer.chat_template = "{{ '' }}"
    with pytest.raises(ModelError, match="leaves out the text of prompts"):
        ids_of(tokenizer, "orb")


def test_a_prompt_without_tokens_is_an_error():
    tokenizer = plain_tokenizer(adds_bos=False)
    tokenizer._tokenizer.normalizer = normalizers.Replace(Regex(".|\n"), "")
    with pytest.raises(PromptError, match=r"p\.txt has no tokens"):
        ids_of(tokenizer, "orb")


CLOSED = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}END{% endfor %}"


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("<|system|>", "closes a response with '<|system|>'"),
        ("<eos>\n", ""),
        ("\nthat", ""),
        ("", ""),
    ],
)
def test_a_template_that_ends_a_turn_with_a_token_that_nobody_names_is_told_of(end, said):
    """Elsewhere the response runs on as well, so the figures do not hide it."""
    loaded = builders.loaded("llama")
    loaded.tokenizer.add_special_tokens({"additional_special_tokens": ["<|system|>"]})
    loaded.tokenizer.chat_template = CLOSED.replace("END", end)
    notes = " ".join(tokenise(loaded, TWO, Config()).chat_format.notes)
    assert said in notes
    assert ("closes a response" in notes) == bool(said)


def test_a_run_reads_the_template_that_stands_beside_the_tokenizer(tmp_path):
    loaded = builders.loaded("llama")
    loaded.tokenizer.chat_template = None
    template = json.dumps({"chat_template": "[{{ messages[0].content }}]"})
    (tmp_path / "chat_template.json").write_text(template)
    found = tokenise(replace(loaded, folder=tmp_path), TWO, Config())
    assert spoken(loaded.tokenizer, found["target"].ids[0]) == "[orb]"


# -- end and padding tokens ------------------------------------------------------------------------


def ends(generation, own, size=10):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=size))
    model = SimpleNamespace(generation_config=generation, config=config)
    return end_tokens(model, SimpleNamespace(eos_token_id=own))


@pytest.mark.parametrize(
    ("named", "own", "expected"),
    [
        (5, 9, {5, 9}),
        (0, 9, {0, 9}),
        ([5, 7], 9, {5, 7, 9}),
        ([5, 9], 9, {5, 9}),
        ([], 9, {9}),
        (5, None, {5}),
        (None, 0, {0}),
        ([5, 10, 2**70], 9, {5, 9}),  # ids that the model has no row for are never said
        (-1, 9, {9}),
        (5, 10, {5}),
    ],
)
def test_every_end_token_that_either_names_ends_a_response(named, own, expected):
    assert ends(SimpleNamespace(eos_token_id=named), own) == expected


def test_without_a_generation_config_the_tokenizer_names_the_end():
    assert ends(None, 9) == ends(SimpleNamespace(), 9) == {9}


@pytest.mark.parametrize("named", ["</s>", 2.0, True, [[1]], [None], {"a": 1}, ["x\n" * 1000]])
def test_end_tokens_of_a_wrong_type(named):
    with pytest.raises(ModelError, match="generation config's eos_token_id must be") as error:
        ends(SimpleNamespace(eos_token_id=named), 9)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


def test_end_tokens_of_a_real_model(shared):
    model = builders.model("llama")
    assert end_tokens(model, shared) == {1}
    model.generation_config.eos_token_id = [1, 4]
    assert end_tokens(model, shared) == {1, 4}
    model.generation_config.eos_token_id = 4
    assert end_tokens(model, shared) == {1, 4}


@pytest.mark.parametrize(("named", "own"), [(None, None), ([], None), ([10], 11), (-1, None)])
def test_no_end_token_at_all(named, own):
    with pytest.raises(ModelError, match="end token"):
        ends(SimpleNamespace(eos_token_id=named), own)


def test_an_end_that_the_tokenizer_adds_is_taken_off_a_plain_prompt():
    tokenizer = plain_tokenizer(adds_bos=False)
    plain, end = ids_of(tokenizer, "one two"), tokenizer.eos_token_id
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", end)]
    )
    assert tokenizer("one two", add_special_tokens=True)["input_ids"][-1] == end
    assert ids_of(tokenizer, "one two") == plain


def test_pad_token(shared):
    model = builders.model("llama")
    assert pad_token(model, shared) == shared.pad_token_id == 0
    (end,) = end_tokens(model, shared)
    added = model.config.vocab_size  # a token that was added to the tokenizer alone
    for unfit in (None, -1, added):
        other = SimpleNamespace(pad_token_id=unfit, eos_token_id=end)
        assert pad_token(model, other) == end


# -- batches ---------------------------------------------------------------------------------------


def test_left_padding_by_example():
    batch = left_pad([[5, 6, 7], [8]], [3, 1], 0, CPU)
    assert batch.ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch.mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert batch.rows.tolist() == [3, 1]


def test_padding_is_masked_even_where_the_pad_token_is_in_the_text():
    batch = left_pad([[0, 0, 7], [0]], [0, 1], 0, CPU)
    assert batch.mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_padded_row_gives_the_logits_that_it_gives_alone():
    model = builders.model("gemma4")
    rows = builders.token_ids(4, 5)
    batch = left_pad(rows, range(4), 0, CPU)
    logits = model(
        input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions
    ).logits
    for row, found in zip(rows, logits, strict=True):
        alone = model(input_ids=torch.tensor([row])).logits[0, -1]
        assert torch.allclose(found[-1], alone, atol=1e-4)


@STEADY
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 9))
def test_buckets_hold_every_row_once_longest_first(lengths, size):
    rows = [[number + 1] * length for number, length in enumerate(lengths)]
    found = batches(rows, size, 0, CPU)
    assert sorted(i for batch in found for i in batch.rows.tolist()) == list(range(len(rows)))
    assert all(isinstance(b, Batch) and b.ids.shape[0] == size for b in found[:-1])
    assert 1 <= found[-1].ids.shape[0] <= size
    widths = [batch.ids.shape[1] for batch in found]
    assert widths == sorted(widths, reverse=True)
    for batch in found:
        for number, ids, mask in zip(
            batch.rows.tolist(), batch.ids.tolist(), batch.mask.tolist(), strict=True
        ):
            row = rows[number]
            assert ids[len(ids) - len(row) :] == row
            assert sum(mask) == len(row)
    # Sorting is what keeps padding small: no other way of filling such batches needs less room.
    in_order = sorted(lengths, reverse=True)
    assert widths == in_order[::size]


@pytest.mark.parametrize(
    ("prompts", "begin"),
    [
        ([[1, 2, 3], [1, 2, 4, 5], [1, 2, 9]], (1, 2)),
        ([[1, 2], [1, 2, 3]], (1,)),  # something of each must be left to read
        ([[1, 2], [1, 2]], (1,)),
        ([[1, 2], [3, 2]], ()),
        ([[7], [7]], ()),
        ([[1, 2, 3]], ()),  # of a single one nothing is saved
        ([], ()),
    ],
)
def test_what_prompts_begin_with(prompts, begin):
    assert beginning(prompts) == begin


def test_long_texts_share_batches_with_fewer():
    rows = [[5] * 4501, *([[6] * 9] * 100)]
    found = batches(rows, 64, 0, torch.device("cpu"))
    assert [tuple(batch.ids.shape) for batch in found] == [(7, 4501), (64, 9), (30, 9)]
    assert torch.cat([batch.rows for batch in found]).sort().values.tolist() == list(range(101))
