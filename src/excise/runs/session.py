"""What every job works with: a model, the prompts as it reads them, and what they are scored by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from excise.capture.keep_set import NOTHING_KEPT, Kept
from excise.capture.sweep import Capture, Seen, observe
from excise.checkpoints.loading import Loaded
from excise.config import SettledConfig
from excise.engine.batch_sizing import direction_engine
from excise.engine.engine import Engine, Plan, Reference
from excise.engine.requests import Response, Responses
from excise.engine.stacking import ORIGINAL
from excise.events import OnEvent
from excise.methods.registry import Method
from excise.model.anatomy import Writer
from excise.model.edits import Edit
from excise.prompts.chat_template import answer_in
from excise.prompts.measured_sets import MeasuredSets, Part
from excise.search.evaluation import Measures, Panel
from excise.search.score_context import Answer
from excise.search.scorers import Scorer
from excise.search.scoring import Scoring

_BEFORE = 16  # tokens at the end of a prompt in which a template may open a thinking block


@dataclass(frozen=True)
class Session:
    """A model, its prompt sets and their scoring; what methods are made from.

    Attributes:
        config: the settings, settled for this model.
        loaded: the model.
        sets: the prompt sets with their token ids, by role.
        scoring: the scorers, where there are any, and the markers.
        on_event: told of progress.
        kept: what edits are made to keep outside the contrast set, once it is chosen.
    """

    config: SettledConfig
    loaded: Loaded
    sets: MeasuredSets
    scoring: Scoring
    on_event: OnEvent
    kept: Kept = field(default=NOTHING_KEPT, kw_only=True)

    @property
    def tokens(self) -> dict[str, list[list[int]]]:
        """Token ids of the prompts, by role."""
        return {role: one.ids for role, one in self.sets.items()}

    @property
    def writers(self) -> Sequence[Writer]:
        """The writers that candidates edit: none without a method."""
        return ()

    def engine(self, part: Part, plan: Plan, reference: Reference | None = None) -> Engine:
        """Return an engine that measures on the prompts of `part`."""
        return Engine(
            self.loaded,
            self.writers,
            {side: one.ids for side, one in self.sets.part(part).items()},
            max_new_tokens=self.config.scores.max_new_tokens,
            plan=plan,
            reference=reference,
            spoken=self.sets.opening.spoken,
            on_event=self.on_event,
        )

    def panel(self, engine: Measures, part: Part, scorers: Sequence[Scorer]) -> Panel:
        """Return a panel of `scorers` on an engine that measures on the prompts of `part`."""
        answer = self._answer(part) if self.config.prompts.thinking else None
        return Panel(engine, scorers, self.scoring.context(self.sets.part(part), answer))

    def _answer(self, part: Part) -> Answer:
        """Return what finds the answer in a response that may begin with a chain of thought."""
        tokenizer = self.loaded.tokenizer
        ends = {
            side: [tokenizer.decode(ids[-_BEFORE:]) for ids in one.ids]
            for side, one in self.sets.part(part).items()
        }
        special = list(map(str, tokenizer.all_special_tokens))

        def answer(side: str, number: int, response: Response) -> str | None:
            found = answer_in(tokenizer.decode(response.tokens), ends[side][number])
            if found is None:
                return None
            for token in special:
                found = found.replace(token, "")
            return found

        return answer

    def observe(self, capture: Capture) -> Seen:
        """Run the direction prompts through the model once, for residuals and for `capture`."""
        responses = self.responses() if capture.responses else None
        winsor = self.config.directions.winsor
        return observe(self.loaded, capture, self.tokens, responses, winsor, self.on_event)

    def responses(self) -> list[Sequence[int]]:
        """Return the model's own responses to the contrast prompts of the directions."""
        return [response.tokens for response in self.respond("contrast", self.sets["contrast"].ids)]

    def respond(self, role: str, ids: list[list[int]]) -> list[Response]:
        """Return the model's own responses to some prompts of a role."""
        spoken, on_event = self.sets.opening.spoken, self.on_event
        engine = direction_engine(self.loaded, {role: ids}, self.config, spoken, on_event=on_event)
        return engine.measure([ORIGINAL], [Responses(role)])[0].responses[role]

    def of(self, loaded: Loaded) -> Session:
        """Return the session of another model, which has its edit in its weights if any."""
        return Session(self.config, loaded, self.sets, self.scoring, self.on_event)


@dataclass(frozen=True)
class EditingSession(Session):
    """A session whose method is prepared: parameters of a trial become edits."""

    method: Method

    @property
    def writers(self) -> Sequence[Writer]:
        """The writers that candidates edit."""
        return self.method.writers

    def edits(self, params: Mapping[str, Any]) -> list[Edit | None]:
        """Return the edits of the candidate that these parameters name, one per writer.

        Raises:
            MeasurementError: the candidate has none.
        """
        return self.method.edits(self.method.candidate(params))
