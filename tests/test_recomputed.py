"""A whole run's figures, made again from its record by Transformers and the formulas alone.

Nothing of the package is used but the command line: prompts are templated one at a time, without
padding, responses are `generate`'s, and edits are written into weights as the documents define them.
"""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import job
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from excise.cli import main as cli

SIZE, NEW_TOKENS, LAYERS = 10, 4, 6  # SIZE rows of each file for each part, in their order
PREFIX, WINSOR = "now ", 0.9
# What the random model says most; one of the two is found only where it goes on from the prefix.
MARKERS = [f"{PREFIX}oro", "yyy"]
WRITERS = {"attn.o_proj": "self_attn.o_proj", "mlp.down_proj": "mlp.down_proj"}
Z = 1.959963984540054


class Run:
    """A finished run, and what is needed to make its figures again."""

    def __init__(self, place: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(place / "model")
        self.rows: dict[str, list[dict]] = {}
        for side in ("target", "contrast"):
            lines = (place / f"{side}.jsonl").read_text().splitlines()
            self.rows[side] = [json.loads(line) for line in lines]

    def label(self, place: Path) -> None:
        """Groups, and answers that the original gives to most prompts: its last word."""
        for side, rows in self.rows.items():
            for number, row in enumerate(rows):
                said = re.findall("[a-z]+", self.words(self.response(self.model, row["text"])))
                row["answer"] = said[-1] if number % 4 and said[-1] != PREFIX.strip() else "zz"
                row["group"] = "ab"[number % 3 == 0] if number < 2 * SIZE else "bc"[number % 3 == 1]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (place / f"{side}.jsonl").write_text(text)

    def finished(self, folder: Path) -> Run:
        self.folder = folder
        self.record = json.loads((folder / "record.json").read_text())
        self.unit = load_file(folder / "directions.safetensors")["unit"].double()
        return self

    def labelled(self, side: str, number: int) -> list[dict]:
        return self.rows[side][number * SIZE : (number + 1) * SIZE]

    def part(self, side: str, number: int) -> list[str]:
        return [row["text"] for row in self.labelled(side, number)]

    def trial(self, number: int) -> dict:
        (found,) = (t for t in self.record["trials"] if t["number"] == number)
        return found

    def ids(self, text: str) -> list[int]:
        turn = [{"role": "user", "content": text}]
        shown = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(shown + PREFIX, add_special_tokens=False)["input_ids"]

    def response(self, model, text: str) -> list[int]:
        ids = torch.tensor([self.ids(text)])
        said = model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS)
        return said[0, ids.shape[1] :].tolist()

    def words(self, said: list[int]) -> str:
        return PREFIX + self.tokenizer.decode(said, skip_special_tokens=True)

    def rate(self, model, texts: list[str]) -> float:
        said = [self.words(self.response(model, text)).lower() for text in texts]
        return sum(any(marker in text for marker in MARKERS) for text in said) / len(said)

    def rates(self, model, rows: list[dict]) -> dict[str, float]:
        """The same by group."""
        groups = {row["group"] for row in rows}
        return {
            group: self.rate(model, [row["text"] for row in rows if row["group"] == group])
            for group in groups
        }

    def true(self, model, rows: list[dict]) -> float:
        """Share of prompts that are answered with their answer, as a word of its own."""
        said = [self.words(self.response(model, row["text"])).lower() for row in rows]
        words = [re.findall("[a-z0-9_]+", text) for text in said]
        return sum(row["answer"] in w for row, w in zip(rows, words, strict=True)) / len(rows)

    def divergences(self, edited, texts: list[str]) -> list[torch.Tensor]:
        """KL(original || edited) before every token of the original's response, per prompt."""
        found = []
        for text in texts:
            ids, said = self.ids(text), self.response(self.model, text)
            whole = torch.tensor([ids + said])
            with torch.inference_mode():
                p, q = (
                    m(whole).logits[0, len(ids) - 1 : -1].double().log_softmax(-1)
                    for m in (self.model, edited)
                )
            found.append((p.exp() * (p - q)).sum(-1))
        return found

    def edited(self, params: dict) -> torch.nn.Module:
        """The model with a trial's edit in its weights: rows of norm 1, ablated, rows of norm 1, norms."""
        model = copy.deepcopy(self.model)
        for name, path in WRITERS.items():
            for layer in range(LAYERS):
                weight = model.model.layers[layer].get_submodule(path).weight
                v, strength = self.direction(params, layer), strength_of(params, name, layer)
                rows = weight.double()
                norms = rows.norm(dim=1, keepdim=True)
                left = rows / norms - strength * torch.outer(v, v @ (rows / norms))
                with torch.no_grad():
                    weight.copy_(norms * left / left.norm(dim=1, keepdim=True))
        return model

    def direction(self, params: dict, layer: int) -> torch.Tensor:
        index = params["direction_index"] if params["direction_scope"] == "global" else layer
        low = math.floor(index)
        high, share = min(low + 1, LAYERS - 1), index - low
        v = (1 - share) * self.unit[low] + share * self.unit[high]
        return v / v.norm()


def strength_of(params: dict, name: str, layer: int) -> float:
    peak = max(0.0, params[f"{name}.max_weight"])
    distance = abs(layer - params[f"{name}.max_weight_position"])
    reach = params[f"{name}.min_weight_distance"]
    if distance > reach:
        return 0.0
    return peak + distance / reach * (params[f"{name}.min_weight"] * peak - peak)


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    place = tmp_path_factory.mktemp("recomputed")
    shutil.copytree(tiny, place, dirs_exist_ok=True)
    made, out = Run(place), place / "run"
    made.label(place)
    (place / "markers.txt").write_text("\n".join(MARKERS))
    more = ["--method", "directional", "--set", f"prompts.response_prefix={PREFIX!r}"]
    more += ["--set", f"directions.winsor={WINSOR}", "--set", 'scores.final=["restored", "kept"]']
    for side in ("target", "contrast"):
        for column in ("answer", "group"):
            more += ["--set", f"prompts.{side}.{column}_column={column}"]
    assert cli.main(job(place, out, *more)) == 0
    return made.finished(out)


def test_directions_are_of_the_residual_after_each_layer(run: Run):
    """At the last token, before the final norm, winsorised per prompt and layer."""
    means, along = {}, {}
    for side in ("target", "contrast"):
        rows = []
        for text in run.part(side, 0):
            seen: list[torch.Tensor] = []

            def keep(_module, _args, out, seen=seen):
                seen.append((out[0] if isinstance(out, tuple) else out)[0, -1].detach())

            hooks = [layer.register_forward_hook(keep) for layer in run.model.model.layers]
            run.model(torch.tensor([run.ids(text)]))
            for hook in hooks:
                hook.remove()
            x = torch.stack(seen).double()
            limit = x.abs().sort(-1).values[:, round(WINSOR * (x.shape[1] - 1)), None]
            rows.append(x.clamp(-limit, limit))
        means[side], along[side] = torch.stack(rows).mean(0), torch.stack(rows)
    expected = means["target"] - means["contrast"]
    expected /= expected.norm(dim=-1, keepdim=True)
    assert torch.allclose(run.unit, expected, atol=1e-4)
    neighbours = (expected[1:] * expected[:-1]).sum(-1)
    assert float(neighbours.abs().max()) < 0.98  # so that one layer's is not another's
    for layer, auc in enumerate(run.record["separation"]["auc"]):
        a, b = (along[side][:, layer] @ expected[layer] for side in ("target", "contrast"))
        wins = (a[:, None] > b[None]).double() + 0.5 * (a[:, None] == b[None]).double()
        assert auc == pytest.approx(float(wins.mean()), abs=0.011)


def trials(run: Run) -> list[dict]:
    """The chosen trial, and one of the other scope that was measured in full."""
    chosen = run.trial(run.record["selected"])
    scope = chosen["params"]["direction_scope"]
    others = [t for t in run.record["trials"] if t["params"]["direction_scope"] != scope]
    return [chosen, next(t for t in others if t["state"] == "complete")]


def test_scores_are_those_of_the_edited_weights_on_the_search_prompts(run: Run):
    rates = set()
    for trial in trials(run):
        edited, scores = run.edited(trial["params"]), trial["scores"]
        check_drift(scores, run.divergences(edited, run.part("contrast", 1)))
        rate = run.rate(edited, run.part("target", 1))
        assert scores["behaviour_rate"]["value"] == pytest.approx(rate)
        rates.add(rate)
    baseline = run.record["baseline"]
    assert baseline["behaviour_rate"]["value"] == run.rate(run.model, run.part("target", 1))
    assert baseline["drift"]["value"] < 1e-9
    assert len(rates | {baseline["behaviour_rate"]["value"]}) > 1
    said = [run.response(run.model, text) for text in run.part("target", 1)]
    alone = [MARKERS[1] in run.tokenizer.decode(one).lower() for one in said]
    assert 1 > baseline["behaviour_rate"]["value"] > sum(alone) / len(alone) > 0


def check_drift(scores: dict, rows: list[torch.Tensor]) -> None:
    totals, sizes = [float(row.sum()) for row in rows], [len(row) for row in rows]
    value, n = sum(totals) / sum(sizes), len(rows)
    assert value > 1e-4
    assert scores["drift"]["value"] == pytest.approx(value, rel=1e-3)
    assert scores["drift"]["n"] == sum(sizes)
    apart = sum((total - value * size) ** 2 for total, size in zip(totals, sizes, strict=True))
    half = Z * math.sqrt(n / (n - 1) * apart) / sum(sizes)
    assert scores["drift"]["interval"] == pytest.approx(
        [max(0, value - half), value + half], rel=0.01
    )
    firsts = torch.stack([row[0] for row in rows])
    assert scores["drift_first"]["value"] == pytest.approx(float(firsts.mean()), rel=1e-3)
    half = Z * float(firsts.std()) / math.sqrt(n)
    low, high = max(0, float(firsts.mean()) - half), float(firsts.mean()) + half
    assert scores["drift_first"]["interval"] == pytest.approx([low, high], rel=0.01, abs=1e-9)


def test_the_holdout_is_the_rows_that_the_search_never_saw(run: Run):
    edited = run.edited(run.trial(run.record["selected"])["params"])
    check_drift(run.record["holdout"], run.divergences(edited, run.part("contrast", 2)))
    for key, model in (("holdout_baseline", run.model), ("holdout", edited)):
        rate = run.rate(model, run.part("target", 2))
        assert run.record[key]["behaviour_rate"]["value"] == pytest.approx(rate)
    assert run.record["holdout_baseline"]["drift"]["value"] < 1e-9


def test_groups_and_final_scores_are_of_their_own_prompts(run: Run):
    edited = run.edited(run.trial(run.record["selected"])["params"])
    for key, part, model in (
        ("baseline", 1, run.model),
        ("holdout_baseline", 2, run.model),
        ("holdout", 2, edited),
    ):
        parts = run.record[key]["behaviour_rate"]["parts"]
        expected = run.rates(model, run.labelled("target", part))
        assert {group: one["value"] for group, one in parts.items()} == pytest.approx(expected)
    different = 0
    for key, part, model in (
        ("final_baseline", 1, run.model),
        ("final", 1, edited),
        ("holdout_baseline", 2, run.model),
        ("holdout", 2, edited),
    ):
        for name, side in (("restored", "target"), ("kept", "contrast")):
            expected = run.true(model, run.labelled(side, part))
            assert run.record[key][name]["value"] == pytest.approx(expected)
            different += model is edited and expected < 0.5
    assert different


def test_samples_are_what_the_original_said_and_what_the_edited_model_says(run: Run):
    edited = run.edited(run.trial(run.record["selected"])["params"])
    samples = run.record["samples"]
    assert {sample["side"] for sample in samples} == {"target", "contrast"}
    different = 0
    for sample in samples:
        assert sample["prompt"] in run.part(sample["side"], 1)
        before, after = (
            run.words(run.response(model, sample["prompt"])) for model in (run.model, edited)
        )
        assert sample["before"].strip() == before.strip()
        assert sample["after"].strip() == after.strip()
        different += before != after
    assert different


def test_an_edited_model_is_evaluated_against_its_base(run: Run, capsys):
    place = run.folder.parent
    command = ["evaluate", str(place / "model"), str(run.folder / "model"), "--json", "--quiet"]
    for side in ("target", "contrast"):
        command += [f"--{side}", str(place / f"{side}.jsonl")]
    command += ["--markers", str(place / "markers.txt"), "--direction-size", str(SIZE)]
    command += ["--eval-size", str(SIZE), "--max-new-tokens", str(NEW_TOKENS)]
    command += ["--set", f"prompts.response_prefix={PREFIX!r}"]
    capsys.readouterr()
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    written = AutoModelForCausalLM.from_pretrained(run.folder / "model", dtype=torch.float32)
    for where, part in (("search", 1), ("holdout", 2)):
        for name, model in (("original", run.model), ("edited", written)):
            rate = run.rate(model, run.part("target", part))
            assert found[where][name]["behaviour_rate"]["value"] == pytest.approx(rate)
        assert found[where]["original"]["drift"]["value"] < 1e-9
        check_drift(found[where]["edited"], run.divergences(written, run.part("contrast", part)))


def test_the_front_is_what_no_other_trial_beats_and_the_knee_is_chosen(run: Run):
    done = {
        t["number"]: tuple(t["scores"][name]["value"] for name in ("behaviour_rate", "drift"))
        for t in run.record["trials"]
        if t["state"] == "complete"
    }
    kept = {
        number
        for number, a in done.items()
        if not any(all(x <= y for x, y in zip(b, a, strict=True)) and a != b for b in done.values())
    }
    assert {done[n] for n in run.record["front"]} == {done[n] for n in kept}
    costs = {number: done[number][0] + done[number][1] / 0.5 for number in run.record["front"]}
    assert costs[run.record["selected"]] == min(costs.values())


def test_the_exported_weights_are_the_edited_ones_rounded_once(run: Run):
    edited = run.edited(run.trial(run.record["selected"])["params"])
    written = AutoModelForCausalLM.from_pretrained(run.folder / "model", dtype=torch.bfloat16)
    changed = 0
    for (name, ours), (_, theirs), (_, before) in zip(
        edited.named_parameters(),
        written.named_parameters(),
        run.model.named_parameters(),
        strict=True,
    ):
        # A value on the edge between two may go either way.
        apart = (ours.bfloat16() != theirs).float().mean()
        assert float(apart) < 1e-3, name
        assert torch.allclose(ours, theirs.float(), rtol=2**-7, atol=1e-6)
        changed += not torch.equal(before.bfloat16(), theirs)
    assert changed
    (artifact,) = run.record["artifacts"]
    check_drift(artifact["measured"], run.divergences(written.float(), run.part("contrast", 1)))


def test_an_export_is_judged_with_what_its_responses_begin_with(run: Run, tmp_path: Path):
    full = [trial for trial in run.record["trials"] if trial["state"] == "complete"]
    weakest = max(full, key=lambda trial: trial["scores"]["behaviour_rate"]["value"])
    shutil.copytree(run.folder, tmp_path / "run")
    command = ["export", str(tmp_path / "run"), "--to", str(tmp_path / "weak"), "--quiet"]
    assert cli.main([*command, "--trial", str(weakest["number"])]) == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    measured = record["artifacts"][-1]["measured"]["behaviour_rate"]["value"]
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "weak", dtype=torch.float32)
    assert measured == pytest.approx(run.rate(written, run.part("target", 1)))
    said = [run.response(written, text) for text in run.part("target", 1)]
    alone = [MARKERS[1] in run.tokenizer.decode(one).lower() for one in said]
    assert measured > sum(alone) / len(alone)
