"""The slow reference for speed: one candidate at a time, as such tools commonly do it.

PEFT adapter, rank-3 SVD of the row-normalised difference, `generate` for the responses, another
`generate` for the logits. As it stands it measures less than ours, divergence at the first token
only; with `whole` it reads the original's responses in one more pass, and measures what ours does.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model

RANK = 3


class PlainLoop:
    """Measures one candidate after another. `prompts` maps side -> token ids."""

    def __init__(
        self,
        loaded: Any,
        writers: Any,
        prompts: Any,
        limit: int,
        markers: Any,
        answers: list[tuple[int, ...]],
    ) -> None:
        """`answers`: the original's responses to the contrast prompts, as token ids."""
        self.device = loaded.device
        self.writers, self.prompts, self.limit, self.markers = writers, prompts, limit, markers
        self.tokenizer = loaded.tokenizer
        names = [w.name for w in writers]
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names)
        self.original = {w.name: w.module.weight.detach().clone() for w in writers}
        self.model = get_peft_model(loaded.model, config).eval()
        self.pad = loaded.tokenizer.pad_token_id or 0
        self.answers = answers
        self.reference = self._first_logits().log_softmax(-1)
        self.whole_reference = self._whole_logits().log_softmax(-1)

    @torch.no_grad()
    def measure(self, edits: Any, *, whole: bool = False) -> tuple[float, float]:
        """Behaviour rate and divergence of one candidate, at the first token or over whole responses."""
        for writer, edit in zip(self.writers, edits, strict=True):
            self._load(writer.name, edit)
        ids, mask = self._padded(self.prompts["target"])
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=self.limit,
            do_sample=False,
            pad_token_id=self.pad,
        )
        texts = self.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        rate = sum(self.markers.shown(text) for text in texts) / len(texts)
        log_p = self.whole_reference if whole else self.reference
        log_q = (self._whole_logits() if whole else self._first_logits()).log_softmax(-1)
        return rate, float((log_p.exp() * (log_p - log_q)).sum(-1).mean())

    def _load(self, name: str, edit: Any) -> None:
        module = self.model.base_model.model.get_submodule(name)
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        if edit is None:
            b.zero_()
            return
        weight = self.original[name]
        delta = edit.apply_to_weight(weight) - weight.float()
        u, s, v = torch.svd_lowrank(delta, q=RANK + 3)
        a.copy_(v[:, :RANK].T)
        b.copy_(u[:, :RANK] * s[:RANK])

    @torch.no_grad()
    def _first_logits(self) -> torch.Tensor:
        ids, mask = self._padded(self.prompts["contrast"])
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=1,
            do_sample=False,
            pad_token_id=self.pad,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits: torch.Tensor = out.logits[0]
        return logits.float()

    @torch.no_grad()
    def _whole_logits(self) -> torch.Tensor:
        """Logits at every token of the original's responses (N, V)."""
        pairs = list(zip(self.prompts["contrast"], self.answers, strict=True))
        ids, mask = self._padded([[*prompt, *answer[:-1]] for prompt, answer in pairs])
        keep = max(map(len, self.answers))
        logits = self.model(input_ids=ids, attention_mask=mask, logits_to_keep=keep).logits
        return torch.cat([logits[i, -len(a) :] for i, a in enumerate(self.answers)]).float()

    def _padded(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.pad)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        return ids.to(self.device), mask.to(self.device)
