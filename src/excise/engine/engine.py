"""Measurement of C candidates in one batch: every scorer's request is answered together.

Rows are candidates x prompts, candidate-major, each with its candidate's edits on the untouched model.
Layers below a candidate's first edit are shared (`passes`), and earlier responses serve as drafts for
speculative decoding (`responses`).

Shapes: C candidates, S of them in one stack, P prompts, B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from excise.checkpoints.loading import Loaded
from excise.engine.decoding import ResponseTree, Transcript
from excise.engine.drafts import Drafts
from excise.engine.kl import divergences
from excise.engine.passes import Passes, Rows
from excise.engine.requests import Decided, Divergence, Evidence, Request, Response, Responses
from excise.engine.responses import ResponseBatch
from excise.engine.stacking import ORIGINAL, CandidateEdits, Stack, first_edited
from excise.errors import MeasurementError, MemoryExhausted, is_out_of_memory
from excise.events import OnEvent, Progress, at_most_every, ignore
from excise.model.anatomy import Writer
from excise.model.devices import release
from excise.model.forward import Forward
from excise.model.kv_cache import can_join
from excise.model.parameters import any_offloaded
from excise.prompts.tokens import beginning, end_tokens, pad_token, same_length

R = TypeVar("R")
Limit = Literal["rows", "decode"]

_FIRST_STACK = 4  # the first stack of a search is smaller by this factor
EVENT_EVERY = 1.0  # seconds between two reports of progress
_EDIT_BYTES = 4 * 2**30  # the edits of a stack are copied into one tensor per writer


@dataclass(frozen=True)
class Plan:
    """Batch sizes of an engine's passes. Immutable; see `Engine.fitted_plan` for those in use.

    Attributes:
        rows: most rows of a prefill or teacher-forced pass.
        stack: most candidates of one batch.
        decode: most rows that decode together.
        reuse: run layers below a candidate's first edited one once for all candidates.
        tokens: most padded tokens of a batch: rows x longest text, response included; None for no bound.
        pairs: most rows x longest x longest of a prefill or teacher-forced pass, for attention's memory.
            The two share the memory: what a pass takes of one, the other lacks.
    """

    rows: int = 256
    stack: int = 8
    decode: int = 1024
    reuse: bool = True
    tokens: int | None = None
    pairs: int | None = None

    def fits(self, limit: Limit, longest: int) -> int:
        """Return the rows that fit a batch whose longest text has `longest` tokens; at least one."""
        rows: int = getattr(self, limit)
        share = self._share(limit, longest)
        return max(1, min(rows, int((1 + 1e-9) / share))) if share else rows

    def less(self, limit: Limit, longest: int, rows: int) -> Plan:
        """Return the plan whose memory bounds leave `rows` rows of `longest` tokens."""
        if self.tokens is None:
            return replace(self, tokens=rows * longest)
        left = rows * self._share(limit, longest)
        pairs = None if self.pairs is None else max(1, int(self.pairs * left))
        return replace(self, tokens=max(1, int(self.tokens * left)), pairs=pairs)

    def _share(self, limit: Limit, longest: int) -> float:
        """Return the share of the memory that one row of `longest` tokens takes."""
        share = longest / self.tokens if self.tokens else 0.0
        if self.pairs and limit == "rows":
            share += longest * longest / self.pairs
        return share


@dataclass(frozen=True)
class Original:
    """The original model's responses to one side's prompts, with the hidden states that predict them."""

    responses: list[Response]
    states: list[Tensor]  # per prompt (tokens, D): final hidden state before each response token


@dataclass(frozen=True)
class Reference:
    """The original model of another engine, against which divergence is measured."""

    originals: dict[str, Original]
    forward: Forward  # gives the original's logits; only its head is needed


class Engine:
    """Measures candidates on prompts given as token ids by side."""

    def __init__(
        self,
        loaded: Loaded,
        writers: Sequence[Writer],
        prompts: dict[str, list[list[int]]],
        *,
        max_new_tokens: int,
        plan: Plan | None = None,
        reference: Reference | None = None,
        spoken: Sequence[int] = (),
        on_event: OnEvent = ignore,
    ) -> None:
        self._plan = plan or Plan()
        self._on_event = at_most_every(EVENT_EVERY, on_event)
        self.spoken = tuple(spoken)  # the last tokens of every prompt that belong to its response
        self.writers = writers
        self.prompts = prompts
        self.limit = max_new_tokens
        self._loaded = loaded
        self._forward = loaded.forward
        self._ends = end_tokens(loaded.model, loaded.tokenizer)
        self._pad = pad_token(loaded.model, loaded.tokenizer)
        self._joins = can_join(self._forward.cache(1))
        self._follows = self._joins and loaded.anatomy.padding  # drafts
        shares = self._joins and not any_offloaded(loaded.model)
        self._prefixes = [beginning(side) for side in prompts.values()] if shares else []
        self._drafts: dict[str, Drafts] = {}
        self._learning = False
        self._originals: dict[str, Original] = dict(reference.originals) if reference else {}
        self._reference = reference.forward if reference else self._forward
        self._trees: dict[frozenset[Decided] | None, ResponseTree] = {}

    def measure(
        self,
        candidates: Sequence[CandidateEdits],
        requests: Sequence[Request],
        only: dict[str, int] | None = None,
    ) -> list[Evidence]:
        """Answer all requests for every candidate, in their order.

        Args:
            candidates: each an edit or None per writer, or `ORIGINAL`.
            requests: duplicates are answered once; of several `Responses` to one side, each is
                decoded until all of them are decided.
            only: side -> number of its first prompts to measure; all of them by default.

        Raises:
            MemoryExhausted: one row does not fit.
            MeasurementError: the model's logits are not finite.
        """
        for request in requests:
            if isinstance(request, Divergence):
                self.original(request.side)
        found: dict[int, Evidence] = {}
        with torch.inference_mode():
            answers = any(isinstance(request, Responses) for request in requests)
            learns = self._learning and self._follows and only is None and answers
            for numbers, passes in self._stacks(candidates, learns):
                evidence = self._measure_stack(passes, requests, only or {})
                found.update(zip(numbers, evidence, strict=True))
                if learns:
                    self._learn(evidence)
        return [found[number] for number in range(len(candidates))]

    @contextmanager
    def keeping_drafts(self) -> Iterator[None]:
        """Keep the responses made in this context as drafts for later candidates (speculative decoding).

        Responses do not change, but for near ties that a batch of another shape rounds the other way.
        """
        self._learning = True
        try:
            yield
        finally:
            self._learning = False

    def _learn(self, evidence: Sequence[Evidence]) -> None:
        for one in evidence:
            for side, responses in one.responses.items():
                self._drafts.setdefault(side, Drafts()).add(responses)

    def original(self, side: str) -> Original:
        """Return the original model's whole responses to a side's prompts; measured at the first call."""
        if side not in self._originals:
            with torch.inference_mode():
                passes = self._passes([ORIGINAL])
                numbers = list(range(len(self.prompts[side])))
                responses = self._answer(side, None, passes, numbers)[0]
                read, lengths = self._read(side, responses), self._whole_lengths(side, responses)
                states = self._spread(read, passes, numbers, lengths)[0]
            if not all(bool(torch.isfinite(rows).all()) for rows in states):
                raise MeasurementError(
                    "the model's hidden states are not finite: try --set model.dtype=float32"
                )
            self._originals[side] = Original(responses, states)
        return self._originals[side]

    def reference(self) -> Reference:
        """Return what another engine needs to measure its model against this one's original.

        It uses the model's head alone: `Loaded.free_layers` may follow.
        """
        return Reference({side: self.original(side) for side in self.prompts}, self._forward)

    @property
    def fitted_plan(self) -> Plan:
        """The sizes of passes in use: those asked for, less where memory ran out."""
        return self._plan

    def _passes(self, candidates: Sequence[CandidateEdits]) -> Passes:
        stack = Stack(self.writers, candidates)
        reuse, prefixes = self._plan.reuse, self._prefixes
        return Passes(self._forward, stack, self._pad, reuse=reuse, prefixes=prefixes)

    def _stacks(
        self, candidates: Sequence[CandidateEdits], learns: bool
    ) -> Iterator[tuple[list[int], Passes]]:
        """Split candidates into stacks by first edited layer, so that each shares as many layers as it can.

        The first stack that drafts are kept of is smaller: it decodes what later ones verify.
        """
        firsts = [first_edited(self.writers, edits) for edits in candidates]
        order = sorted(range(len(candidates)), key=lambda n: (firsts[n], n))
        fit = max(1, _EDIT_BYTES // max([1, *map(_edit_bytes, candidates)]))
        while order:
            size = min(self._plan.stack, fit)
            if learns and not self._drafts:
                size = max(1, size // _FIRST_STACK)
            numbers, order = order[:size], order[size:]
            yield numbers, self._passes([candidates[n] for n in numbers])

    def _measure_stack(
        self, passes: Passes, requests: Sequence[Request], only: dict[str, int]
    ) -> list[Evidence]:
        evidence = [Evidence() for _ in range(passes.stack.size)]
        for side in dict.fromkeys(request.side for request in requests):
            ours = [request for request in requests if request.side == side]
            numbers = list(range(len(self.prompts[side])))[: only.get(side)]
            wanted = [request for request in ours if isinstance(request, Responses)]
            if wanted:
                answers = self._answer(side, _until_all(wanted), passes, numbers)
                for one, responses in zip(evidence, answers, strict=True):
                    one.responses[side] = responses
            if any(isinstance(request, Divergence) for request in ours):
                lengths = self._whole_lengths(side, self.original(side).responses)
                values = self._spread(self._diverge(side), passes, numbers, lengths)
                for one, per_prompt in zip(evidence, values, strict=True):
                    one.divergence[side] = per_prompt
        return evidence

    # -- batches, and out of memory --------------------------------------------------------------

    def _spread(
        self,
        work: Callable[[Passes, list[int], list[int]], list[list[R]]],
        passes: Passes,
        numbers: list[int],
        lengths: list[int],
        limit: Limit = "rows",
    ) -> list[list[R]]:
        """Run `work` on batches of prompts for all candidates of a stack; return per candidate, per prompt.

        Prompts of similar `lengths` share a batch. When memory runs out the batch is halved (prompts
        first, then candidates), and later batches of such texts stay as small.
        """
        found: dict[tuple[int, int], R] = {}
        order = sorted(numbers, key=lambda n: (-lengths[n], n))
        padding = self._loaded.anatomy.padding
        groups = [order] if padding else same_length(order, lengths)
        waiting = [(list(range(passes.stack.size)), group) for group in groups]
        while waiting:
            members, chunk = waiting.pop(0)
            fits = self._plan.fits(limit, lengths[chunk[0]])
            if len(members) * len(chunk) > fits:
                waiting = _cut(members, chunk, fits) + waiting
                continue
            try:
                answers = work(passes, members, chunk)
            except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                answers = None
            if answers is None:  # outside the handler, so that its traceback frees the tensors
                self._back_off(passes, limit, lengths[chunk[0]], len(members) * len(chunk))
                waiting.insert(0, (members, chunk))
                continue
            for member, values in zip(members, answers, strict=True):
                found.update(((member, n), v) for n, v in zip(chunk, values, strict=True))
            if limit == "rows":
                rows = passes.stack.size * len(numbers)
                self._on_event(Progress("passes", len(found), rows))
        return [[found[member, n] for n in numbers] for member in range(passes.stack.size)]

    def _back_off(self, passes: Passes, limit: Limit, longest: int, rows: int) -> None:
        """Halve the rows of a batch that did not fit.

        Raises:
            MemoryExhausted: it had one row.
        """
        passes.free()
        release(self._loaded.device)
        if rows == 1:
            raise MemoryExhausted(
                "out of memory with one prompt at a time: use a smaller model, a smaller dtype, "
                "shorter prompts or --max-new-tokens, or a device with more memory"
            )
        self._plan = self._plan.less(limit, longest, max(1, rows // 2))

    # -- the three kinds of work -----------------------------------------------------------------

    def _answer(
        self, side: str, deciders: frozenset[Decided] | None, passes: Passes, numbers: list[int]
    ) -> list[list[Response]]:
        """Return greedy responses per candidate and prompt; drafts are used where there are any."""
        if deciders not in self._trees:
            self._trees[deciders] = ResponseTree(self._loaded.tokenizer, deciders, self.spoken)
        tree, prompts = self._trees[deciders], self.prompts[side]
        lengths = [len(prompt) + self.limit for prompt in prompts]
        joins = self._joins
        drafts = self._drafts.get(side) if self._follows else None

        ended, most = 0, passes.stack.size * len(numbers) * self.limit  # in tokens

        def work(passes: Passes, members: list[int], chunk: list[int]) -> list[list[Response]]:
            nonlocal ended
            rows = len(members) * len(chunk)

            def on_step(steps: int) -> None:
                now = ended + rows * min(steps, self.limit)
                self._on_event(Progress("responses", now, most))

            transcript = Transcript(tree, rows, self._ends, self.limit, on_step)
            batch = ResponseBatch(
                passes,
                members,
                chunk,
                prompts,
                transcript,
                # Caches that do not join have to be filled in one pass.
                rows=self._plan.fits("rows", lengths[chunk[0]]) if joins else rows,
            )
            if drafts is not None and (drafts.pay or self._learning):
                batch.decode_with_drafts(drafts)
                if self._learning:
                    drafts.tried(*(batch.first_round or (0, 0)))
            else:
                batch.decode()
            on_step(self.limit)  # the rest of them ended before
            ended += rows * self.limit
            return _per_member(transcript.responses(), len(members))

        return self._spread(work, passes, numbers, lengths, "decode" if joins else "rows")

    def _read(self, side: str, responses: list[Response]) -> Any:
        """Return work that gives teacher-forced states before each response token: (tokens, D) a prompt."""

        def work(passes: Passes, members: list[int], chunk: list[int]) -> list[list[Tensor]]:
            texts = [responses[n].tokens for n in chunk]
            whole = [(*self.prompts[side][n], *t[:-1]) for n, t in zip(chunk, texts, strict=True)]
            keep = max(len(t) for t in texts)
            hidden = passes.read(Rows.grid(members, whole), keep)
            grouped = hidden.view(len(members), len(chunk), *hidden.shape[1:])
            return [
                [row[keep - len(t) :] for row, t in zip(rows, texts, strict=True)]
                for rows in grouped
            ]

        return work

    def _diverge(self, side: str) -> Any:
        original = self.original(side)
        read = self._read(side, original.responses)
        chunk_bytes = self._forward.chunk_bytes

        def work(passes: Passes, members: list[int], chunk: list[int]) -> list[list[Tensor]]:
            states = read(passes, members, chunk)
            before = torch.cat([original.states[n] for n in chunk])
            after = torch.stack([torch.cat(rows) for rows in states])
            values = divergences(self._reference, before, self._forward, after, chunk_bytes)
            sizes = [len(original.responses[n].tokens) for n in chunk]
            return [list(row.split(sizes)) for row in values.double()]

        return work

    def _whole_lengths(self, side: str, responses: list[Response]) -> list[int]:
        pairs = zip(self.prompts[side], responses, strict=True)
        return [len(ids) + len(response.tokens) for ids, response in pairs]


def _edit_bytes(edits: CandidateEdits) -> int:
    return sum(edit.left.nbytes + edit.right.nbytes for edit in edits if edit is not None)


def _until_all(wanted: Sequence[Responses]) -> frozenset[Decided] | None:
    """Return the deciders that must all be settled; None when one request needs whole responses."""
    deciders = [request.decided for request in wanted]
    some = frozenset(decided for decided in deciders if decided is not None)
    return some if len(some) and None not in deciders else None


def _cut(members: list[int], numbers: list[int], rows: int) -> list[tuple[list[int], list[int]]]:
    """Cut (candidates, prompts) to batches of at most `rows` rows: the first prompts, then the rest."""
    some = max(1, min(len(members), rows))
    size = max(1, rows // some)
    first = [(members[m : m + some], numbers[:size]) for m in range(0, len(members), some)]
    return [*first, (members, numbers[size:])] if numbers[size:] else first


def _per_member(rows: list[R], members: int) -> list[list[R]]:
    size = len(rows) // members
    return [rows[start : start + size] for start in range(0, len(rows), size)]
