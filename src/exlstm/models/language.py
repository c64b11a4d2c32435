"""LanguageModel: tokens in, logits of the next token out, and a state that recurrent blocks keep at one size.

tokens (B, T) → embedding (B, T, D) → stack → norm → head → cap·tanh(logits / cap)
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exlstm.layers.basic import bare, init_linear, soft_cap, valid_mask
from exlstm.models import checkpoint
from exlstm.models.config import LanguageConfig, nearest
from exlstm.models.engine import Held
from exlstm.models.reading import GenerationState
from exlstm.models.sampling import Ends, Sampling, is_whole
from exlstm.models.stack import Stack, make_norm, set_eps
from exlstm.models.writing import Writing
from exlstm.ops.backend import elsewhere, traced
from exlstm.ops.loss import linear_cross_entropy

IGNORE = -100
FIELDS = ("inputs", "targets", "input_ids", "labels", "reset", "mask", "attention_mask", "lengths")


class LanguageModel(nn.Module):
    """A stack between an embedding and a head over `config.vocab_size` tokens.

    `tokenizer` (None, or one of exlstm.data.tokenizer) is set by hand or by `from_pretrained`; text prompts want one.

    >>> model = LanguageModel(LanguageConfig(d_model=64, n_layers=2, blocks=["mlstm", "slstm"]))
    >>> logits, state = model(torch.randint(256, (2, 10)))
    >>> logits, state = model(torch.randint(256, (2, 1)), state)
    >>> tokens = model.generate([1, 2, 3], max_tokens=5, seed=0)
    """

    def __init__(self, config: LanguageConfig, device=None, dtype=None):
        super().__init__()
        if not isinstance(config, LanguageConfig):
            raise TypeError(f"config is {type(config).__name__}, wanted a LanguageConfig")
        self.config = config
        self.tokenizer = None
        self.held = Held()
        new = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(config.vocab_size, config.d_model, **new)
        self.stack = Stack(config, **new)
        self.norm = make_norm(config.norm, config, **new)
        set_eps(self.norm, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False, **new)
        self._start_vocabulary()

    def reset_parameters(self):
        self.stack.reset_parameters()
        if not isinstance(self.norm, nn.Identity):
            self.norm.reset_parameters()
        self._start_vocabulary()

    def _start_vocabulary(self):
        # As in xLSTM. In the embedding: small against what the blocks add to the residual stream, so that the context
        # outweighs the last token. In the head: logits of size 0.63, so that the loss starts 0.2 nats above log V. A head
        # seven times smaller starts at log V itself and learns more slowly: 2.01 against 1.95 nats after 300 steps.
        for part in (self.embedding, self.head):
            if part is not None:
                init_linear(part.weight)

    @property
    def gradient_checkpointing(self) -> bool:
        """Blocks run again in the backward pass instead of being kept: less memory, about a third more time."""
        return self.stack.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool):
        self.stack.gradient_checkpointing = bool(value)

    def n_parameters(self, embedding: bool = True) -> int:
        """Number of parameters; `embedding` False leaves the embedding out, and with it a tied head."""
        return sum(p.numel() for p in self.parameters() if embedding or p is not self.embedding.weight)

    def forward(self, tokens: Tensor, state=None, *, lengths=None, mask=None, reset=None):
        """Logits of the next token (B, T, V) in float32, and the state after the last token.

        Args:
            tokens: (B, T) whole numbers from 0 to V - 1.
            state: of the call before, or of `generate`; None is a fresh one.
            lengths: (B,) valid tokens of right-padded rows.
            mask: (B, T) bool, False is padding.
            reset: (B, T) bool, the memory is emptied before the token: a new document.

        Raises:
            ValueError, TypeError: arguments that do not fit, in one sentence.
        """
        x, state = self.hidden(self._checked(tokens), state, lengths=lengths, mask=mask, reset=reset)
        return self.logits(x), state

    def hidden(self, tokens: Tensor, state=None, *, lengths=None, mask=None, reset=None):
        """What the head reads (B, T, D), normalised, and the state; arguments as in `forward`, tokens unchecked."""
        layers = state.layers if isinstance(state, GenerationState) else state
        x = self.embedding(tokens)
        if self.config.dropout:
            x = F.dropout(x, self.config.dropout, self.training)
        x, layers = self.stack(x, layers, lengths=lengths, mask=mask, reset=reset)
        return self.norm(x), layers

    def logits(self, x: Tensor) -> Tensor:
        """Soft-capped logits (..., V) of `hidden`, in float32 (float64 in a float64 model)."""
        logits = F.linear(x, self._head_weight()) if self._plain_head() else self.head(x)
        return soft_cap(logits.to(torch.promote_types(logits.dtype, torch.float32)), self.config.logit_cap)

    def _plain_head(self) -> bool:
        """Whether the head is the matrix that it was built as, to which nobody listens, and no layer of somebody's, as a LoRA
        adapter is."""
        return self.head is None or (bare(self.head) and not hasattr(self.head.weight, "qdata"))

    def _head_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def loss(self, batch) -> Tensor:
        """Mean cross-entropy of the predicted tokens, in nats; the logits never stand whole.

        `batch` is (inputs, targets) or (inputs, targets, reset), each (B, T), a NamedTuple or mapping with those names
        and perhaps `mask` or `lengths`, or tokens (B, T), each of which predicts the next. Targets of -100 and padding
        do not count. With Hugging Face names (input_ids, attention_mask, labels) the labels are moved by one here.
        """
        return self._loss(batch, "mean")

    @torch.no_grad()
    def token_losses(self, batch) -> Tensor:
        """Cross-entropy of every target (B, T) in nats, without gradient; 0 where the target does not count.

        `batch` as in `loss`. Of tokens alone: minus the log-probability of the token that follows each one, and 0 at the end.

        >>> model = LanguageModel(LanguageConfig(d_model=64, n_layers=1)).eval()
        >>> tokens = torch.tensor([[72, 101, 108, 108, 111]])
        >>> of_each = -model.token_losses(tokens)[:, :-1]  # log p(tokens[:, 1:])
        >>> of_the_text = of_each.sum(1)
        """
        return self._loss(batch, "none")

    def _loss(self, batch, reduction: str) -> Tensor:
        inputs, targets, where = self._read_batch(batch)
        x, _ = self.hidden(inputs, **where)
        if not self._plain_head():
            losses = F.cross_entropy(
                self.logits(x).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
            )
            counted = (targets != IGNORE).sum().clamp(min=1)
            return losses.sum() / counted if reduction == "mean" else losses.view(targets.shape)
        cap = self.config.logit_cap
        return linear_cross_entropy(x, self._head_weight(), targets, cap=cap, ignore=IGNORE, reduction=reduction)

    def _read_batch(self, batch) -> tuple[Tensor, Tensor, dict]:
        """inputs, targets and the keyword arguments of `hidden`."""
        given = {name: value for name, value in _named(batch).items() if value is not None}
        for name in given:
            if name not in FIELDS:
                raise ValueError(f"unknown field {name!r} in the batch{nearest(name, FIELDS)}")
        inputs = given.get("inputs", given.get("input_ids"))
        if inputs is None:
            raise ValueError(f"the batch has {', '.join(given) or 'nothing'}, wanted inputs and targets")
        inputs = self._checked(inputs)
        mask = given.get("mask", given.get("attention_mask"))
        mask = mask.bool() if isinstance(mask, Tensor) else mask
        mask = valid_mask(given.get("lengths"), mask, *inputs.shape, inputs.device)
        if "targets" in given:
            targets = self._checked_targets(given["targets"], inputs)
        else:
            labels = self._checked_targets(given.get("labels", inputs), inputs)
            if labels.shape[1] < 2:
                raise ValueError("tokens (B, 1) hold nothing to predict, wanted at least 2 tokens a row")
            if mask is not None:
                labels = labels.masked_fill(~mask, IGNORE)
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        if mask is not None:
            targets = targets.masked_fill(~mask, IGNORE)
        return inputs, targets, {"mask": mask, "reset": given.get("reset")}

    def _checked_targets(self, targets: Tensor, inputs: Tensor) -> Tensor:
        """Targets of the inputs' shape; what they hold is the loss's to check."""
        if not isinstance(targets, Tensor) or targets.shape != inputs.shape:
            came = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            raise ValueError(f"targets are {came}, wanted a tensor of {tuple(inputs.shape)} as the inputs")
        if not is_whole(targets.dtype):
            raise TypeError(f"targets are {targets.dtype}, wanted whole numbers")
        return targets.long()

    def _checked(self, tokens: Tensor) -> Tensor:
        """Tokens in a dtype that the embedding takes, or one sentence about what is wrong with them."""
        if not isinstance(tokens, Tensor):
            raise TypeError(f"tokens are {type(tokens).__name__}, wanted a tensor of whole numbers (B, T)")
        if not is_whole(tokens.dtype):
            raise TypeError(f"tokens are {tokens.dtype}, wanted whole numbers")
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}, wanted (B, T) with no axis empty")
        weight = getattr(self.embedding, "weight", None)
        if elsewhere(weight, tokens):
            raise ValueError(f"tokens are on {tokens.device} and the model is on {weight.device}, wanted one device")
        # On an accelerator the check would have to wait for the device; there the embedding itself refuses.
        if tokens.device.type == "cpu" and not traced():
            low, high = (int(end) for end in tokens.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                wrong = low if low < 0 else high
                raise ValueError(f"tokens hold {wrong}, wanted 0 to {self.config.vocab_size - 1}")
        return tokens if tokens.dtype in (torch.int64, torch.int32) else tokens.long()

    def generate(
        self,
        prompt,
        max_tokens: int = 100,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop=None,
        eos=None,
        seed: int | None = None,
        stream: bool = False,
        state=None,
        return_state: bool = False,
    ):
        """Writes on from a prompt, in eval mode and without gradients; the prompt is not part of the result.

        Args:
            prompt: text, a list of texts, a list of tokens, a list of those, or a tensor (T,) or (B, T). Prompts of one
                batch may differ in length and give what each gives alone. The result has the same form: text, texts,
                tokens, lists of tokens, or a tensor, in which rows that ended early are filled with -100.
            max_tokens: tokens a row, at most.
            temperature: divides the logits; 0 takes the likeliest token, as does top_k 1.
            top_k: only the k likeliest tokens; 0: all.
            top_p: of those, only the likeliest that together reach this probability.
            min_p: of those, only tokens at least this likely, relative to the likeliest.
            repetition_penalty: logits of tokens in prompt and result are divided by it (multiplied where negative).
            stop: text or list of tokens that ends a row, or a list of those; also when it is split over tokens. It is
                not part of the result, nor is a token that holds a part of a stop text.
            eos: token or tokens that end a row, not part of the result either.
            seed: row r of every call with this seed draws the same numbers; None follows torch.manual_seed.
            stream: an iterator, for a single prompt: pieces of text in whole characters, or tokens. What may yet become
                a stop is held back. With `return_state`, its attribute `state` is the state at the end.
            state: what an earlier call returned, or a state of `forward`; the prompt is what follows. With a state of
                `generate` the prompt may be empty, and the numbers drawn go on where they were.
            return_state: also return the state after prompt and result, every token of it consumed: writing on from it
                equals one run over the whole. Stop and eos are not consumed, as they are not part of the result.

        Raises:
            ValueError: an argument that does not fit, in one sentence.

        >>> model = LanguageModel(LanguageConfig(d_model=64, n_layers=1))
        >>> tokens, state = model.generate([1, 2, 3], max_tokens=4, seed=0, return_state=True)
        >>> more = model.generate([], max_tokens=4, seed=0, state=state)
        """
        rules = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        writing = Writing(self, prompt, max_tokens, rules, Ends(stop, eos, self), seed, state)
        return writing.stream(return_state) if stream else writing.finish(return_state)

    def save_pretrained(self, folder: str | PathLike):
        """Writes model.safetensors, config.json and, with a tokenizer, tokenizer.json, whole or not at all.

        A folder that holds such a model and nothing else is replaced; any other that is not empty is refused.
        """
        checkpoint.save(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | PathLike, device=None, dtype=None) -> LanguageModel:
        """The model in a folder of `save_pretrained`, a checkpoint, or a run (its newest whole one); in eval mode.

        `dtype` None keeps the stored one. A file that is missing, damaged, foreign or does not fit is a ValueError or
        FileNotFoundError that names it; a UserWarning names the bad checkpoints of a run that were passed over.
        """
        return checkpoint.load(cls, folder, device, dtype)

    def save_state(self, state, path: str | PathLike):
        """Writes a state of `forward` or `generate` to one safetensors file."""
        checkpoint.save_state(self, state, path)

    def load_state(self, path: str | PathLike):
        """The state in a file of `save_state`, on this model's device; that of another architecture is a ValueError."""
        return checkpoint.load_state(self, path)


def _named(batch) -> Mapping:
    """The fields of a batch by name."""
    if isinstance(batch, Mapping):
        return batch
    if isinstance(batch, Tensor):
        return {"input_ids": batch}
    if hasattr(batch, "_asdict"):
        return batch._asdict()
    if isinstance(batch, tuple | list) and len(batch) in (2, 3):
        return dict(zip(("inputs", "targets", "reset"), batch))
    raise TypeError(f"the batch is {type(batch).__name__}, wanted (inputs, targets), a mapping or tokens (B, T)")
