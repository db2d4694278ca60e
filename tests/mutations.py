"""Faults put into a copy of the source one at a time, each with the tests that must notice it.

`make mutants` applies each and runs its tests; `pytest tests/test_mutations.py` only checks that every
one still applies. A fault that nothing notices is a seam that no test holds: write that test.

    python tests/mutations.py [--only TEXT]
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import Phase, settings

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "excise"
SECONDS = 900  # for the tests of one mutant
# Imported once for all mutants: they take longer than most of the tests.
LIBRARIES = (
    "torch",
    "transformers",
    "transformers.models.gemma4.modeling_gemma4",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
    "optuna",
    "peft",
    "pydantic",
    "plotly",
)
FAILED = 1  # what pytest returns where tests failed, and for nothing else

RUN = "tests/test_recomputed.py"


@dataclass(frozen=True)
class Mutant:
    """One fault: `old`, which stands once in the module, becomes `new`; one of `tests` fails."""

    fault: str
    module: str
    old: str
    new: str
    tests: str  # as pytest takes them

    def applied(self) -> str:
        """The module's text with the fault in it.

        Raises:
            ValueError: what it replaces does not stand there once.
        """
        text = (SOURCE / f"{self.module}.py").read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.fault}: {self.module}.py holds what it replaces {text.count(self.old)} times"
            )
        return text.replace(self.old, self.new)


MUTANTS = (
    # -- prompts and directions
    Mutant(
        "directions are taken one layer lower",
        "runs/setup",
        "centre(run)[1:] for side",
        "centre(run)[:-1] for side",
        f"{RUN} -k directions",
    ),
    Mutant(
        "directions point from target to contrast",
        "runs/setup",
        'from_means(means["target"], means["contrast"]',
        'from_means(means["contrast"], means["target"]',
        "tests/runs/test_setup.py",
    ),
    Mutant(
        "directions are not winsorised",
        "runs/session",
        "winsor = self.config.directions.winsor",
        "winsor = None",
        f"{RUN} -k directions",
    ),
    Mutant(
        "separation is of contrast over target",
        "runs/setup",
        'auc(along["target"][:, i], along["contrast"][:, i])',
        'auc(along["contrast"][:, i], along["target"][:, i])',
        "tests/runs/test_setup.py",
    ),
    Mutant(
        "residuals keep the order of their batches",
        "runs/setup",
        "return torch.cat([x for _, x in parts])[order]",
        "return torch.cat([x for _, x in parts])",
        "tests/runs/test_setup.py",
    ),
    Mutant(
        "residuals begin with the embedding",
        "runs/setup",
        "(batch.rows, x[:, 1:].float().cpu())",
        "(batch.rows, x[:, :-1].float().cpu())",
        "tests/runs/test_setup.py",
    ),
    Mutant(
        "a median is a mean",
        "runs/setup",
        'centre = geometric_median if section.center == "geometric_median" else mean',
        "centre = mean",
        "tests/runs/test_setup.py",
    ),
    Mutant(
        "the first token's residual is captured",
        "capture/residuals",
        "places = torch.full((len(x),), -1)",
        "places = torch.full((len(x),), 0)",
        "tests/capture/test_residuals.py -k hidden_states",
    ),
    Mutant(
        "projections are one layer lower",
        "capture/residuals",
        '"bld,ld->bl", x[:, 1:].cpu()',
        '"bld,ld->bl", x[:, :-1].cpu()',
        "tests/capture/test_residuals.py -k projections",
    ),
    Mutant(
        "projected directions leave the wrong layer's contrast mean",
        "capture/directions",
        "m = self.contrast[layer]",
        "m = self.contrast[0]",
        "tests/methods/test_directional_math.py -k projected",
    ),
    Mutant(
        "edits leave the wrong layer's contrast mean",
        "methods/directional_math",
        "own = contrast[stats.layers]  # (G, D)",
        "own = contrast[stats.layers - 1]  # (G, D)",
        "tests/model/test_edits.py",
    ),
    Mutant(
        "a float index leans to the wrong layer",
        "capture/directions",
        "return [(low, 1.0 - fraction), (high, fraction)]",
        "return [(low, fraction), (high, 1.0 - fraction)]",
        "tests/methods/test_directional_math.py -k index",
    ),
    Mutant(
        "one direction for all layers where each has its own",
        "methods/directional_math",
        "out = rows[which, stats.layers]",
        "out = rows[which, 0]",
        "tests/model/test_edits.py",
    ),
    Mutant(
        "strengthening weakens",
        "methods/directional",
        "self.sign = -1.0 if strengthen else 1.0",
        "self.sign = 1.0",
        "tests/runs/test_setup.py",
    ),
    Mutant(
        "an opening stands before the prompt",
        "prompts/measured_sets",
        "[[*row, *opening.ids] for row in one.ids]",
        "[[*opening.ids, *row] for row in one.ids]",
        f"{RUN} -k directions",
    ),
    # -- what a candidate is measured on
    Mutant(
        "the holdout is measured on the search prompts",
        "prompts/measured_sets",
        'self.sets[f"{side}_{_SUFFIX[part]}"] for side',
        'self.sets[f"{side}_eval"] for side',
        f"{RUN} -k holdout",
    ),
    Mutant(
        "rows of the search are left in the holdout",
        "prompts/sets",
        "seen, spare, held = direction + rest[:m],",
        "seen, spare, held = direction,",
        "tests/prompts/test_sets.py -k search_sees",
    ),
    Mutant(
        "the search is measured on the holdout",
        "runs/pipeline",
        'engine = session.engine("search", sizing.plan)',
        'engine = session.engine("holdout", sizing.plan)',
        f"{RUN} -k scores",
    ),
    Mutant(
        "what responses begin with is not judged",
        "runs/session",
        "spoken=self.sets.opening.spoken,",
        "spoken=(),",
        f"{RUN} -k samples",
    ),
    Mutant(
        "an export is judged without what responses begin with",
        "export/exporter",
        "spoken=searched.spoken,",
        "spoken=(),",
        f"{RUN} -k judged",
    ),
    Mutant(
        "an export is measured against itself",
        "export/exporter",
        "reference=reference,",
        "reference=None,",
        f"{RUN} -k exported",
    ),
    Mutant(
        "answers and groups are the holdout's",
        "runs/pipeline",
        'panel(engine, "search", session.scoring.every_trial)',
        'panel(engine, "holdout", session.scoring.every_trial)',
        f"{RUN} -k groups",
    ),
    Mutant(
        "a holdout's answers and groups are the search's",
        "runs/results",
        'session.panel(held, "holdout", ',
        'session.panel(held, "search", ',
        f"{RUN} -k groups",
    ),
    Mutant(
        "target and contrast prompts are mistaken for each other by scorers",
        "search/scoring",
        "{side: one.prompts for side, one in part.items()}",
        "dict(zip(part, [one.prompts for one in reversed(part.values())], strict=True))",
        f"{RUN} -k groups",
    ),
    Mutant(
        "samples before and after are swapped",
        "runs/results",
        "before, after = engine.measure([ORIGINAL, edits], request, {side: count})",
        "after, before = engine.measure([ORIGINAL, edits], request, {side: count})",
        f"{RUN} -k samples",
    ),
    Mutant(
        "original and edit are swapped on the holdout",
        "runs/results",
        '{"holdout_baseline": before.scores, "holdout": after.scores}',
        '{"holdout_baseline": after.scores, "holdout": before.scores}',
        f"{RUN} -k holdout",
    ),
    Mutant(
        "original and edit are swapped in the final scores",
        "runs/results",
        '{"final_baseline": before.scores, "final": after.scores}',
        '{"final_baseline": after.scores, "final": before.scores}',
        f"{RUN} -k groups_and_final",
    ),
    Mutant(
        "the holdout measures another trial than the chosen one",
        "runs/pipeline",
        "session.edits(chosen.params)",
        "session.edits(search.records()[0].params)",
        f"{RUN} -k holdout",
    ),
    # -- what trials belong to
    Mutant(
        "a study's identity lacks how edits are made",
        "runs/study_identity",
        '        "edit": config.edit.model_dump(mode="json"),\n',
        "",
        "tests/runs/test_study_identity.py -k each_of_these",
    ),
    Mutant(
        "a study's identity lacks how directions are computed",
        "runs/study_identity",
        '        "directions": config.directions.model_dump(mode="json"),\n',
        "",
        "tests/runs/test_study_identity.py -k each_of_these",
    ),
    Mutant(
        "captured tensors are taken as they are found",
        "runs/run_folder",
        "if known and known.get(name) != now.get(name):",
        "if False:",
        "tests/runs/test_run_folder.py -k captured_tensors",
    ),
    Mutant(
        "a journal's lines are not held against their sums",
        "search/journal",
        "if (signed and match is None) or (match is not None and match[2] != total.encode()):",
        "if False:",
        "tests/search/test_stored_study.py -k changed_journal",
    ),
    # -- figures
    Mutant(
        "divergence is taken the wrong way round",
        "engine/kl",
        "return p.to(q.device), q.view(s, -1, q.shape[-1])",
        "return q.view(s, -1, q.shape[-1]), p.to(q.device).repeat(s, 1, 1)",
        f"{RUN} -k scores",
    ),
    Mutant(
        "divergence is read one token late",
        "engine/engine",
        "*t[:-1]) for n, t in zip(chunk, texts, strict=True)]",
        "*t) for n, t in zip(chunk, texts, strict=True)]",
        f"{RUN} -k scores",
    ),
    Mutant(
        "a response shorter than others is read where theirs begin",
        "engine/engine",
        "[row[keep - len(t) :] for row, t",
        "[row[: len(t)] for row, t",
        "tests/engine/test_engine.py -k unlike_length",
    ),
    Mutant(
        "responses of candidates are mistaken for each other's",
        "engine/engine",
        "return [rows[start : start + size] for start in range(0, len(rows), size)]",
        "return [rows[start::members] for start in range(members)]",
        "tests/engine/test_engine.py -k neighbours",
    ),
    Mutant(
        "figures come in the order in which candidates were stacked",
        "engine/engine",
        "found.update(zip(numbers, evidence, strict=True))",
        "found.update(zip(sorted(numbers), evidence, strict=True))",
        "tests/engine/test_engine.py -k neighbours",
    ),
    Mutant(
        "drift's interval is ten times too narrow",
        "intervals",
        "half = Z95 * (n * spread / (n - 1)) ** 0.5 / size",
        "half = Z95 * (n * spread / (n - 1)) ** 0.5 / size / 10",
        "tests/methods/test_directional_math.py -k ratio",
    ),
    Mutant(
        "a rate's interval is that of 90 %",
        "intervals",
        "Z95 = 1.959963984540054",
        "Z95 = 1.6448536269514722",
        "tests/methods/test_directional_math.py -k wilson",
    ),
    Mutant(
        "drift weighs responses and not tokens",
        "search/scorers",
        "sums, counts = [float(r.sum()) for r in rows], [len(r) for r in rows]",
        "sums, counts = [float(r.mean()) for r in rows], [1 for r in rows]",
        "tests/search/test_scorers.py -k weighs_every_token",
    ),
    Mutant(
        "drift_first is of the last token",
        "search/scorers",
        "firsts = [float(r[0]) for r in",
        "firsts = [float(r[-1]) for r in",
        "tests/search/test_scorers.py -k weighs_every_token",
    ),
    # -- judges
    Mutant(
        "a broken response is a success",
        "search/scorers",
        "counted = {SHOWS, BROKEN, UNFINISHED} if",
        "counted = {SHOWS} if",
        "tests/judges/test_verdicts.py -k no_success",
    ),
    Mutant(
        "another judge's verdicts are taken for its own",
        "judges/verdicts",
        "json.dumps([self.name, self._of, self.judge.facts, what], sort_keys=True).encode()",
        "json.dumps([self.name, self.judge.facts, what], sort_keys=True).encode()",
        "tests/judges/test_verdicts.py -k outlive",
    ),
    Mutant(
        "kappa forgets what agrees by chance",
        "judges/certificate",
        "return max(-1.0, (share - chance) / (1 - chance))",
        "return share",
        "tests/judges/test_certificate.py",
    ),
    Mutant(
        "the token crosses the network in clear",
        "judges/server",
        'if token and parts.scheme == "http" and not _is_here(host):',
        'if token and parts.scheme == "ftp" and not _is_here(host):',
        "tests/judges/test_server.py -k leak",
    ),
    # -- the search
    Mutant(
        "a screened trial is a point of the front",
        "search/loop",
        'if r.state == "complete"\n',
        'if r.state in ("complete", "screened")\n',
        "tests/search/test_stored_study.py -k screened",
    ),
    Mutant(
        "random trials repeat after a resume",
        "search/sampler",
        "np.random.SeedSequence([self._seed, number])",
        "np.random.SeedSequence([self._seed])",
        "tests/search/test_loop.py -k random",
    ),
    Mutant(
        "the sampler is told scores as they are",
        "search/loop",
        "(trial.params, trial.told or self._scored(trial))",
        "(trial.params, self._scored(trial))",
        "tests/search/test_loop.py -k stays_there",
    ),
    Mutant(
        "what is gained outside the region is not lost again",
        "search/region",
        "round(place + outside - own, _DIGITS)",
        "round(place, _DIGITS)",
        "tests/search/test_region.py",
    ),
    Mutant(
        "a batch begins for which the time is too short",
        "search/loop",
        "self.spent + took <= seconds",
        "self.spent <= seconds",
        "tests/search/test_loop.py -k time",
    ),
    Mutant(
        "a long search tells its sampler the last trials only",
        "search/sampler",
        "return sorted([*best, *last])",
        "return list(range(count))[-MOST:]",
        "tests/search/test_sampler.py -k front",
    ),
    Mutant(
        "a candidate that is worse somewhere beats another",
        "search/pareto",
        "return min(differences) >= 0 and max(differences) > 0",
        "return max(differences) > 0",
        "tests/methods/test_directional_math.py -k front",
    ),
    Mutant(
        "the front does not know which way is better",
        "search/pareto",
        "[o.sign * (y - x) for o, x, y",
        "[(y - x) for o, x, y",
        "tests/methods/test_directional_math.py -k front",
    ),
    Mutant(
        "the knee takes what is maximised for a cost",
        "search/pareto",
        "sum(o.sign * value / scale for o, value, scale in weighed)",
        "sum(value / scale for o, value, scale in weighed)",
        "tests/methods/test_directional_math.py -k knee",
    ),
    Mutant(
        "a limit leaves the worst of the others",
        "search/pareto",
        "[objectives[i].sign * p.values[i] for i in others],",
        "[-objectives[i].sign * p.values[i] for i in others],",
        "tests/methods/test_directional_math.py -k choices",
    ),
    Mutant(
        "a run that strengthens minimises the behaviour",
        "search/scoring",
        '1 if s.goal == "minimize" else -1',
        "1",
        "tests/runs/test_setup.py",
    ),
    Mutant(
        "prompts that the choice was confirmed on are left in the holdout",
        "prompts/sets",
        "holdout, confirm = spare[:end], _without(",
        "holdout, confirm = spare, _without(",
        "tests/prompts/test_sets.py -k spare",
    ),
    Mutant(
        "the second measurement takes the place of the first",
        "search/resampling",
        "totals[:, trials] += weights",
        "totals[:, trials] = weights",
        "tests/search/test_resampling.py -k further",
    ),
    Mutant(
        "a bound is taken on the side that flatters",
        "search/choosing",
        "return ends[goal.sign > 0]",
        "return ends[goal.sign < 0]",
        "tests/search/test_choosing.py -k confidence_hold",
    ),
    # -- edits on activations and in weights
    Mutant(
        "row norms are not restored on activations",
        "engine/stacking",
        "out.mul_(part.scale[:, None])",
        "pass",
        "tests/engine/test_stacking.py",
    ),
    Mutant(
        "a bias is edited as if it were none",
        "methods/directional_math",
        "return shift if scale is None else shift + b - scale * b",
        "return shift",
        "tests/model/test_edits.py -k bias",
    ),
    Mutant(
        "an edited bias keeps the row scales of its matrix",
        "model/edits",
        "b = b * self.scale.to(b)",
        "b = b",
        "tests/model/test_edits.py -k bias",
    ),
    Mutant(
        "post-norms are not counted",
        "methods/directional",
        "gains=[w.gain if section.post_norms else None for w in chosen],",
        "gains=None,",
        "tests/engine/test_engine.py -k whole_ablation",
    ),
    Mutant(
        "experts are edited with the first candidate's edits",
        "model/experts",
        "edits.apply(candidate * edits.experts + expert, token, inner, y)",
        "edits.apply(expert, token, inner, y)",
        "tests/model/test_experts.py",
    ),
    Mutant(
        "an adapter forgets the row scales",
        "export/low_rank",
        "return torch.addcmul(-((scale * left) @ right), scale - 1.0, w)",
        "return -((scale * left) @ right)",
        "tests/export/test_adapter.py -k difference",
    ),
    Mutant(
        "packing rounds to the nearest code, which undoes much of the edit",
        "export/packing",
        "behind += share[:, None] * torch.where(take, other, now)",
        "behind += 0",
        "tests/export/test_packing.py -k undo",
    ),
    Mutant(
        "the magnitudes of a DoRA forget the row scales",
        "export/dora",
        "magnitude = norms if edit.scale is None else norms * edit.scale.to(norms)",
        "magnitude = norms",
        "tests/export/test_adapter.py -k own_rank_is_the_edit",
    ),
    Mutant(
        "transposed experts are folded with the first block's columns in every block",
        "export/merging",
        "edited = _columns(whole, first, last).apply_to_weight(rows.mT).mT",
        "edited = _columns(whole, 0, last - first).apply_to_weight(rows.mT).mT",
        "tests/export/test_merging.py -k experts_in_blocks",
    ),
    Mutant(
        "an export is loaded in whatever dtype fits",
        "export/exporter",
        '"gguf_file": None, "dtype": name}',
        '"gguf_file": None, "dtype": "auto"}',
        "tests/runs/test_artifacts.py -k dtype",
    ),
    Mutant(
        "a GGUF's divergence is taken the wrong way round",
        "gguf/engine",
        "kl(before[at : at + _CHUNK], after[at : at + _CHUNK])",
        "kl(after[at : at + _CHUNK], before[at : at + _CHUNK])",
        "tests/gguf/test_engine.py",
    ),
    # -- captures of the methods
    Mutant(
        "writers are captured at the first token",
        "capture/sweep",
        '"last": (place == 0).flatten(),',
        '"last": (place == place[:, :1]).flatten(),',
        "tests/capture/test_moments.py -k last_rows",
    ),
    Mutant(
        "captured prompts keep the order of their batches",
        "capture/moments",
        "order = prompts.argsort()",
        "order = torch.arange(len(prompts))",
        "tests/capture/test_moments.py -k last_rows",
    ),
    Mutant(
        "a range sketch leaves out the prompts",
        "capture/moments",
        'counted = spans.among("written", at) | spans.among("before", at)',
        'counted = spans.among("written", at)',
        "tests/capture/test_moments.py -k sketches",
    ),
    Mutant(
        "padding is counted as a prompt's tokens",
        "capture/sweep",
        '"before": ((place < 0) & real).flatten(),',
        '"before": (place < 0).flatten(),',
        "tests/capture/test_sweep.py -k one_sweep",
    ),
    Mutant(
        "what a writer has taken is taken again in halves",
        "capture/sweep",
        "            if number in shown:\n                return\n",
        "",
        "tests/capture/test_sweep.py -k halved",
    ),
    Mutant(
        "residuals are of the last token of a response",
        "capture/sweep",
        "last_token_residuals(anatomy, spans.ends)",
        "last_token_residuals(anatomy)",
        "tests/capture/test_sweep.py -k one_sweep",
    ),
    Mutant(
        "the responses that ridge keeps are those to target prompts",
        "runs/session",
        'self.respond("contrast", self.sets["contrast"].ids)',
        'self.respond("contrast", self.sets["target"].ids)',
        "tests/runs/test_setup.py",
    ),
    Mutant(
        "methods capture residuals that are not winsorised",
        "runs/session",
        "winsor = self.config.directions.winsor",
        "winsor = self.config.directions.winsor and 1.0",
        "tests/runs/test_setup.py",
    ),
    # -- fused layers
    Mutant(
        "a window is one token too long",
        "model/fused_layers",
        "far |= query - places >= window",
        "far |= query - places > window",
        "tests/model/test_fused_layers.py -k final_states",
    ),
    Mutant(
        "nobody compares where tokens look",
        "model/forward",
        "agrees = self._masks_agree(fused) and self._outputs_agree(fused)",
        "agrees = self._outputs_agree(fused)",
        "tests/model/test_fused_layers.py -k window_that",
    ),
    Mutant(
        "positions count padding",
        "prompts/tokens",
        "return (self.mask.cumsum(-1) - 1).clamp_min(0)",
        "return torch.ones_like(self.mask).cumsum(-1) - 1",
        "tests/prompts/test_tokens.py",
    ),
    Mutant(
        "a text has other positions where it goes on from what was read",
        "engine/passes",
        "positions = (places[before:] - starts).clamp_min(0)",
        "positions = (places - starts)[:, :columns].clamp_min(0)",
        "tests/engine/test_passes.py -k going_on",
    ),
    Mutant(
        "rows that are alike take each other's states",
        "model/fused_layers",
        "out, x = out.index_select(0, duplicates.kinds), x.index_select(0, duplicates.kinds)",
        "out, x = out.index_select(0, duplicates.kinds), x.index_select(0, duplicates.kinds.flip(0))",
        "tests/model/test_fused_layers.py -k alike",
    ),
    Mutant(
        "padding is looked at",
        "prompts/tokens",
        "mask = [[*[0] * n, *[1] * len(row)] for",
        "mask = [[*[1] * n, *[1] * len(row)] for",
        "tests/prompts/test_tokens.py",
    ),
    Mutant(
        "a row's shorter past is not aligned to the others'",
        "model/kv_cache",
        "places = (places - pads.to(rows.device)[:, None]).clamp_min(0)",
        "places = places.expand(len(pads), -1)",
        "tests/model/test_kv_cache.py -k right",
    ),
    # -- further seams
    Mutant(
        "a resumed run forgets that its directions are projected",
        "runs/run_folder",
        'projected = (file.metadata() or {}).get("projected") == "true"',
        "projected = False",
        "tests/runs/test_setup.py -k come_back",
    ),
    Mutant(
        "a strengthening subspace removes",
        "methods/subspace",
        "self._sign = -1.0 if strengthen else 1.0",
        "self._sign = 1.0",
        "tests/methods/test_registry.py -k pushes_the_other",
    ),
    Mutant(
        "a subspace keeps what lies along the contrast mean",
        "methods/subspace",
        "rows = rows - (rows @ m)[:, None] * m",
        "pass",
        "tests/methods/test_subspace.py",
    ),
    Mutant(
        "a subspace is of the edited layer and not of the candidate's",
        "methods/subspace",
        "rows = self._rows[nearest, 1",
        "rows = self._rows[layer, 1",
        "tests/methods/test_subspace.py",
    ),
    Mutant(
        "a subspace is found one layer lower",
        "methods/subspace",
        "torch.cat([x[:, 1:].float().cpu()",
        "torch.cat([x[:, :-1].float().cpu()",
        "tests/methods/test_subspace.py",
    ),
    Mutant(
        "a strengthening ridge removes",
        "methods/ridge",
        "overshoot=-over if self._strengthen else 1.0 + over,",
        "overshoot=1.0 + over,",
        "tests/methods/test_registry.py -k pushes_the_other",
    ),
    Mutant(
        "ridge does not keep what decides a response's first token",
        "capture/sweep",
        '"written": (place >= 0).flatten(),',
        '"written": (place > 0).flatten(),',
        "tests/methods/test_registry.py -k ridge_keeps",
    ),
    Mutant(
        "ridge keeps what follows a response's last token",
        "capture/sweep",
        "return cls([*prompt, *response[:-1]], len(prompt))",
        "return cls([*prompt, *response], len(prompt))",
        "tests/methods/test_registry.py -k ridge_keeps",
    ),
    Mutant(
        "ridge takes a prompt's last token for one before it",
        "capture/sweep",
        '"before": ((place < 0) & real).flatten(),',
        '"before": ((place <= 0) & real).flatten(),',
        "tests/methods/test_registry.py -k ridge_keeps",
    ),
    Mutant(
        "ridge makes nothing of the keep set",
        "methods/ridge",
        "parts = [part for part in (a, b) if part is not None and part.tokens] or [a]",
        "parts = [a]",
        "tests/methods/test_registry.py -k half_of_what_ridge",
    ),
    Mutant(
        "what is kept lies on the behaviour's side",
        "runs/setup",
        "(along < boundary.at)",
        "(along > boundary.at)",
        "tests/runs/test_setup.py -k contrast_side",
    ),
    Mutant(
        "ara holds the keep set on top of all else",
        "methods/ara_math",
        ".square().mean((1, 2))) / 2",
        ".square().mean((1, 2)))",
        "tests/methods/test_ara.py -k half_of_what",
    ),
    Mutant(
        "ridge moves outputs to where they are",
        "methods/ridge",
        '"contrast": xc.outputs,',
        '"contrast": x.outputs,',
        "tests/methods/test_registry.py -k ridge_has",
    ),
    Mutant(
        "ara moves contrast to target",
        "methods/ara",
        'stack("target"),\n        stack("contrast"),',
        'stack("contrast"),\n        stack("target"),',
        "tests/methods/test_registry.py -k ara_moves",
    ),
    Mutant(
        "ara edits one layer too many",
        "methods/ara",
        "self.writers[number].layer < candidate.last",
        "self.writers[number].layer <= candidate.last",
        "tests/methods/test_registry.py -k ara_moves",
    ),
    Mutant(
        "a merge gives every block the first block's rows of the edit",
        "export/merging",
        "part = rows_of_edit(whole, first, last)",
        "part = rows_of_edit(whole, 0, last - first)",
        "tests/export/test_merging.py -k blocks",
    ),
    Mutant(
        "a study that strengthens minimises",
        "runs/pipeline",
        "ways = [s.goal for s in scoring.objectives]",
        'ways = ["minimize" for s in scoring.objectives]',
        "tests/runs/test_pipeline.py -k strengthens_maximises",
    ),
    Mutant(
        "new tokens leave a gap after the prompt",
        "engine/decoding",
        "positions = mask.sum(-1)\n",
        "positions = mask.sum(-1) + 1\n",
        "tests/engine/test_decoding.py",
    ),
    Mutant(
        "prompts read in several passes are aligned on the left",
        "engine/responses",
        "(width - mask.shape[1], 0))",
        "(0, width - mask.shape[1]))",
        "tests/engine/test_responses.py",
    ),
    Mutant(
        "an edited model is evaluated against itself",
        "runs/finished_run",
        "plan, references[part])",
        "plan)",
        f"{RUN} -k evaluated",
    ),
    # -- planning
    Mutant(
        "scores and bias take no memory",
        "engine/batch_sizing",
        "pairs = tokens * self.pair if read else 0",
        "pairs = 0",
        "tests/engine/test_batch_sizing.py -k long_pass",
    ),
    Mutant(
        "sizes are measured for as long as it takes",
        "engine/batch_sizing",
        "most = min(_SECONDS, _SHARE * search * took / (rows * some))",
        "most = inf",
        "tests/engine/test_batch_sizing.py -k measuring",
    ),
    Mutant(
        "long texts share passes with as many as short ones",
        "engine/engine",
        "fits = self._plan.fits(limit, lengths[chunk[0]])",
        "fits = getattr(self._plan, limit)",
        "tests/engine/test_engine.py -k long_texts",
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What the tests said of one mutant: `noticed`, `survived`, or `broken` where none could run."""

    mutant: Mutant
    said: str
    seconds: float
    by: str = ""


def outcomes(mutants: tuple[Mutant, ...]) -> Iterator[Outcome]:
    """Each mutant in a copy of the source of its own, by its tests, in a process of its own."""
    for name in LIBRARIES:
        importlib.import_module(name)
    for mutant in mutants:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as name:
            copy = Path(name) / "src"
            shutil.copytree(ROOT / "src", copy)
            (copy / "excise" / f"{mutant.module}.py").write_text(mutant.applied(), encoding="utf-8")
            code, by = _tested(copy, mutant.tests, Path(name) / "said")
        said = {0: "survived", FAILED: "noticed"}.get(code, "broken")
        yield Outcome(mutant, said, time.monotonic() - begun, by)


def _tested(source: Path, tests: str, said: Path) -> tuple[int, str]:
    """Pytest's exit code with the package at `source`, and the first test that failed."""
    assert "excise" not in sys.modules, "the package must be imported where it is mutated"
    forked = multiprocessing.get_context("fork").Process(target=_test, args=(source, tests, said))
    forked.start()
    forked.join(SECONDS)
    if forked.exitcode is None:
        forked.kill()
        return FAILED, "it does not end"
    text = said.read_text(encoding="utf-8", errors="replace")
    failed = [line.split()[1] for line in text.splitlines() if line.startswith("FAILED ")]
    return forked.exitcode, failed[0].partition("::")[2] if failed else ""


def _test(source: Path, tests: str, said: Path) -> None:
    """Run tests on the package at `source`, and end with pytest's exit code."""
    with said.open("wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.chdir(ROOT)
    first = [Phase.explicit, Phase.generate]  # that an example fails is enough, however large it is
    settings.register_profile("mutants", settings.default, phases=first)
    settings.load_profile("mutants")
    os.environ["PYTHONPATH"] = str(source)  # for what tests start themselves
    sys.path.insert(0, str(source))
    files, _, words = tests.partition(" -k ")
    options = ["-q", "-x", "-p", "no:cacheprovider", *(["-k", words] if words else [])]
    code = int(pytest.main([*options, *files.split()]))
    sys.stdout.flush()
    os._exit(code)


def main() -> int:
    """Run the mutants that were asked for; 1 where one is not noticed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="those whose fault or module holds this text")
    options = parser.parse_args()
    chosen = tuple(m for m in MUTANTS if options.only in f"{m.module} {m.fault}")
    for mutant in chosen:
        mutant.applied()
    lost = 0
    for outcome in outcomes(chosen):
        one = outcome.mutant
        lost += outcome.said != "noticed"
        sys.stdout.write(
            f"{outcome.said:9} {outcome.seconds:5.0f} s  {one.module}: {one.fault}"
            f"  [{outcome.by or one.tests}]\n"
        )
        sys.stdout.flush()
    sys.stdout.write(f"{len(chosen) - lost} of {len(chosen)} noticed\n")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
