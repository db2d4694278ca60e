"""A loaded model as lm-evaluation-harness takes it: its own class for Transformers, telling progress."""

from __future__ import annotations

from typing import Any

from lm_eval.models.huggingface import HFLM

from excise.checkpoints.loading import Loaded
from excise.events import OnEvent, Progress


def harness_model(loaded: Loaded, batch: int, phase: str, on_event: OnEvent) -> Any:
    """Return a loaded model for `lm_eval.evaluator.evaluate`, in batches of so many samples."""
    model = _Told(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch)
    model.told = lambda done, total: on_event(Progress(phase, done, total))
    return model


class _Told(HFLM):  # type: ignore[misc]
    """The class of the library, without its progress bars: requests go to it in parts."""

    def loglikelihood(self, requests: list[Any], **_: Any) -> list[Any]:
        """Answer requests for likelihoods."""
        return self._in_parts(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[Any]:
        """Answer requests for the likelihood of whole texts."""
        return self._in_parts(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Any], **_: Any) -> list[Any]:
        """Answer requests for texts."""
        return self._in_parts(super().generate_until, requests)

    def _in_parts(self, answer: Any, requests: list[Any]) -> list[Any]:
        found: list[Any] = []
        for start in range(0, len(requests), _PART):
            found += answer(requests[start : start + _PART], disable_tqdm=True)
            self.told(len(found), len(requests))
        return found


_PART = 64  # requests between two reports: enough for the library to sort by length
