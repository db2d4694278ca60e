"""What is captured of writers equals what a plain pass over one prompt at a time shows."""

from __future__ import annotations

import weakref
from itertools import product

import builders
import pytest
import torch

from excise import events
from excise.capture import sweep
from excise.capture.moments import MomentObserver, RowObserver, SketchObserver
from excise.capture.sweep import Sweep, Text
from excise.errors import MeasurementError, MemoryExhausted

ROWS = builders.token_ids(11, seed=4, shortest=2)


@pytest.fixture(scope="module", params=builders.FAMILIES)
def model(request):
    return builders.loaded(request.param)


def plain(model, writer, ids):
    """One prompt's inputs and outputs (T, .) of one writer, without padding."""
    seen = []
    handle = writer.module.register_forward_hook(lambda _m, a, y: seen.append((a[0][0], y[0])))
    model.model(torch.tensor([ids]))
    handle.remove()
    return seen[0]


def last_rows(model, writers, rows=ROWS):
    observer = RowObserver(writers)
    observed(model, writers, [observer], list(map(Text.of, rows)))
    return observer.rows()


def observed(model, writers, observers, texts):
    Sweep(model, writers, observers).over(texts, "capture", events.ignore)


def writers_of(model):
    return model.anatomy.select(builders.COMPONENTS)[::5]


def test_last_rows_are_those_of_each_prompt_alone(model):
    writers = writers_of(model)
    found = last_rows(model, writers)
    for writer, rows in zip(writers, found, strict=True):
        for number, ids in enumerate(ROWS):
            x, y = plain(model, writer, ids)
            assert torch.allclose(rows.inputs[number], x[-1], rtol=1e-3, atol=1e-4)
            assert torch.allclose(rows.outputs[number], y[-1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reduced", [False, True])
def test_token_moments_count_every_token_but_those_left_out(model, reduced):
    writers = writers_of(model)
    texts = [Text(ids, 1 + number % len(ids)) for number, ids in enumerate(ROWS)]
    bases = dict.fromkeys(range(len(writers)))
    if reduced:
        draw = torch.Generator().manual_seed(0)
        sizes = [writer.module.weight.shape[1] for writer in writers]
        bases = {
            n: torch.linalg.qr(torch.randn(i, 7, generator=draw))[0].T for n, i in enumerate(sizes)
        }
    both = {span: MomentObserver(writers, span, bases) for span in ("written", "before")}
    observed(model, writers, list(both.values()), texts)
    for (number, writer), (span, observer) in product(enumerate(writers), both.items()):
        basis, one = bases[number], observer.sums[number]
        x = torch.cat([plain(model, writer, t.ids)[0][counted_of(t, span)] for t in texts])
        z = (x if basis is None else x @ basis.T).double()
        assert one.tokens == len(x)
        assert torch.equal(one.mean(), (one.moment / len(x)).float())
        assert one.square == pytest.approx(float(x.double().square().sum()), rel=1e-4)
        scale = float((z.T @ z).norm())
        assert float((one.moment - z.T @ z).norm()) < 1e-4 * scale
        if basis is None:
            rows = torch.linalg.qr(torch.randn(x.shape[1], 7))[0].T
            within = one.within(rows)
            assert (within.tokens, within.square) == (one.tokens, one.square)
            assert torch.allclose(within.moment, rows.double() @ one.moment @ rows.T.double())


def counted_of(text, span):
    last = text.prompt - 1
    return slice(last, None) if span == "written" else slice(last)


def test_sketches_span_where_the_tokens_lie(model):
    writers = writers_of(model)[:1]
    # Fewer tokens than features: the span can be had whole.
    texts = [Text(ids, 1 + len(ids) // 2) for ids in ROWS[:2]]
    observer = SketchObserver(writers, [0], 60)
    observed(model, writers, [observer], texts)
    sketch = observer.sums[0]
    basis = torch.linalg.svd(sketch.double(), full_matrices=False)[2]
    x = torch.cat([plain(model, writers[0], t.ids)[0] for t in texts]).double()
    assert len(x) < 60
    assert float((x - x @ basis.T @ basis).norm()) < 1e-3 * float(x.norm())


def test_hooks_are_gone_and_memory_is_backed_off():
    model = builders.loaded("qwen3")
    writers = writers_of(model)
    whole = last_rows(model, writers)
    seen = []

    def short(_module, args):
        seen.append(args[0].shape[0])
        if args[0].shape[0] > 3:
            raise torch.OutOfMemoryError("out of memory")

    handle = model.anatomy.layers[2].self_attn.q_proj.register_forward_pre_hook(short)
    halved = last_rows(model, writers)
    handle.remove()
    assert max(seen) > 3
    for a, b in zip(whole, halved, strict=True):
        assert torch.allclose(a.inputs, b.inputs, rtol=1e-3, atol=1e-4)
    assert not any(w.module._forward_hooks for w in writers)

    def never(_module, _args):
        raise torch.OutOfMemoryError("out of memory")

    handle = model.anatomy.layers[2].self_attn.q_proj.register_forward_pre_hook(never)
    with pytest.raises(MemoryExhausted, match="one prompt"):
        last_rows(model, writers)
    handle.remove()


def test_broken_activations_are_said():
    model = builders.loaded("qwen3")
    writer = writers_of(model)[1]
    writer.module.weight[0, 0] = float("inf")
    with pytest.raises(MeasurementError, match=r"not finite.*float32"):
        last_rows(model, [writer])


# -- experts ---------------------------------------------------------------------------------------

MOE = ("qwen3_moe", "gpt_oss", "llama4_text")


def experts_of(name):
    import families

    loaded = families.loaded(families.model(name))
    return loaded, tuple(w for w in loaded.anatomy.writers if w.expert is not None)


@pytest.mark.parametrize("name", MOE)
def test_experts_show_what_is_routed_to_them(name):
    model, writers = experts_of(name)
    ids = torch.tensor([ROWS[0]])
    plainly = model.model(ids).logits
    found = last_rows(model, writers)
    assert torch.equal(model.model(ids).logits, plainly)  # the forward is the module's own again
    reached = dict.fromkeys((w.layer for w in writers), 0)
    for writer, rows in zip(writers, found, strict=True):
        reached[writer.layer] += len(rows.inputs)
        bias = 0 if writer.bias is None else writer.bias
        expected = rows.inputs @ writer.weight.T + bias
        assert torch.allclose(rows.outputs, expected, rtol=1e-3, atol=1e-3)
    per_prompt = {count / len(ROWS) for count in reached.values()}
    assert per_prompt <= {1.0, 2.0}  # as many experts as a token has
    assert len({len(rows.inputs) for rows in found}) > 1
    observer = MomentObserver(writers, "before", dict.fromkeys(range(len(writers))))
    observed(model, writers, [observer], list(map(Text.of, ROWS)))
    sums, tokens = observer.sums.values(), sum(len(row) - 1 for row in ROWS)
    for layer in reached:
        shown = sum(m.tokens for w, m in zip(writers, sums, strict=True) if w.layer == layer)
        assert shown in (tokens, 2 * tokens)


@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize("method", ["ridge", "ara"])
def test_experts_that_few_prompts_reach_are_left_alone_and_named(name, method):
    import families
    from bound_methods import bench_of, bound, params_of

    model, writers = experts_of(name)
    component = writers[0].component
    bench = bench_of(model, method, {"edit": {"components": [component]}}, count=10)
    _, made = bound(bench)
    params = params_of(made, 1)[0] | {"first_layer": 0, "last_layer": families.LAYERS}
    edits = made.edits(made.candidate(params))
    left = [w.key for w, e in zip(made.writers, edits, strict=True) if e is None]
    assert 0 < len(left) < len(made.writers)
    (note,) = made.notes
    assert note.startswith("left alone, as fewer than ")
    assert " prompts reach them: " in note
    assert left[0] in note
    for writer, edit in zip(made.writers, edits, strict=True):
        if edit is not None:
            w, merged = writer.weight, edit.apply_to_weight(writer.weight)
            assert torch.allclose(merged.norm(dim=1), w.norm(dim=1), rtol=1e-3)
            assert float((merged - w).norm()) > 0


def test_no_writers_inputs_are_kept_beside_anothers(model, monkeypatch):
    """All writers' inputs and outputs of a pass together would be many times the model's activations."""
    alive, watched = [], sweep._watched

    def watching(writers, show):
        refs = []

        def look(number, x, y, at):
            alive.append(sum(ref() is not None for ref in refs))
            refs.append(weakref.ref(x))
            show(number, x, y, at)

        return watched(writers, look)

    monkeypatch.setattr(sweep, "_watched", watching)
    writers = model.anatomy.select(builders.COMPONENTS)
    numbers = range(len(writers))
    observers = [
        RowObserver(writers),
        MomentObserver(writers, "written", dict.fromkeys(numbers)),
        SketchObserver(writers, numbers, 4),
    ]
    observed(model, writers, observers, [Text(ids, 1 + len(ids) // 2) for ids in ROWS])
    assert len(alive) == len(writers)
    assert max(alive) <= 1
