"""A direction planted at one layer of a model: where it is found, what an edit there removes."""

from __future__ import annotations

import builders
import pytest
import torch

from excise import events, stage
from excise.config import DirectionSection, EditSection
from excise.directional import DirectionalMethod
from excise.directions import normalise
from excise.dressing import Dressing
from excise.profiles import Profile
from excise.space import Candidate

PLANTED, MARK, OTHER = 3, 7, 8  # the layer, and the last tokens of target and contrast prompts


@pytest.fixture(scope="module")
def planted():
    """A model in which one MLP writes a direction when it reads the mark, and the two tokens are alike."""
    model = builders.loaded("llama")
    inner = model.model
    table = inner.get_input_embeddings().weight
    draw = torch.Generator().manual_seed(1)
    v = normalise(torch.randn(builders.WIDTH, generator=draw))
    table[MARK] = table[OTHER] + 0.01 * torch.randn(builders.WIDTH, generator=draw)
    marks: list[torch.Tensor] = []
    inner.model.embed_tokens.register_forward_hook(
        lambda _m, args, _out: marks.append(args[0] == MARK)
    )
    inner.model.layers[PLANTED].mlp.down_proj.register_forward_hook(
        lambda _m, _a, out: out + 50 * marks[-1][..., None] * v
    )
    rows = builders.token_ids(12, 5)
    tokens = {
        "target": [[*row, MARK] for row in rows[:6]],
        "contrast": [[*row, OTHER] for row in rows[:6]],
    }
    return model, v, stage.Tokens(tokens, Dressing(None, ""))


@pytest.mark.parametrize("center", ["mean", "geometric_median"])
def test_it_is_found_after_the_layer_that_writes_it(planted, center):
    model, v, tokens = planted
    section = DirectionSection(center=center)
    directions, separation = stage.find_directions(model, tokens, section, events.ignore)
    assert directions.unit.shape == (builders.LAYERS, builders.WIDTH)
    assert float(directions.unit[PLANTED] @ v) > 0.99  # from contrast to target, not the other way
    assert abs(float(directions.unit[PLANTED - 1] @ v)) < 0.6
    assert separation.auc[PLANTED] == 1.0
    rows = {
        side: stage.residuals(model, side, tokens[side], None, events.ignore)
        for side in ("target", "contrast")
    }
    along = (rows["target"] - rows["contrast"]).mean(0) @ v
    assert float(along[PLANTED]) == pytest.approx(50, rel=0.1)
    assert abs(float(along[PLANTED - 1])) < 1


def test_an_edit_by_its_index_or_at_its_own_layer_removes_it_there(planted):
    model, v, tokens = planted
    directions, _ = stage.find_directions(model, tokens, DirectionSection(), events.ignore)
    writers = model.anatomy.select(builders.COMPONENTS)
    method = DirectionalMethod(writers, directions, EditSection(row_norms="none"))
    profiles = {name: Profile(1.0, PLANTED, 1.0, 10.0) for name in builders.COMPONENTS}
    for index in (float(PLANTED), None):
        for writer, edit in zip(writers, method.edits(Candidate(index, profiles)), strict=True):
            left = float((edit.apply_to_weight(writer.weight).T @ v).norm())
            before = float((writer.weight.T @ v).norm())
            if index is not None or writer.layer == PLANTED:
                assert left < 0.1 * before
            elif writer.layer == PLANTED - 1:
                assert left > 0.5 * before
