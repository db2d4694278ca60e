"""What becomes of kinds of prompts that S_keep has not seen, on the real model of bench/real_methods.py.

    python bench/real_kinds.py [sizes as for real_methods.py] --runs DIR [--only left_out shapes]

No search of its own: it takes the point of least drift at a rate of at most `AT` of every finished study in
DIR, and builds its edits again from moments over other texts. The tokens that S_keep is taken over
are captured once, one by one, so that any part of them makes a moment.

left_out    ten kinds of the keep set in turn: KL on held prompts of a kind with S_keep over all of the set
            and without that kind, beside directional's and that of ridge without a keep set
shapes      S_keep without any of the ten, in other forms, at several strengths: KL at equal rate on search
            prompts and on held prompts of the ten kinds
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from real_methods import folder_of, least, plain, settings, sizes_parser, store
from torch import Tensor

from excise import events
from excise.capture.moments import MomentObserver, RowObserver, sketch_draws
from excise.capture.sweep import Observer, Seen, Spans
from excise.checkpoints.loading import load
from excise.config import Config, PromptSource, load_config
from excise.engine.engine import Engine, Plan
from excise.methods.ridge import RidgeMethod, joint_basis
from excise.model.anatomy import Writer
from excise.model.edits import Edit
from excise.prompts.measured_sets import MeasuredSet
from excise.prompts.sets import Prompt, load_prompt_sets, read_prompts
from excise.report.stored_record import read_record
from excise.runs import setup
from excise.runs.run_folder import DIRECTIONS, read_opening
from excise.runs.session import Session
from excise.search.evaluation import Panel
from excise.search.scorers import find_scorers
from excise.search.scoring import scoring_of

SHIPPED = PromptSource(
    source=str(resources.files("excise") / "data" / "keep" / "prompts.jsonl"), group_column="kind"
)
# Ten kinds that differ, of the sixty-nine that ship.
KINDS = (
    "arithmetic",
    "python",
    "translation from English",
    "summarising",
    "poems",
    "e-mails",
    "geography",
    "small talk",
    "JSON and structured data",
    "riddles",
)
FIRST = 5  # prompts of a kind that the keep set may use; those after them are held
AT = 0.05  # the rate at which points are compared
SCALES = (0.8, 1.0, 1.25)  # of an edit's strength, to compare forms at equal rate
STACK = 12


class WrittenRows:
    """Keeps the inputs of some writers at every token that writes a response, and whose text it is of."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._parts: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in writers]

    def reduce(
        self, number: int, x: Tensor, _y: Tensor, at: Tensor, spans: Spans
    ) -> Callable[[], None]:
        written = spans.among("written", at).nonzero()[:, 0]
        last = spans.among("last", at)[written]
        found = spans.texts(at[written]), last.cpu(), x[written].float().cpu()
        return lambda: self._parts[number].append(found)

    def rows(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Text numbers (N,), whether it is the prompt's last token (N,), inputs (N, I); per writer."""
        joined = [[torch.cat(some) for some in zip(*part, strict=True)] for part in self._parts]
        return [(texts, last, x) for texts, last, x in joined]


@dataclass
class RowCapture:
    """What ridge captures, with the rows of S_keep one by one."""

    writers: Sequence[Writer]
    responses: bool = True

    def __post_init__(self) -> None:
        self.everywhere = dict.fromkeys(range(len(self.writers)))
        self.target, self.contrast = RowObserver(self.writers), RowObserver(self.writers)
        self.written = WrittenRows(self.writers)
        self.before = MomentObserver(self.writers, "before", self.everywhere)

    def observers(self, side: str) -> Sequence[Observer]:
        """The observers of a side's texts."""
        return [self.target] if side == "target" else [self.contrast, self.written, self.before]

    def tensors(self, _seen: Seen, _directions: Any) -> dict[str, Tensor]:
        """Nothing is stored."""
        return {}


@dataclass(frozen=True)
class Shape:
    """A form of S_keep.

    Attributes:
        name: in the results.
        share: of the keep set in S_keep; the rest is the contrast set's.
        first: S_first is half the keep set's, as S_keep is.
        before: S_prompt is half the keep set's.
        own_scale: share of S_keep that is replaced by its own diagonal.
        even: share that is replaced by the identity times its mean diagonal.
        basis: dimensions of the basis of wide writers.
        params: that replace the trial's.
    """

    name: str
    share: float = 0.5
    first: bool = False
    before: bool = False
    own_scale: float = 0.0
    even: float = 0.0
    basis: int = 512
    params: Mapping[str, Any] = field(default_factory=dict)


AS_IT_IS = Shape("as it is")
SHAPES = (
    AS_IT_IS,
    Shape("keep set three quarters", share=0.75),
    Shape("S_first over both", first=True),
    Shape("S_first and S_prompt over both", first=True, before=True),
    Shape("a fifth its own diagonal", own_scale=0.2),
    Shape("a fifth the identity", even=0.2),
    Shape("goals of rank 1", params={"rank": 1}),
    Shape("basis of 1024", basis=1024),
)


class Texts:
    """All tokens of S_keep, and methods made from parts of them."""

    def __init__(self, session: Session) -> None:
        capture = RowCapture(session.loaded.anatomy.select(session.config.edit.components))
        seen = session.observe(capture)
        directions, _ = setup.find_directions(session, seen)
        kept = setup.choose_keep(session, directions)
        seen = setup.with_keep(seen, kept)
        also = WrittenRows(capture.writers)
        self.before = MomentObserver(capture.writers, "before", capture.everywhere)
        seen.again("keep", [also, self.before], "capture keep")
        self.session, self.capture = session, capture
        self.target, self.contrast = capture.target.rows(), capture.contrast.rows()
        self.written, self.also = capture.written.rows(), also.rows()
        groups = {
            tuple(ids): str(prompt.group)
            for ids, prompt in zip(
                session.sets["keep"].ids, session.sets["keep"].prompts, strict=True
            )
        }
        self.kinds = [groups[tuple(ids)] for ids in kept.ids]

    def method(self, shape: Shape, without: Sequence[str] = ()) -> RidgeMethod:
        """Ridge with S_keep in this form, taken over the keep set without some kinds."""
        used = torch.tensor([kind not in without for kind in self.kinds])
        wide = [n for n, w in enumerate(self.capture.writers) if w.shape[1] > shape.basis]
        draws = sketch_draws(self.capture.writers, wide, shape.basis // 2)
        captured: dict[str, Tensor] = {}
        for number, writer in enumerate(self.capture.writers):
            captured |= self._of(number, writer, shape, used, draws.get(number))
        layers = len(self.session.loaded.anatomy.layers)
        return RidgeMethod(self.capture.writers, layers, captured, self.session.config)

    def _of(
        self, number: int, writer: Writer, shape: Shape, used: Tensor, draw: Tensor | None
    ) -> dict[str, Tensor]:
        texts, last, rows = self.also[number]
        own, lasts = rows[used[texts]], rows[used[texts] & last]
        contrast, first = self.written[number][2], self.contrast[number].inputs
        keep = (1 - shape.share) * moment(contrast) + shape.share * moment(own)
        diagonal = keep.diagonal().mean()
        keep = keep.lerp(torch.diag(keep.diagonal()), shape.own_scale)
        keep = keep.lerp(diagonal * torch.eye(len(keep)), shape.even)
        firsts = moment(first)
        if shape.first:
            firsts = firsts.lerp(moment(lasts), 0.5)
        before = self.capture.before.sums[number]
        prompts = before.mean()
        if shape.before:
            prompts = prompts.lerp(self.before.sums[number].mean(), 0.5)
        parts = {"keep": keep, "prompts": prompts, "first": firsts}
        x = self.target[number].inputs
        if draw is not None:
            sums = len(contrast) * moment(contrast) + len(own) * moment(own) + before.moment.float()
            basis = joint_basis([x, first, draw.T @ sums], shape.basis)
            parts = {what: basis @ m @ basis.T for what, m in parts.items()}
            parts["basis"], x = basis, x @ basis.T
        parts |= {
            "target": x,
            "outputs": self.target[number].outputs,
            "contrast": self.contrast[number].outputs,
            "diagonal": diagonal,
        }
        return {f"{writer.name}/{what}": t.contiguous() for what, t in parts.items()}


def moment(rows: Tensor) -> Tensor:
    return rows.T @ rows / len(rows)


class Bench:
    """The model with the prompts that edits of any method are measured on here."""

    def __init__(self, sizes: argparse.Namespace, folder: Path) -> None:
        self.runs, self.seeds = sizes.runs, sizes.seeds
        held = [
            {"text": prompt.text, "group": kind}
            for kind, prompts in by_kind().items()
            for prompt in prompts[FIRST:]
        ]
        path = folder / "held.jsonl"
        path.write_text("\n".join(map(json.dumps, held)), encoding="utf-8")
        source = {"source": str(path), "group_column": "group"}
        self._more = {"prompts.contrast_holdout": source, "prompts.target_holdout": None}
        self._sizes = sizes
        self._loaded = load(self._config("ridge").model)
        self.session = self._open("ridge")
        self.plan = Plan(rows=24, stack=STACK, decode=640)
        self._engines: dict[str, Panel] = {}

    def _config(self, name: str) -> Config:
        flags = settings(name, self._sizes.seeds[0], self._sizes) | self._more
        flags |= {"prompts.holdout_size": None, "prompts.eval_size": 2 * self._sizes.eval_size}
        return load_config(behaviour="disclaimers", flags=flags)

    def _open(self, name: str) -> Session:
        config = self._config(name)
        sets = load_prompt_sets(config.prompts)
        bare = setup.open_session(config, self._loaded, sets, scoring_of(config), events.ignore)
        opening = read_opening(folder_of(self.runs, name, self.seeds[0]) / DIRECTIONS)
        return setup.open_responses(bare, opening)

    def points(self, name: str) -> list[dict[str, Any]]:
        """Parameters of the point at `AT` of every seed."""
        found = []
        for seed in self.seeds:
            trial = least(read_record(folder_of(self.runs, name, seed)).trials, AT)
            if trial is not None:
                found.append(trial.params)
        return found

    def edits(self, name: str) -> list[list[Edit | None]]:
        """Edits of the point of every seed, as they were searched."""
        session = setup.restore(self._open(name), folder_of(self.runs, name, self.seeds[0]))
        return [session.edits(params) for params in self.points(name)]

    def panel(self, kinds: Sequence[str]) -> Panel:
        """A panel over held prompts of some kinds; over the search prompts without any."""
        session, key = self.session, " ".join(kinds)
        if key not in self._engines:
            if kinds:
                held = session.sets["contrast_holdout"]
                rows = [n for n, p in enumerate(held.prompts) if p.group in kinds]
                sides = {"contrast": rows_of(held, rows)}
                names = ["drift", "drift_first"]
            else:
                sides = session.sets.part("search")
                sides["contrast"] = rows_of(sides["contrast"], range(self._sizes.eval_size))
                names = ["behaviour_rate", "drift", "drift_first"]
            engine = Engine(
                self._loaded,
                session.loaded.anatomy.select(session.config.edit.components),
                {side: one.ids for side, one in sides.items()},
                max_new_tokens=session.config.scores.max_new_tokens,
                plan=self.plan,
                spoken=session.sets.opening.spoken,
            )
            context = session.scoring.context(sides)
            self._engines[key] = Panel(engine, find_scorers(names), context)
        return self._engines[key]

    def measure(
        self, kinds: Sequence[str], edits: Sequence[Sequence[Edit | None]]
    ) -> list[dict[str, float]]:
        """Scores of edits on held prompts of some kinds, or on the search prompts."""
        return [plain(m.scores) for m in self.panel(kinds).measure(edits)]


def rows_of(one: MeasuredSet, rows: Sequence[int]) -> MeasuredSet:
    """Some of the prompts of a set."""
    return replace(one, prompts=tuple(one.prompts[n] for n in rows), ids=[one.ids[n] for n in rows])


def by_kind() -> dict[str, list[Prompt]]:
    """The shipped prompts of KINDS."""
    found: dict[str, list[Prompt]] = {kind: [] for kind in KINDS}
    for prompt in read_prompts(SHIPPED):
        if prompt.group in found:
            found[prompt.group].append(prompt)
    return found


def left_out(bench: Bench, texts: Texts) -> dict[str, Any]:
    """KL on held prompts of each kind, of every method's points, by seed."""
    fixed = {name: bench.edits(name) for name in ("directional", "ridge-no-keep", "ridge")}
    points = bench.points("ridge")
    flat = [edits for some in fixed.values() for edits in some]
    kinds: dict[str, Any] = {}
    for kind in KINDS:
        method = texts.method(AS_IT_IS, [kind])
        without = [method.edits(method.candidate(params)) for params in points]
        found = bench.measure([kind], [*flat, *without])
        named = iter(found)
        kinds[kind] = {name: [next(named) for _ in some] for name, some in fixed.items()}
        kinds[kind]["without"] = list(named)
        kinds[kind]["in the set"] = texts.kinds.count(kind)
        kinds[kind]["search, without"] = bench.measure([], without[:1])
        print(kind, kinds[kind], flush=True)
    search = {name: bench.measure([], some) for name, some in fixed.items()}
    return {"rate at most": AT, "search": search, "kinds": kinds}


def shapes(bench: Bench, texts: Texts) -> dict[str, Any]:
    """Forms of S_keep that has none of KINDS: scores at several strengths, by seed."""
    points, found = bench.points("ridge"), {}
    for shape in SHAPES:
        method = texts.method(shape, KINDS)
        edits = []
        for params in points:
            candidate = method.candidate({**params, **shape.params})
            for scale in SCALES:
                profile = replace(candidate.profile, max_weight=scale)
                edits.append(method.edits(replace(candidate, profile=profile)))
        pairs = zip(bench.measure([], edits), bench.measure(KINDS, edits), strict=True)
        rows = [{"search": on_search, "kinds": on_kinds} for on_search, on_kinds in pairs]
        size = len(SCALES)
        found[shape.name] = [rows[n : n + size] for n in range(0, len(rows), size)]
        print(shape.name, found[shape.name], flush=True)
    return {"scales": SCALES, "shapes": found}


def measure(sizes: argparse.Namespace, only: Sequence[str] = ("left_out", "shapes")) -> None:
    """Add what is asked for to the results."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(sizes, Path(folder))
        texts = Texts(bench.session)
        for name, what in {"left_out": left_out, "shapes": shapes}.items():
            if name in only:
                store(name, what(bench, texts))


def main() -> None:
    parser = sizes_parser(__doc__)
    parser.add_argument("--only", nargs="+", default=["left_out", "shapes"])
    arguments = parser.parse_args()
    measure(arguments, arguments.only)


if __name__ == "__main__":
    main()
