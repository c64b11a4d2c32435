"""Configuration and models in the form of transformers; the networks are ours, weight for weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from inspect import signature

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)

from exlstm.hf.cache import CACHE, ExlstmCache
from exlstm.layers.basic import LayerNorm, RMSNorm, init_linear, soft_cap
from exlstm.models.checkpoint import FORMAT
from exlstm.models.config import LanguageConfig, from_dict
from exlstm.models.language import LanguageModel
from exlstm.models.stack import Stack, make_norm, set_eps

# Later versions of transformers say how many of the tokens have not been read, earlier ones leave it to the model.
COUNTS = "next_sequence_length" in signature(GenerationMixin.prepare_inputs_for_generation).parameters


class ExlstmConfig(PreTrainedConfig):
    """`network` is our LanguageConfig, as such or as plain values; an unknown key in it is a ValueError that names the nearest.

    >>> config = ExlstmConfig(network={"d_model": 64, "n_layers": 2, "vocab_size": 1000})
    """

    model_type = "exlstm"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    def __init__(self, network: LanguageConfig | Mapping | None = None, use_cache: bool = True, **others):
        if others.get("format") == FORMAT:
            told = "ExlstmForCausalLM.from_exlstm(LanguageModel.from_pretrained(...))"
            raise ValueError(f"this config.json is of LanguageModel.save_pretrained, which {told} reads")
        given = asdict(network) if isinstance(network, LanguageConfig) else dict(network or {})
        language = from_dict(LanguageConfig, given)
        # What transformers asks for by these names; the vocabulary and the tie may be changed from outside.
        vocab_size, tied = others.pop("vocab_size", None), others.pop("tie_word_embeddings", None)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            others.pop(name, None)
        super().__init__(**others)
        self.network = asdict(language)
        self.use_cache = use_cache
        self.vocab_size = language.vocab_size if vocab_size is None else vocab_size
        self.tie_word_embeddings = language.tie_embeddings if tied is None else tied
        self.hidden_size, self.num_hidden_layers = language.d_model, language.n_layers
        attends = "attention" in language.layers()
        self.num_attention_heads = (attends and language.attention.n_heads) or language.n_heads

    def language(self) -> LanguageConfig:
        """Our configuration of the network."""
        given = {**self.network, "vocab_size": self.vocab_size, "tie_embeddings": self.tie_word_embeddings}
        return from_dict(LanguageConfig, given)


class ExlstmPreTrainedModel(PreTrainedModel):
    """Names, initialisation and abilities that the models share."""

    config_class = ExlstmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    # No way back to an earlier token: assisted decoding is refused by transformers, which reads this.
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module):
        """The start of what no checkpoint holds, as our own modules have it."""
        if isinstance(module, Stack):
            parts = [part for block in module.blocks for part in (block.norm, block.mixer, block.ffn_norm, block.ffn)]
            held = [_is_loaded(part) for part in parts if part is not None]
            if not any(held):
                module.reset_parameters()
            elif not all(held):
                raise ValueError("the checkpoint holds some blocks of the network and not all of them")
        elif _is_loaded(module):
            return
        elif isinstance(module, nn.Embedding) or module in (getattr(self, name, None) for name in ("head", "score")):
            init_linear(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm | LayerNorm):
            module.reset_parameters()


def _is_loaded(module) -> bool:
    return all(getattr(p, "_is_hf_initialized", False) for p in module.parameters())


class ExlstmModel(ExlstmPreTrainedModel):
    """Embedding, stack and norm: what the head reads (B, T, D)."""

    def __init__(self, config: ExlstmConfig):
        super().__init__(config)
        language = config.language()
        self.embedding = nn.Embedding(language.vocab_size, language.d_model)
        self.stack = Stack(language)
        self.norm = make_norm(language.norm, language)
        set_eps(self.norm, language.norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def set_input_embeddings(self, value):
        self.embedding = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: ExlstmCache | None = None,
        cache: ExlstmCache | None = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        **others,
    ):
        """`attention_mask` (B, T) or (B, tokens before + T): zeros are padding, on any side, and change nothing.

        A document begins where `position_ids` (B, T) are 0, as collators tell that pack several into a row; without them a
        row is one.
        With `output_hidden_states` also what goes into every block, and at the end what comes out of the last norm.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("wanted one of input_ids and inputs_embeds")
        if others.get("output_attentions"):
            raise ValueError("output_attentions are not offered: a recurrent block has none")
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cache is None and use_cache:
            cache = ExlstmCache(self.config.num_hidden_layers)
        states = None if cache is None else _states(cache)
        asked = others.get("output_hidden_states")
        heard = [x] if (getattr(self.config, "output_hidden_states", False) if asked is None else asked) else None
        mask = _mask(attention_mask, x)
        y, states = self.stack(x, states, mask=mask, reset=_reset(position_ids, mask, x, states), between=heard)
        if cache is not None:
            cache.set(states, x.shape[1])
        y = self.norm(y)
        hidden = None if heard is None else (*heard[:-1], y)
        return _told(BaseModelOutputWithPast(last_hidden_state=y, hidden_states=hidden, **{CACHE: cache}), others)


def _asked(others: Mapping) -> dict:
    """What a head hands on to the body."""
    return {name: others.get(name) for name in ("output_hidden_states", "output_attentions")}


def _told(output, others: Mapping):
    """The output in the form that was asked for."""
    return output.to_tuple() if others.get("return_dict") is False else output


def _states(cache):
    if not isinstance(cache, ExlstmCache):
        raise ValueError(f"the cache is a {type(cache).__name__}, wanted an ExlstmCache")
    return cache.states()


def _mask(attention_mask, x):
    """The mask of the tokens of this call, None where all are valid."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[1] < x.shape[1]:
        came, wanted = tuple(attention_mask.shape), (x.shape[0], x.shape[1])
        raise ValueError(f"attention_mask has shape {came}, wanted {wanted}, or as many more tokens as came before")
    mask = attention_mask[:, -x.shape[1] :].bool()
    # A mask costs time, and most have nothing to say.
    return None if not torch.compiler.is_compiling() and mask.all() else mask


def _reset(position_ids, mask, x, states):
    """Where a document begins that is not the first of its row, None where none does."""
    if position_ids is None:
        return None
    if position_ids.ndim != 2 or position_ids.shape[1] != x.shape[1] or len(position_ids) not in (1, len(x)):
        raise ValueError(f"position_ids have shape {tuple(position_ids.shape)}, wanted {tuple(x.shape[:2])}")
    reset = (position_ids == 0).expand(x.shape[:2])
    reset = reset if mask is None else reset & mask
    if states is None:
        reset = torch.cat([torch.zeros_like(reset[:, :1]), reset[:, 1:]], 1)
    return reset if torch.compiler.is_compiling() or reset.any() else None


class ExlstmForCausalLM(ExlstmPreTrainedModel, GenerationMixin):
    """Our language model: logits of the next token."""

    _tied_weights_keys = {"head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: ExlstmConfig):
        super().__init__(config)
        self.model = ExlstmModel(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_exlstm(cls, model: LanguageModel) -> ExlstmForCausalLM:
        """Around the very weights of our model: what is trained here is trained there."""
        tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        with torch.device("meta"):
            wrapped = cls(ExlstmConfig(network=model.config, **tokens))
        inner = wrapped.model
        inner.embedding, inner.stack, inner.norm = model.embedding, model.stack, model.norm
        wrapped.head.weight = model.embedding.weight if model.head is None else model.head.weight
        wrapped.config.dtype = model.embedding.weight.dtype
        return wrapped.train(model.training)

    def to_exlstm(self) -> LanguageModel:
        """Our model around the very weights of this one."""
        language = replace(self.config.language(), vocab_size=self.model.embedding.num_embeddings)
        model = LanguageModel(language, device="meta")
        model.embedding, model.stack, model.norm = self.model.embedding, self.model.stack, self.model.norm
        if model.head is not None:
            model.head = self.head
        return model.train(self.training)

    def get_input_embeddings(self):
        return self.model.embedding

    def set_input_embeddings(self, value):
        self.model.embedding = value

    def get_output_embeddings(self):
        return self.head

    def set_output_embeddings(self, value):
        self.head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: ExlstmCache | None = None,
        cache: ExlstmCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **others,
    ):
        """Soft-capped logits (B, T, V) in float32; `labels` (B, T) are moved by one here, and -100 does not count.

        `others`: `position_ids`, `output_hidden_states` and `return_dict` of the body, and what the loss takes.
        """
        told = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        told |= {"past_key_values": past_key_values, "cache": cache, "use_cache": use_cache}
        inner = self.model(**told, position_ids=others.pop("position_ids", None), **_asked(others))
        others = {name: value for name, value in others.items() if name not in _asked(others)}
        is_dict = others.pop("return_dict", None)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(inner.last_hidden_state[:, kept])
        logits = soft_cap(logits.float() if logits.dtype.itemsize < 4 else logits, self.config.network["logit_cap"])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **others)
        held = {CACHE: inner[CACHE]} if CACHE in inner else {}
        held["hidden_states"] = inner.hidden_states
        return _told(CausalLMOutputWithPast(loss=loss, logits=logits, **held), {"return_dict": is_dict})

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, inputs_embeds=None, **kwargs):
        """The tokens that the cache has not seen."""
        held = kwargs.get(CACHE)
        seen = 0 if held is None else held.get_seq_length()
        told = {"attention_mask": attention_mask, "use_cache": kwargs.get("use_cache"), CACHE: held, **_asked(kwargs)}
        if inputs_embeds is not None and seen == 0:
            return {**told, "inputs_embeds": inputs_embeds}
        if inputs_embeds is not None:
            # Of what was given as vectors no tokens are told.
            seen = max(0, input_ids.shape[1] - 1)
        elif COUNTS:
            # A prompt that is read in pieces comes as pieces, and whatever is not to be read again is counted.
            count = kwargs.get("next_sequence_length")
            return {**told, "input_ids": input_ids if count is None else input_ids[:, -count:]}
        elif attention_mask is not None and attention_mask.shape[1] == seen + input_ids.shape[1]:
            return {**told, "input_ids": input_ids}
        return {**told, "input_ids": input_ids[:, seen:] if seen < input_ids.shape[1] else input_ids[:, -1:]}

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *_, **__):
        """A cache of ours whatever `cache_implementation` says: each has one size from the first token on."""
        if generation_config.use_cache is not False and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = ExlstmCache(self.config.num_hidden_layers)


class ExlstmForSequenceClassification(ExlstmPreTrainedModel):
    """A class, or several, or a number for each row, read from its last valid token."""

    def __init__(self, config: ExlstmConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ExlstmModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embedding

    def set_input_embeddings(self, value):
        self.model.embedding = value

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, **others):
        """Logits (B, num_labels). Without an attention_mask the last token that is not config.pad_token_id is read."""
        pad = getattr(self.config, "pad_token_id", None)
        if attention_mask is None and input_ids is not None and pad is not None:
            attention_mask = (input_ids != pad).long()
        inner = self.model(input_ids, attention_mask, inputs_embeds, use_cache=False, **_asked(others))
        y = inner.last_hidden_state
        last = torch.full((len(y),), y.shape[1] - 1, device=y.device)
        if attention_mask is not None:
            last = (attention_mask * torch.arange(y.shape[1], device=y.device)).amax(1)
        logits = self.score(y[torch.arange(len(y), device=y.device), last]).float()
        loss = None if labels is None else self._loss(logits, labels)
        output = SequenceClassifierOutputWithPast(loss=loss, logits=logits, hidden_states=inner.hidden_states)
        return _told(output, others)

    def _loss(self, logits, labels):
        problem = self.config.problem_type
        if problem is None:
            whole = not labels.is_floating_point()
            problem = "regression" if self.num_labels == 1 else "single" if whole else "multi_label_classification"
        if problem == "regression":
            return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype).view_as(logits.squeeze(-1)))
        if problem == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return F.cross_entropy(logits, labels.view(-1))


class ExlstmForTokenClassification(ExlstmPreTrainedModel):
    """A class for each token; labels of -100 do not count."""

    def __init__(self, config: ExlstmConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ExlstmModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embedding

    def set_input_embeddings(self, value):
        self.model.embedding = value

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, **others):
        """Logits (B, T, num_labels)."""
        where = {"position_ids": others.get("position_ids"), **_asked(others)}
        inner = self.model(input_ids, attention_mask, inputs_embeds, use_cache=False, **where)
        logits = self.score(inner.last_hidden_state).float()
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return _told(TokenClassifierOutput(loss=loss, logits=logits, hidden_states=inner.hidden_states), others)
