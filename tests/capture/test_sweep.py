"""One sweep gives what a pass for each thing gives: every method's tensors, on every kind of family."""

from __future__ import annotations

from itertools import pairwise

import builders
import families
import pytest
import separate_passes
import torch

from excise import events
from excise.capture import sweep
from excise.capture.directions import Directions
from excise.capture.moments import RowObserver
from excise.capture.residuals import residual_pass
from excise.capture.sweep import ResidualsAlone, Sweep, Text, observe
from excise.checkpoints.loading import load
from excise.config import ModelSection, validate
from excise.errors import MemoryExhausted
from excise.methods import ridge
from excise.methods.ara import AraCapture
from excise.methods.ridge import RidgeCapture
from excise.prompts.tokens import batches

TOKENS = {
    "target": builders.token_ids(13, 1, shortest=2),
    "contrast": builders.token_ids(13, 2, shortest=2),
}
RESPONSES = builders.token_ids(13, 3, shortest=1, longest=6)
# Experts in three forms, a short convolution and linear attention (no padding), several streams, states
# of another kind in all layers.
FAMILIES = (
    *("llama", "qwen3_moe", "gpt_oss", "llama4_text", "lfm2", "qwen3_5_text", "gemma3n_text"),
    *("gemma4_text with experts", "granitemoehybrid", "falcon_h1"),
)


def close(found: torch.Tensor, expected: torch.Tensor, share: float = 2e-4) -> bool:
    scale = float(expected.double().norm())
    return found.shape == expected.shape and float((found - expected).norm()) <= share * scale


def in_full(captured, name, what):
    """A captured tensor of one writer, in all of input space: bases may be turned within their span."""
    x, basis = captured[f"{name}/{what}"], captured.get(f"{name}/basis")
    if basis is None or what in ("outputs", "contrast", "diagonal"):
        return x
    return x @ basis if what == "target" else basis.T @ x @ basis


def alike(found, expected, writers, share: float = 2e-4) -> None:
    assert found.keys() == expected.keys()
    for writer in writers:
        for what in ("keep", "prompts", "first", "target", "outputs", "contrast", "diagonal"):
            both = [in_full(one, writer.name, what) for one in (found, expected)]
            assert close(*both, share), (writer.key, what)


def separately(loaded, writers, size):
    config = validate({"ridge": {"basis": 512}})
    config = config.model_copy(update={"ridge": config.ridge.model_copy(update={"basis": size})})
    return separate_passes.ridge_capture(loaded, writers, TOKENS, RESPONSES, config, events.ignore)


def residuals_of(loaded, rows, winsor=None):
    chunks = batches(rows, 64, 0, torch.device("cpu"), padding=loaded.anatomy.padding)
    return in_order(residual_pass(loaded.anatomy, chunks, winsor))


def in_order(run):
    parts = list(run())
    order = torch.cat([batch.rows for batch, _ in parts]).argsort()
    return torch.cat([x for _, x in parts])[order]


@pytest.mark.parametrize("name", FAMILIES)
def test_one_sweep_gives_what_a_pass_for_each_thing_gives(name):
    loaded = families.loaded(families.model(name))
    writers = loaded.anatomy.select(loaded.anatomy.components)
    capture = RidgeCapture(writers, 4096)
    seen = observe(loaded, capture, TOKENS, RESPONSES)
    alike(capture.tensors(seen), separately(loaded, writers, 4096), writers)
    for side in sweep.SIDES:
        assert close(in_order(seen.residuals[side]), residuals_of(loaded, TOKENS[side]))
    capture = AraCapture(writers)
    found = capture.tensors(observe(loaded, capture, TOKENS), builders.directions())
    for side in sweep.SIDES:
        rows = separate_passes.last_rows(loaded, writers, TOKENS[side], "", events.ignore)
        for writer, one in zip(writers, rows, strict=True):
            assert close(found[f"{writer.name}/{side}"], one.inputs)


@pytest.mark.parametrize(
    ("section", "share"),
    [
        ({"device_map": "disk"}, 2e-4),
        ({"quantize": "bnb-4bit"}, 2e-4),
        # Inputs are rounded to 8 bits, which a batch of other tokens may do otherwise.
        ({"quantize": "bnb-8bit"}, 0.05),
    ],
)
def test_weights_that_are_offloaded_or_packed_are_swept_alike(section, share, tmp_path):
    builders.model("qwen3", intermediate_size=128).save_pretrained(tmp_path)
    builders.tokenizer().save_pretrained(tmp_path)
    plain = ModelSection(source=str(tmp_path), dtype="float32")
    if section.get("device_map") == "disk":
        names = {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(builders.LAYERS)}
        rest = dict.fromkeys(
            ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
        )
        section = {"device_map": names | rest}
    loaded = load(plain.model_copy(update=section))
    writers = loaded.anatomy.select(builders.COMPONENTS)
    capture = RidgeCapture(writers, 100)
    found = capture.tensors(observe(loaded, capture, TOKENS, RESPONSES))
    alike(found, separately(loaded, writers, 100), writers, max(share, 1e-3))


@pytest.mark.parametrize("sums", [ridge.MOMENT_BYTES, 0])
@pytest.mark.parametrize("family", ["llama", "gemma4"])
def test_moments_in_a_basis_are_those_of_a_second_sweep_whichever_way_they_are_had(
    family, sums, monkeypatch
):
    loaded, size = builders.loaded(family), 70
    writers = loaded.anatomy.select(builders.COMPONENTS)
    wide = [writer for writer in writers if writer.shape[1] > size]
    assert 0 < len(wide) < len(writers)
    monkeypatch.setattr(ridge, "MOMENT_BYTES", sums)
    capture, passes = RidgeCapture(writers, size), []
    handle = loaded.anatomy.layers[0].register_forward_hook(lambda *_: passes.append(1))
    found = capture.tensors(observe(loaded, capture, TOKENS, RESPONSES))
    handle.remove()
    assert len(passes) == (2 if sums else 3)
    expected = separately(loaded, writers, size)
    alike(found, expected, writers, 1e-3)
    for writer in writers:
        assert (f"{writer.name}/basis" in found) == (writer in wide)


def test_residuals_are_kept_or_captured_anew_by_their_size(monkeypatch):
    loaded, passes = builders.loaded("qwen3"), []
    loaded.anatomy.layers[0].register_forward_hook(lambda *_: passes.append(1))
    size = 4 * 26 * (builders.LAYERS + 1) * builders.WIDTH
    found = []
    for bound, first, later in ((size, 2, 0), (size - 1, 0, 2)):
        monkeypatch.setattr(sweep, "RESIDUAL_BYTES", bound)
        seen = observe(loaded, ResidualsAlone(), TOKENS, winsor=0.9)
        assert len(passes) == first
        for _ in range(2):
            passes.clear()
            found.append([in_order(seen.residuals[side]) for side in sweep.SIDES])
            assert len(passes) == later
        passes.clear()
    for some in found[1:]:
        for x, expected in zip(some, found[0], strict=True):
            assert torch.equal(x, expected)
    assert close(found[0][0], residuals_of(loaded, TOKENS["target"], 0.9))


def test_where_memory_is_short_a_batch_is_halved_and_nothing_is_counted_twice():
    loaded = builders.loaded("qwen3")
    writers = loaded.anatomy.select(builders.COMPONENTS)
    expected = separately(loaded, writers, 4096)
    whole = observe(loaded, ResidualsAlone(), TOKENS).residuals
    seen = []

    def short(_module, args):
        seen.append(args[0].shape[0])
        if args[0].shape[0] > 3:
            raise torch.OutOfMemoryError("out of memory")

    # Writers below have taken the whole batch by then, and one of this layer has not.
    handle = loaded.anatomy.layers[2].mlp.register_forward_pre_hook(short)
    capture = RidgeCapture(writers, 4096)
    now = observe(loaded, capture, TOKENS, RESPONSES)
    handle.remove()
    assert max(seen) > 3
    alike(capture.tensors(now), expected, writers)
    for side in sweep.SIDES:
        assert close(in_order(now.residuals[side]), in_order(whole[side]))
    assert not any(w.module._forward_hooks for w in writers)


def test_an_observer_that_runs_out_of_memory_is_shown_smaller_batches():
    """All observers of a writer take a batch, or none of them."""
    loaded = builders.loaded("llama")
    writers = loaded.anatomy.select(builders.COMPONENTS)

    class Greedy:
        def reduce(self, number, x, _y, _at, _spans):
            if number == 5 and len(x) > 100:
                raise torch.OutOfMemoryError("out of memory")

    texts = list(map(Text.of, TOKENS["target"]))
    rows = RowObserver(writers)
    Sweep(loaded, writers, [rows, Greedy()]).over(texts, "capture", events.ignore)
    expected = separate_passes.last_rows(loaded, writers, TOKENS["target"], "", events.ignore)
    for one, other in zip(rows.rows(), expected, strict=True):
        assert close(one.inputs, other.inputs)
        assert close(one.outputs, other.outputs)


def test_one_prompt_that_does_not_fit_is_said():
    loaded = builders.loaded("qwen3")

    def never(_module, _args):
        raise torch.OutOfMemoryError("out of memory")

    loaded.anatomy.layers[2].mlp.register_forward_pre_hook(never)
    with pytest.raises(MemoryExhausted, match="one prompt"):
        observe(loaded, ResidualsAlone(), TOKENS)


@pytest.mark.parametrize("kept", [True, False])
def test_what_is_left_is_said_within_a_batch_too(monkeypatch, kept):
    """A batch of a large model takes minutes. Long texts come first, so tokens count, not batches."""
    monkeypatch.setattr(sweep, "ROWS", 5)
    monkeypatch.setattr(sweep, "_EVERY", 0.0)
    if not kept:
        monkeypatch.setattr(sweep, "RESIDUAL_BYTES", 0)
    loaded, told = builders.loaded("qwen3"), []
    seen = observe(loaded, ResidualsAlone(), TOKENS, on_event=told.append)
    for side in sweep.SIDES:
        if not kept:
            told.clear()
            in_order(seen.residuals[side])
        mine = [event for event in told if event.phase == f"capture {side}"]
        assert len(mine) == 3 * builders.LAYERS  # 13 texts in batches of 5
        done = [0, *(event.done for event in mine)]
        batches_done = done[:: builders.LAYERS]
        assert done == sorted(done)
        assert mine[-1].done == mine[-1].total >= sum(map(len, TOKENS[side]))
        first, second, third = (b - a for a, b in pairwise(batches_done))
        assert first > second > third > 0
    assert not any(layer._forward_hooks for layer in loaded.anatomy.layers)


def test_directions_alone_leave_no_tensors():
    capture = ResidualsAlone()
    seen = observe(builders.loaded("qwen3"), capture, TOKENS)
    directions: Directions = builders.directions()
    assert capture.tensors(seen, directions) == {}
