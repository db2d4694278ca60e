"""Every family: where it writes is proven, edits are exact, stacked equals merged, exports reload."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import builders
import families
import pytest
import torch
from safetensors.torch import load_file

from excise.checkpoints import writer_proof
from excise.checkpoints.loading import load
from excise.cli import main as cli
from excise.config import EditSection, ModelSection
from excise.engine.engine import Engine, Plan
from excise.engine.requests import Divergence, Responses
from excise.errors import UnknownArchitecture
from excise.export.merging import merge_checkpoint
from excise.model.anatomy import architectures

REQUESTS = [Responses("target"), Divergence()]
NEW_TOKENS = 5


@pytest.fixture(scope="module", params=families.ALL)
def name(request):
    """One family after another, so that what is built for one is used by all of its tests."""
    return request.param


@pytest.fixture(scope="module")
def loaded(name):
    return families.loaded(families.model(name))


def test_its_writers_and_nothing_else_write(loaded):
    writer_proof.prove(loaded.model, loaded.anatomy)
    for component in loaded.anatomy.components:
        rest = tuple(w for w in loaded.anatomy.writers if w.component != component)
        with pytest.raises(UnknownArchitecture, match="something besides"):
            writer_proof.prove(loaded.model, replace(loaded.anatomy, writers=rest))


def test_ablation_is_exact_at_every_writer(loaded):
    """Strength 1 with `none`: what a writer adds, past its post-norms, has nothing of the direction."""
    anatomy = loaded.anatomy
    method = families.method(anatomy, EditSection(row_norms="none"))
    alone = families.merged(loaded.model, method.writers, method.edits(families.flat(anatomy)))
    v = method.directions.at(0, 1.5)
    names = {id(m): path for path, m in loaded.model.named_modules()}
    writers = {names[id(w.module)]: w for w in method.writers}
    shares = {}
    for model in (loaded.model, alone):
        hooks = []
        for path, writer in writers.items():

            def keep(_m, _a, out, path=path, writer=writer):
                added = out if writer.gain is None else out * writer.gain
                share = float((added @ v).abs().max() / added.norm(dim=-1).max())
                shares[path] = max(share, shares.get(path, 0.0))

            hooks.append(model.get_submodule(path).register_forward_hook(keep))
        shares.clear()
        model(torch.tensor(builders.token_ids(2, 9, 12, 12)))
        for hook in hooks:
            hook.remove()
        if model is loaded.model:
            assert min(shares.values()) > 1e-3
    assert len(shares) == len(writers)
    assert max(shares.values()) < 1e-5


def engine(loaded, writers, plan, alike=0):
    """`alike`: so many tokens that all prompts begin with."""
    first = builders.token_ids(1, 3, 9, 9)[0][:alike]
    prompts = {
        "target": [first + row for row in builders.token_ids(5, 1, 3, 14)],
        "contrast": [first + row for row in builders.token_ids(4, 2, 3, 14)],
    }
    return Engine(loaded, writers, prompts, max_new_tokens=NEW_TOKENS, plan=plan)


def generated(model, ids):
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return tuple(out[0, len(ids) :].tolist())


def divergence(original, edited, ids, response):
    full = torch.tensor([[*ids, *response]])
    span = slice(len(ids) - 1, -1)
    p, q = (m(full).logits[0, span].double().log_softmax(-1) for m in (original, edited))
    return float((p.exp() * (p - q)).sum())


@pytest.mark.parametrize(
    ("plan", "alike"), [(Plan(rows=7, stack=3, decode=12), 0), (Plan(rows=64, stack=3), 6)]
)
def test_stacked_equals_merged_and_generated(loaded, plan, alike):
    method = families.method(loaded.anatomy)
    edits = [method.edits(c) for c in families.candidates(loaded.anatomy, 3)]
    ours = engine(loaded, method.writers, plan, alike)
    before = {n: (p.data_ptr(), p._version) for n, p in loaded.model.named_parameters()}
    with ours.keeping_drafts():
        evidence = ours.measure(edits, REQUESTS)
    again = ours.measure(edits, REQUESTS[:1])  # with drafts of what was said
    original = ours.original("contrast").responses
    assert before == {n: (p.data_ptr(), p._version) for n, p in loaded.model.named_parameters()}
    assert all("forward" not in m.__dict__ for m in loaded.model.modules())
    for one, found, repeated in zip(edits, evidence, again, strict=True):
        assert repeated.responses == found.responses
        alone = families.merged(loaded.model, method.writers, one)
        for ids, response in zip(ours.prompts["target"], found.responses["target"], strict=True):
            assert response.tokens == generated(alone, ids)
        total = sum(float(row.sum()) for row in found.divergence["contrast"])
        expected = sum(
            divergence(loaded.model, alone, ids, response.tokens)
            for ids, response in zip(ours.prompts["contrast"], original, strict=True)
        )
        assert total == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.fixture(scope="module")
def saved(loaded, tmp_path_factory):
    """The family's checkpoint."""
    return families.save(loaded.model, tmp_path_factory.mktemp("saved") / "model")


def test_the_page_of_families_is_up_to_date():
    page = Path(__file__).parents[2] / "docs" / "families.md"
    assert page.read_text(encoding="utf-8") == families.table(
        dict.fromkeys(families.ALL, families.PROOFS)
    ), "run `make families`"
    assert len({name.split()[0] for name in families.ALL}) >= 35


def test_every_data_row_is_proven_here():
    tested = {kind for kind, _ in families.FAMILIES.values()}
    tested |= {kind for kind, _, _ in families.MULTIMODAL.values()}
    assert set(architectures()) == tested


def test_an_export_loads_as_what_was_measured(loaded, saved, tmp_path):
    again = load(ModelSection(source=str(saved), dtype="float32"))
    method = families.method(again.anatomy)
    edits = method.edits(families.flat(again.anatomy, 0.8))
    named = {w.name: e for w, e in zip(method.writers, edits, strict=True)}
    merge = merge_checkpoint(saved, tmp_path / "out", named, method.writers)
    expected = families.merged(again.model, method.writers, edits)
    found = load(ModelSection(source=str(tmp_path / "out"), dtype="float32"))
    mine, theirs = found.model.state_dict(), expected.state_dict()
    assert mine.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.allclose(mine[key], tensor, atol=1e-6), key
    changed = set()
    for shard in sorted(saved.glob("*.safetensors")):
        before, after = load_file(shard), load_file(tmp_path / "out" / shard.name)
        changed |= {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == set(merge.tensors)
    for file in saved.iterdir():
        if file.suffix != ".safetensors":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_inspect_tells_people_and_programs(loaded, saved, capsys):
    assert cli.main(["inspect", str(saved), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {w["component"] for w in found["writers"]} == set(loaded.anatomy.components)
    assert len(found["writers"]) == len(loaded.anatomy.writers)
    assert found["multimodal"] == loaded.anatomy.tower
    for shown, writer in zip(found["writers"], loaded.anatomy.writers, strict=True):
        assert (shown["module"], shown["expert"]) == (writer.name, writer.expert)
        assert shown["stored"].startswith("(E" if writer.expert is not None else "(")
    edited = {line.split(":")[0] for line in found["edited"]}
    assert edited == set(loaded.anatomy.defaults)
    listed = edited | {line.split(":")[0] for line in found["not_edited"]}
    assert listed >= set(loaded.anatomy.components)
    assert cli.main(["inspect", str(saved)]) == 0
    out = capsys.readouterr().out
    assert all(component in out for component in loaded.anatomy.components)
