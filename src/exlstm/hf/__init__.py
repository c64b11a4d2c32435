"""Our language model in transformers (5.x, extra `hf`): importing this registers "exlstm" with its Auto classes.

from exlstm import hf
model = hf.ExlstmForCausalLM.from_exlstm(language_model)      # and back: model.to_exlstm()
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from exlstm.hf.cache import ExlstmCache
from exlstm.hf.models import (
    ExlstmConfig,
    ExlstmForCausalLM,
    ExlstmForSequenceClassification,
    ExlstmForTokenClassification,
    ExlstmModel,
)
from exlstm.hf.tokenizer import fast_tokenizer

__all__ = [
    "ExlstmCache",
    "ExlstmConfig",
    "ExlstmForCausalLM",
    "ExlstmForSequenceClassification",
    "ExlstmForTokenClassification",
    "ExlstmModel",
    "fast_tokenizer",
]

AutoConfig.register("exlstm", ExlstmConfig, exist_ok=True)
for auto, model in {
    AutoModel: ExlstmModel,
    AutoModelForCausalLM: ExlstmForCausalLM,
    AutoModelForSequenceClassification: ExlstmForSequenceClassification,
    AutoModelForTokenClassification: ExlstmForTokenClassification,
}.items():
    auto.register(ExlstmConfig, model, exist_ok=True)
