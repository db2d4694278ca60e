"""Everything that runs on a GPU, on two devices that are none: nothing is left behind on the CPU."""

from __future__ import annotations

import builders
import families
import pytest
import standin
import torch
from accelerate import dispatch_model

from excise.config import load_config
from excise.engine.engine import Engine, Plan
from excise.engine.requests import Divergence, Responses
from excise.model import devices
from excise.runs.finished_run import evaluate, survey
from excise.runs.pipeline import run

standin.load()

REQUESTS = [Responses("target"), Divergence()]
# One family of each structure: dense with biases, sliding windows with post-norms, keys and values that
# layers share beside per-layer embeddings, experts in one tensor either way around, latent attention,
# linear attention, convolutions, Mamba beside attention, layers in parallel, a multimodal model.
KINDS = [
    *("llama", "gemma3_text", "gemma4_text", "gemma4_text with experts", "gpt_oss", "qwen3_moe"),
    *("deepseek_v3", "qwen3_5_text", "lfm2", "falcon_h1", "gpt_neox", "gemma3"),
]


@pytest.fixture
def gpu():
    """The first of two devices, as long as a test runs."""
    with standin.devices():
        yield torch.device(standin.NAME, 0)


def test_tensors_of_two_devices_never_meet(gpu):
    here = torch.ones(3, device=gpu)
    for there in (torch.ones(3), torch.ones(3, device="standin:1")):
        for mix in (torch.add, torch.dot, lambda a, b: torch.cat([a, b]), torch.Tensor.copy_):
            if mix is torch.Tensor.copy_:
                assert mix(here, there).tolist() == [1, 1, 1]  # what brings a tensor over may
                continue
            with pytest.raises(RuntimeError, match="on the same device"):
                mix(here, there)
    assert (here + torch.tensor(2.0)).tolist() == [3, 3, 3]  # so may a number


def test_what_is_computed_is_what_the_cpu_computes(gpu):
    a, index = torch.randn(5, 6, 7), torch.tensor([4, 0, 2])
    for compute in (
        lambda x, i: x[i, 1:].transpose(1, 2).reshape(3, -1).cumsum(1),
        lambda x, i: torch.linalg.svdvals(x @ x.mT),
        lambda x, i: x.index_add(0, i, x[:3]).unfold(1, 2, 1).sum(-1),
        lambda x, i: torch.where(x > 0, x, x.new_tensor(0.5)).masked_fill(x > 1, 2).exp().add_(1),
        lambda x, i: torch.topk(x, 3).values * x.view(5, 42)[:, :1, None],
    ):
        expected = compute(a, index)
        torch.testing.assert_close(compute(a.to(gpu), index.to(gpu)).cpu(), expected)


def test_launches_waits_and_uploads_are_told_apart(gpu):
    a = torch.ones(4).to(gpu)
    b = a.view(2, 2)[1:].t()  # views are no work
    b.mul_(2)
    assert float((a + a).sum()) == 12
    assert a.nonzero().tolist() == [[0], [1], [2], [3]]
    found = standin.counted()
    assert found.uploads == {"copy from the CPU": 1}
    assert found.launches == {
        n: 1 for n in ("aten::mul", "aten::add", "aten::sum", "aten::nonzero")
    }
    assert found.waits == {"a number": 1, "aten::nonzero": 1, "copy to the CPU": 1}
    with standin.no_waits(), pytest.raises(RuntimeError, match="a number waits"):
        a.sum().item()


def test_memory_has_a_peak_and_an_end(gpu):
    with standin.devices(limit=2**20):
        free = devices.free_bytes(gpu)
        a = torch.zeros(2**16, device=gpu)
        assert free - devices.free_bytes(gpu) == 2**18
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            a.expand(4, -1).clone()
        b = a.clone()
        del a, b
        assert devices.free_bytes(gpu) == free
        assert torch.accelerator.max_memory_allocated(gpu) >= 2**19


def test_the_accelerator_is_what_models_run_on(gpu):
    assert devices.accelerator() == gpu
    assert devices.has_bfloat16(gpu)
    devices.finish(gpu)
    devices.release(gpu)


def test_without_one_they_run_on_the_cpu():
    standin.load()
    assert devices.accelerator() is None
    assert devices.free_bytes(torch.device("cpu")) > 2**20
    devices.finish(torch.device("cpu"))
    devices.release(torch.device("cpu"))


def evidence(loaded, plan):
    """Responses and divergences of two candidates, in passes with and without drafts."""
    method = families.method(loaded.anatomy)
    prompts = {
        "target": builders.token_ids(4, 1, 3, 12),
        "contrast": builders.token_ids(3, 2, 3, 12),
    }
    engine = Engine(loaded, method.writers, prompts, max_new_tokens=4, plan=plan)
    edits = [method.edits(c) for c in families.candidates(loaded.anatomy, 2)]
    with engine.keeping_drafts():
        found = engine.measure(edits, REQUESTS)
    again = engine.measure(edits, REQUESTS[:1])
    assert [one.responses for one in again] == [one.responses for one in found]
    said = [[r.tokens for r in one.responses["target"]] for one in found]
    return said, [torch.cat([row.cpu() for row in one.divergence["contrast"]]) for one in found]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_architecture_is_measured_as_on_the_cpu(kind, gpu):
    plan = Plan(rows=5, stack=2)
    said, drift = evidence(families.loaded(families.model(kind)), plan)
    again, other = evidence(families.loaded(families.model(kind).to(gpu)), plan)
    assert again == said
    for mine, theirs in zip(drift, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints of two families, in float32."""
    folder = tmp_path_factory.mktemp("models")
    made = {f: folder / f for f in ("qwen3", "gemma4")}
    for family, place in made.items():
        builders.checkpoint(place, family, dtype=torch.float32)
    return made


def config_of(model, folder, method, **more):
    for name in ("target", "contrast"):
        rows = [f"{name} colour of lantern {n}" for n in range(12)]
        (folder / f"{name}.txt").write_text("\n".join(rows))
    sides = {
        f"prompts.{side}{part}": {"source": str(folder / f"{side}.txt")}
        for side in ("target", "contrast")
        for part in ("", "_eval")
    }
    sizes = {"prompts.eval_size": 6, "prompts.direction_size": 8, "scores.max_new_tokens": 4}
    search = {"search.trials": 4, "search.startup_trials": 2, "search.batch": 2}
    flags = {"model.source": str(model), "model.dtype": "float32", "method": method}
    marked = {"scores.markers": ["e", "a"], "prompts.keep": []}
    return load_config(flags=sides | sizes | search | flags | marked | more)


def scores(record):
    return [{n: s.value for n, s in trial.scores.items()} for trial in record.trials]


@pytest.mark.parametrize(
    ("family", "method"),
    [("gemma4", "ridge"), ("qwen3", "directional"), ("qwen3", "ara"), ("gemma4", "subspace")],
)
def test_a_run_of_each_method_is_the_cpus(family, method, checkpoints, tmp_path):
    config = config_of(checkpoints[family], tmp_path, method)
    here = run(config, tmp_path / "cpu", anyway=True)
    with standin.devices():
        there = run(config, tmp_path / "gpu", anyway=True)
        assert sum(standin.counted().launches.values()) > 1000
        layers = survey(tmp_path / "gpu") if method == "directional" else []
        rows = evaluate(config, str(tmp_path / "gpu" / "model")) if layers else []
    assert [t.params for t in there.trials] == [t.params for t in here.trials]
    for mine, theirs in zip(scores(here), scores(there), strict=True):
        assert theirs == pytest.approx(mine, rel=1e-3, abs=1e-6)
    if method == "directional":
        assert len(layers) == builders.LAYERS
        ((part, _, edited),) = rows
        chosen = scores(there)[there.selected]
        assert part == "search"
        assert edited["drift"].value == pytest.approx(chosen["drift"], rel=1e-3)


@pytest.mark.parametrize("kind", ["qwen3", "gemma4_text"])
def test_measuring_goes_on_where_memory_ends(kind):
    """At a third of what the passes would take: smaller ones, and the same figures."""
    with standin.devices():
        loaded = families.loaded(families.model(kind).to(standin.NAME))
        begun = torch.accelerator.memory_allocated()
        said, drift = evidence(loaded, Plan(rows=64, stack=2))
        peak = torch.accelerator.max_memory_allocated()
        assert torch.accelerator.memory_stats()["num_ooms"] == 0
    with standin.devices(limit=begun + (peak - begun) // 3):
        again, other = evidence(loaded, Plan(rows=64, stack=2))
        assert torch.accelerator.memory_stats()["num_ooms"] > 0
    assert again == said
    for mine, theirs in zip(drift, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["qwen3", "gemma4_text"])
def test_layers_on_two_devices_are_measured_as_on_one(kind, gpu):
    whole = families.model(kind).to(gpu)
    halves = families.model(kind)
    layers = {f"model.layers.{n}": f"standin:{n // 2}" for n in range(families.LAYERS)}
    others = [name for name, _ in halves.model.named_children() if name != "layers"]
    spread = layers | {f"model.{name}": "standin:0" for name in others}
    dispatch_model(halves, spread | {"model.norm": "standin:1", "lm_head": "standin:0"})
    assert halves.model.layers[-1].mlp.down_proj.weight.device.index == 1
    found = [evidence(families.loaded(model), Plan(rows=5, stack=2)) for model in (whole, halves)]
    assert found[1][0] == found[0][0]
    for mine, theirs in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


def waits(engine, edits, requests):
    """How often Python waits for the device while these are measured."""
    standin.reset()
    engine.measure(edits, requests)
    return sum(standin.counted().waits.values())


def test_python_waits_once_a_decode_step_and_never_for_a_candidate(gpu):
    loaded = families.loaded(families.model("qwen3").to(gpu))
    method = families.method(loaded.anatomy)
    edits = [method.edits(c) for c in families.candidates(loaded.anatomy, 6)]
    prompts = {
        side: builders.token_ids(4, seed, 9, 9) for seed, side in enumerate(("target", "contrast"))
    }
    found = {}
    for steps in (3, 11):
        engine = Engine(
            loaded, method.writers, prompts, max_new_tokens=steps, plan=Plan(rows=64, stack=6)
        )
        engine.original("target"), engine.original("contrast")
        for count in (2, 6):
            found[steps, count] = waits(engine, edits[:count], REQUESTS[:1])
        assert waits(engine, edits[:2], REQUESTS[1:]) == waits(engine, edits, REQUESTS[1:]) == 1
    assert found[3, 2] == found[3, 6]
    assert found[11, 2] == found[11, 6]
    assert found[11, 6] - found[3, 6] <= 8
