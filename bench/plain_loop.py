"""The slow reference for speed: one candidate at a time, as such tools commonly do it.

PEFT adapter, rank-3 SVD of the row-normalised difference, `generate` for the responses, another
`generate` for the logits. It even measures less: divergence at the first token only.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model

RANK = 3


class PlainLoop:
    """Measures one candidate after another. `prompts` maps side -> token ids."""

    def __init__(self, loaded: Any, writers: Any, prompts: Any, limit: int, markers: Any) -> None:
        self.device = loaded.device
        self.writers, self.prompts, self.limit, self.markers = writers, prompts, limit, markers
        self.tokenizer = loaded.tokenizer
        names = [w.name for w in writers]
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names)
        self.original = {w.name: w.module.weight.detach().clone() for w in writers}
        self.model = get_peft_model(loaded.model, config).eval()
        self.pad = loaded.tokenizer.pad_token_id or 0
        self.reference = self._first_logits()

    @torch.no_grad()
    def measure(self, edits: Any) -> tuple[float, float]:
        """Behaviour rate and first-token divergence of one candidate."""
        for writer, edit in zip(self.writers, edits, strict=True):
            self._load(writer.name, edit)
        ids, mask = self._padded("target")
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=self.limit,
            do_sample=False,
            pad_token_id=self.pad,
        )
        texts = self.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        rate = sum(self.markers.shown(text) for text in texts) / len(texts)
        log_q = self._first_logits().log_softmax(-1)
        log_p = self.reference.log_softmax(-1)
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
        ids, mask = self._padded("contrast")
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=1,
            do_sample=False,
            pad_token_id=self.pad,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return out.logits[0].float()

    def _padded(self, side: str) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.prompts[side]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.pad)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        return ids.to(self.device), mask.to(self.device)
