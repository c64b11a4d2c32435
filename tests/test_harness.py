"""lm-evaluation-harness: scores equal those of transformers' adapter, on local tasks, with every context read once."""

import json
import time

import pytest
import torch
from torch.nn import functional as F

from exlstm.data.tokenizer import BPE, Bytes
from exlstm.models.config import LanguageConfig
from exlstm.models.language import LanguageModel

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")

import lm_eval  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from exlstm import hf  # noqa: E402
from exlstm.harness import ExlstmLM  # noqa: E402

TEXT = "the cat sat on the mat and the dog sat on the log while the bird sang in the tree. "


def build(kind="bytes", **settings):
    torch.manual_seed(0)
    tokenizer = Bytes() if kind == "bytes" else BPE.fit([TEXT * 5], vocab_size=290)
    settings = {"d_model": 32, "n_layers": 2, "n_heads": 2, "blocks": ("slstm", "mlstm"), **settings}
    model = LanguageModel(LanguageConfig(vocab_size=tokenizer.vocab_size, **settings)).eval()
    model.tokenizer = tokenizer
    with torch.no_grad():
        model.head.weight.normal_(std=0.5)
        # What is likeliest can be read.
        model.head.weight[:32], model.head.weight[126:256] = 0, 0
    return model


def theirs(model):
    """The adapter of lm-eval for transformers, around the same weights."""
    tokenizer = hf.fast_tokenizer(model.tokenizer, eos_token="Ċ", pad_token="Ċ")
    return HFLM(pretrained=hf.ExlstmForCausalLM.from_exlstm(model), tokenizer=tokenizer, batch_size=8, max_length=2048)


def requests(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


PAIRS = [
    ("the cat sat on", " the mat"),
    ("the cat sat on", " the log"),
    ("the cat sat on", " a"),
    ("the dog ", "sat on the log, and on it"),
    ("", "the bird"),
    ("naïve ☃", " é"),
    ("the bird sang", " in the tree" * 9),
]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_scores_are_those_of_hflm(kind):
    model = build(kind)
    ours, other = ExlstmLM(model), theirs(model)
    asked = requests("loglikelihood", PAIRS)
    for (score, greedy), (wanted, wanted_greedy) in zip(
        ours.loglikelihood(asked), other.loglikelihood(asked), strict=True
    ):
        assert score == pytest.approx(wanted, rel=1e-5) and greedy == wanted_greedy
    texts = requests("loglikelihood_rolling", [(TEXT,), ("x",), (TEXT * 7,), ("",)])
    found = ours.loglikelihood_rolling(texts)
    assert found == pytest.approx([*other.loglikelihood_rolling(texts[:3]), 0.0], rel=1e-5)
    spaces, empty = ours.loglikelihood(requests("loglikelihood", [("  ", "x"), ("", "  x")]))
    assert spaces == empty
    small = ExlstmLM(model, batch_size=16).loglikelihood(asked)
    assert [s for s, _ in small] == pytest.approx([s for s, _ in ours.loglikelihood(asked)], rel=1e-5)


def test_what_is_greedy_is_told():
    model = build()
    written = model.generate("the cat", 4, temperature=0)
    ((_, greedy), (_, other)) = ExlstmLM(model).loglikelihood(
        requests("loglikelihood", [("the cat", written), ("the cat", written[:-1] + chr(ord(written[-1]) ^ 1))])
    )
    assert greedy and not other


def test_a_long_text_has_no_window():
    """As one forward over all of it, where a window would have cut it."""
    model, text = build(), TEXT * 60
    (found,) = ExlstmLM(model).loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
    tokens = torch.tensor([[10, *text.encode()]])
    with torch.no_grad():
        logits, _ = model(tokens[:, :-1])
    assert found == pytest.approx(-F.cross_entropy(logits[0].double(), tokens[0, 1:], reduction="sum").item(), rel=1e-5)


def test_writing_stops_where_it_is_told():
    model = build("bpe")
    free = model.generate("the cat", 40, temperature=0)
    stop = free[5:7]
    asked = requests("generate_until", [("the cat", {"until": [stop], "max_gen_toks": 40}), ("a", {"until": stop})])
    ours, other = ExlstmLM(model).generate_until(asked), theirs(model).generate_until(asked[:1])
    assert ours[0] == free[: free.index(stop)] == other[0]
    assert len(ExlstmLM(model).generate_until(requests("generate_until", [("", {"max_gen_toks": 3})]))) == 1
    with pytest.raises(ValueError, match="num_beams, which"):
        ExlstmLM(model).generate_until(requests("generate_until", [("a", {"num_beams": 3})]))


CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A local task of multiple choice, without a network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    draw = torch.Generator().manual_seed(0)
    words = TEXT.split()
    rows = []
    for _ in range(12):
        picks = [words[i] for i in torch.randint(len(words), (40,), generator=draw)]
        choices = [" " + " ".join(picks[30 + 2 * i : 32 + 2 * i]) for i in range(4)]
        rows.append({"question": " ".join(picks[:30]), "choices": choices, "label": int(picks[0] == "the")})
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "choose.yaml").write_text(CHOICE.format(name="choose", data=data))
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def evaluated(lm, manager):
    found = lm_eval.simple_evaluate(model=lm, tasks=["choose"], task_manager=manager, bootstrap_iters=0)
    return {name: value for name, value in found["results"]["choose"].items() if name.startswith("acc")}


def test_a_local_task_gives_the_same(task, tmp_path):
    model = build()
    assert evaluated(ExlstmLM(model), task) == evaluated(theirs(model), task)
    model.save_pretrained(tmp_path / "model")
    found = lm_eval.simple_evaluate(
        model="exlstm",
        model_args=f"pretrained={tmp_path / 'model'}",
        tasks=["choose"],
        task_manager=task,
        bootstrap_iters=0,
    )
    assert found["results"]["choose"]["acc,none"] == evaluated(ExlstmLM(model), task)["acc,none"]


def test_a_context_is_read_once_and_that_is_faster():
    """Four choices behind one context of 400 bytes: the tokens that are read, and the time beside HFLM's."""
    model = build(d_model=64)
    asked = requests(
        "loglikelihood", [((TEXT * 5)[i : i + 400], f" {c} is chosen") for i in range(8) for c in range(4)]
    )
    read, hidden = [], model.hidden

    def counting(tokens, *rest, **more):
        read.append(tokens.numel())
        return hidden(tokens, *rest, **more)

    model.hidden = counting
    ExlstmLM(model).loglikelihood(asked)
    assert sum(read) <= 8 * 400 + 32 * 12
    del model.hidden
    times = {}
    for name, lm in {"ours": ExlstmLM(model), "HFLM": theirs(model)}.items():
        lm.loglikelihood(asked)
        start = time.perf_counter()
        lm.loglikelihood(asked)
        times[name] = time.perf_counter() - start
    print(times)
    assert times["ours"] < times["HFLM"]


def test_a_model_without_a_tokenizer_cannot_read():
    model = build()
    model.tokenizer = None
    with pytest.raises(ValueError, match="the model has no tokenizer"):
        ExlstmLM(model)
    with pytest.raises(ValueError, match="batch_size is 0"):
        ExlstmLM(build(), batch_size=0)
