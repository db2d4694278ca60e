"""What is offered as a draft, and when reading drafts is worth it."""

from __future__ import annotations

from excise.engine.drafts import Drafts, cheaper_than_decoding
from excise.engine.requests import Response


def known(*candidates):
    drafts = Drafts()
    for answers in candidates:
        drafts.add([Response(tokens, "", True) for tokens in answers])
    return drafts


def test_the_most_frequent_response_comes_first():
    drafts = known([(5, 6, 7)], [(8, 9)], [(8, 9)])
    assert drafts.after(0, ()) == (8, 9)


def test_a_draft_goes_on_from_what_was_said():
    drafts = known([(5, 6, 7)], [(8, 9)], [(8, 9)], [(5, 6, 4, 3)])
    assert drafts.after(0, (5,)) in {(6, 7), (6, 4, 3)}
    assert drafts.after(0, (5, 6, 4)) == (3,)
    assert drafts.after(0, (8,)) == (9,)


def test_nothing_is_offered_where_nothing_fits():
    drafts = known([(5, 6), (1, 2)])
    assert drafts.after(0, (5, 6)) == ()
    assert drafts.after(0, (7,)) == ()
    assert drafts.after(0, (5, 7)) == ()
    assert drafts.after(0, (2,)) == ()  # nothing follows it


def test_what_has_left_a_draft_comes_back_where_the_last_tokens_are_alike():
    drafts = known([(5, 6, 7, 8), (6, 9, 3)])
    assert drafts.after(0, (1, 6)) == (7, 8)
    assert drafts.after(0, (5, 1, 5, 6)) == (7, 8)
    assert drafts.after(0, (5, 1, 9)) == (3,)  # another prompt's
    assert drafts.after(1, (1, 5)) == (6, 7, 8)
    assert drafts.after(0, (1, 6, 9)) == (3,)  # two tokens of another's before one of its own


def test_what_begins_so_comes_before_what_has_the_same_last_tokens():
    drafts = known([(5, 6, 7)], [(4, 5, 6, 8)], [(4, 5, 6, 8)])
    assert drafts.after(0, (5, 6)) == (7,)


def test_equally_frequent_ones_are_offered_the_same_whatever_came_first():
    one, other = (5, 6, 7), (5, 8)
    assert known([one], [other]).after(0, (5,)) == known([other], [one]).after(0, (5,))


def test_reading_pays_while_it_brings_more_than_half_of_what_is_read():
    assert cheaper_than_decoding(10, 19)
    assert not cheaper_than_decoding(10, 20)
    assert not cheaper_than_decoding(0, 0)


def test_drafts_pay_until_first_rounds_say_otherwise():
    drafts = Drafts()
    assert drafts.pay
    drafts.tried(10, 12)
    assert drafts.pay
    drafts.tried(0, 8)  # the sum counts, as one batch of rows says little
    assert not drafts.pay
    drafts.tried(9, 9)
    assert drafts.pay
