"""Our language model in lm-evaluation-harness (extra `eval`): a context is read once, and its state forked for every choice.

    import lm_eval
    from exlstm.harness import ExlstmLM
    lm_eval.simple_evaluate(model=ExlstmLM("runs/my"), tasks=["arc_easy"])

Importing this registers the model as "exlstm", with the arguments of ExlstmLM.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map_only

from exlstm.models.language import IGNORE, LanguageModel

# Tokens that are written where a task does not say how many.
MAX_TOKENS = 256


@register_model("exlstm")
class ExlstmLM(TemplateLM):
    """The model of a run or folder, or a LanguageModel with a tokenizer.

    Args:
        pretrained: what `LanguageModel.from_pretrained` reads, or a model.
        device: None is the CPU, or where the model is.
        batch_size: tokens that are worked on at once, padding included; "auto" is 16384. A row may be longer.
        prefix: what stands before a text without context; its first token counts.
    """

    def __init__(self, pretrained, device=None, batch_size: int | str = "auto", prefix: str = "\n", **_):
        super().__init__()
        is_model = isinstance(pretrained, LanguageModel)
        self.model = (pretrained if is_model else LanguageModel.from_pretrained(pretrained, device=device)).eval()
        if self.model.tokenizer is None:
            raise ValueError(f"{'the model' if is_model else pretrained} has no tokenizer, so it cannot read text")
        self.tokenizer = self.model.tokenizer
        self.tokens_at_once = 16384 if str(batch_size) == "auto" else int(batch_size)
        if self.tokens_at_once < 1:
            raise ValueError(f"batch_size is {batch_size}, wanted a number of tokens")
        self._prefix = self.tok_encode(prefix)[0]
        self._device = self.model.embedding.weight.device

    @property
    def eot_token_id(self) -> int:
        """The token that stands before a text without context: our tokenizers have none that ends a text."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        return f"exlstm-{self.tokenizer.to_dict()['kind']}-{self.tokenizer.vocab_size}"

    def tok_encode(self, string: str, add_special_tokens=None, **_) -> list[int]:
        return list(self.tokenizer.encode(string))

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_):
        """(log-probability in nats, whether each token is the likeliest) of the continuation after the context, a request."""
        choices = defaultdict(list)
        for place, (_, context, continuation) in enumerate(requests):
            # A context of spaces alone has become part of the continuation.
            choices[tuple(context) or (self._prefix,)].append((place, continuation))
        answers = [None] * len(requests)
        for contexts in self._batches(list(choices), len):
            # The contexts of a batch are read once each.
            _, state = self.model.generate([list(c) for c in contexts], 0, return_state=True)
            asked = [(row, *choice) for row, context in enumerate(contexts) for choice in choices[context]]
            for some in self._batches(asked, lambda choice: len(choice[2])):
                for (_, place, _), answer in zip(some, self._answers(state, some), strict=True):
                    answers[place] = answer
        return answers

    def _answers(self, state, some) -> list[tuple[float, bool]]:
        """The answers to choices (row of the state, _, tokens)."""
        rows = torch.tensor([row for row, _, _ in some], device=self._device)
        logits = state.logits.index_select(0, rows).unsqueeze(1)  # (N, 1, V)
        targets = _padded([tokens for _, _, tokens in some], self._device)  # (N, T)
        if targets.shape[1] > 1:
            layers = tree_map_only(Tensor, lambda t: t.index_select(0, rows), state.layers)
            lengths = torch.tensor([len(tokens) - 1 for _, _, tokens in some], device=self._device)
            more, _ = self.model(targets[:, :-1].clamp(min=0), layers, lengths=lengths.clamp(min=0))
            logits = torch.cat([logits, more], 1)
        counted = targets >= 0
        found = logits.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        sums = (found.double() * counted).sum(1)
        greedy = ((logits.argmax(-1) == targets) | ~counted).all(1)
        return list(zip(sums.tolist(), greedy.tolist(), strict=True))

    @torch.inference_mode()
    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text in nats, in one piece whatever its length."""
        texts = [[self._prefix, *self.tok_encode(request.args[0])] for request in requests]
        answers = [0.0] * len(texts)
        for places in self._batches([i for i, text in enumerate(texts) if len(text) > 1], lambda i: len(texts[i])):
            rows = [texts[i] for i in places]
            inputs, targets = (_padded(part, self._device) for part in ([r[:-1] for r in rows], [r[1:] for r in rows]))
            lengths = torch.tensor([len(row) - 1 for row in rows], device=self._device)
            batch = {"inputs": inputs.clamp(min=0), "targets": targets, "lengths": lengths}
            losses = self.model.token_losses(batch).double().sum(1)
            for place, loss in zip(places, losses.tolist(), strict=True):
                answers[place] = -loss
        return answers

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """What the model writes on, up to a text of `until`, which is not part of it."""
        answers, alike = [None] * len(requests), defaultdict(list)
        for place, request in enumerate(requests):
            context, how = request.args
            alike[repr(sorted(how.items()))].append((place, context, how))
        for group in alike.values():
            how = _sampling(group[0][2])
            for some in self._batches(group, lambda one: len(one[1])):
                texts = [context or self.tokenizer.decode([self._prefix]) for _, context, _ in some]
                for (place, _, _), text in zip(some, self.model.generate(texts, **how), strict=True):
                    answers[place] = text
        return answers

    def _batches(self, items, size):
        """Batches of items of about one size, the largest first, of `tokens_at_once` tokens."""
        items = sorted(items, key=size, reverse=True)
        start = 0
        while start < len(items):
            count = max(1, self.tokens_at_once // max(1, size(items[start])))
            yield items[start : start + count]
            start += count


def _padded(rows: list[list[int]], device) -> Tensor:
    """(N, T) whole numbers, IGNORE where a row has ended."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=IGNORE).to(device)


def _sampling(how: dict) -> dict:
    """A task's generation_kwargs as arguments of LanguageModel.generate."""
    how = dict(how)
    until = how.pop("until", None)
    known = {"max_tokens": MAX_TOKENS, "stop": [until] if isinstance(until, str) else list(until or []) or None}
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens"):
        known["max_tokens"] = how.pop(name, known["max_tokens"])
    does_sample, temperature = how.pop("do_sample", None), how.pop("temperature", None)
    if does_sample is False or (does_sample is None and not temperature):
        known["temperature"] = 0.0
    else:
        known["temperature"] = 1.0 if temperature is None else float(temperature)
    for name in ("top_k", "top_p", "min_p", "repetition_penalty"):
        if name in how:
            known[name] = how.pop(name)
    if how:
        raise ValueError(
            f"the task's generation_kwargs say {', '.join(sorted(how))}, which LanguageModel.generate has not"
        )
    return known
