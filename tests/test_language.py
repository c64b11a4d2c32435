"""The language model: logits, losses and writing on from a prompt, over every kind of block."""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exlstm.data.tokenizer import Bytes, Characters
from exlstm.export import export
from exlstm.models.config import OPTIONS, LanguageConfig, SLSTMOptions
from exlstm.models.engine import Engine
from exlstm.models.language import LanguageModel
from exlstm.models.reading import PIECE, GenerationState
from exlstm.models.sampling import Sampling, Uniform
from exlstm.models.sequence import Request
from exlstm.models.stack import BLOCKS

VOCABULARY = 61
KINDS = [(kind,) for kind in BLOCKS] + [("mlstm", "slstm")]
each_kind = pytest.mark.parametrize("blocks", KINDS, ids="+".join)


def build(blocks=("mlstm", "slstm"), seed=0, **settings):
    """A tiny model whose logits are far from flat."""
    torch.manual_seed(seed)
    # A window that every law leaves.
    window = OPTIONS["mlstm_window"](window=6, sinks=2)
    settings = {
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 2,
        "vocab_size": VOCABULARY,
        "mlstm_window": window,
        **settings,
    }
    model = LanguageModel(LanguageConfig(blocks=blocks, **settings)).eval()
    with torch.no_grad():
        (model.embedding if model.head is None else model.head).weight.normal_(std=0.5)
        model.embedding.weight.normal_(std=1)
    return model


def writer(blocks=("mlstm", "slstm"), **settings):
    """One that reads and writes text, in bytes that are ASCII letters most of the time."""
    model = build(blocks, vocab_size=256, **settings)
    model.tokenizer = Bytes()
    with torch.no_grad():
        model.head.weight[:97] -= 2 * model.head.weight[:97]
    return model


def tokens_of(*shape, seed=0, size=VOCABULARY):
    return torch.randint(size, shape, generator=torch.Generator().manual_seed(seed))


# Forward and loss


@each_kind
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_fresh_model_knows_nothing(blocks, tied):
    torch.manual_seed(0)
    model = LanguageModel(LanguageConfig(d_model=64, n_layers=3, blocks=blocks, vocab_size=256, tie_embeddings=tied))
    loss = model.loss(tokens_of(4, 33, size=256))
    # Logits of size 0.63 cost 0.2 nats.
    assert abs(loss.item() - math.log(256)) < 0.4
    assert (model.head is None) == tied


@each_kind
def test_splitting_anywhere_and_single_steps_change_nothing(blocks):
    model, tokens = build(blocks), tokens_of(2, 12)
    with torch.no_grad():
        whole, _ = model(tokens)
        first, state = model(tokens[:, :5])
        parts = [first]
        for t in range(5, 12):
            logits, state = model(tokens[:, t : t + 1], state)
            parts.append(logits)
    assert whole.dtype == torch.float32 and whole.shape == (2, 12, VOCABULARY)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


@each_kind
def test_lengths_mask_and_reset_reach_every_block(blocks):
    model, tokens = build(blocks), tokens_of(2, 9)
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[:, 4] = True
    with torch.no_grad():
        whole, _ = model(tokens)
        padded, _ = model(F.pad(tokens, (0, 5), value=3), lengths=torch.tensor([9, 6]))
        late, _ = model(tokens[:, 4:])
        again, _ = model(tokens, reset=reset)
    torch.testing.assert_close(padded[0, :9], whole[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded[1, :6], whole[1, :6], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again[:, 4:], late, atol=1e-5, rtol=1e-5)


def test_logits_are_capped_in_float32():
    model = build(logit_cap=2.0).bfloat16()
    model.head.weight.data.mul_(100)
    logits, _ = model(tokens_of(2, 6))
    assert logits.dtype == torch.float32
    assert 1.9 < logits.abs().max() <= 2
    assert build(logit_cap=0.0)(tokens_of(2, 6))[0].abs().max() > 2


@each_kind
def test_autocast_changes_the_precision_alone(blocks):
    model, tokens = build(blocks), tokens_of(2, 12)
    exact = model.loss(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = model(tokens)
        loss = model.loss(tokens)
        assert len(model.generate([1, 2], 5, temperature=0)) == 5
    assert logits.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


class Batch(NamedTuple):
    inputs: Tensor
    targets: Tensor
    reset: Tensor | None = None
    lengths: Tensor | None = None


def plain_loss(model, inputs, targets, **where):
    logits, _ = model(inputs, **where)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def test_every_form_of_a_batch_is_the_same_loss():
    model, tokens = build(), tokens_of(3, 10)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    shifted = F.pad(targets, (0, 1), value=-100)
    expected = plain_loss(model, inputs, targets)
    forms = [
        tokens,
        (inputs, targets),
        [inputs, targets, None],
        Batch(inputs, targets),
        {"inputs": inputs, "targets": targets},
        {"inputs": tokens, "targets": shifted},
        {"input_ids": tokens},
        {"input_ids": tokens, "labels": tokens},
        (inputs.int(), targets.to(torch.uint8)),
    ]
    for form in forms:
        torch.testing.assert_close(model.loss(form), expected)


def test_padding_resets_and_ignored_targets():
    model, inputs, targets = build(), tokens_of(2, 8), tokens_of(2, 8, seed=1)
    lengths, reset = torch.tensor([8, 5]), torch.zeros(2, 8, dtype=torch.bool)
    mask, reset[0, 3] = torch.arange(8) < lengths[:, None], True
    ignored = targets.masked_fill(~mask, -100)
    expected = plain_loss(model, inputs, ignored, lengths=lengths)
    for form in (
        Batch(inputs, targets, None, lengths),
        {"inputs": inputs, "targets": targets, "mask": mask},
        {"inputs": inputs, "targets": targets, "attention_mask": mask.long()},
        (inputs, ignored),
    ):
        torch.testing.assert_close(model.loss(form), expected)
    torch.testing.assert_close(model.loss((inputs, targets, reset)), plain_loss(model, inputs, targets, reset=reset))
    left = {"input_ids": inputs, "labels": inputs, "attention_mask": mask.flip(1).long()}
    alone = 7 * model.loss(inputs[:1]) + 4 * model.loss(inputs[1:, 3:])
    torch.testing.assert_close(model.loss(left), alone / 11)


def test_a_head_of_somebody_is_asked():
    """As a LoRA adapter in its place is: in logits, in losses with ignored targets, in what is written."""
    model, plain, tokens = build(), build(), tokens_of(3, 9)
    targets = tokens.roll(-1, 1).masked_fill(flags := tokens % 3 == 0, -100)
    beside = torch.nn.Linear(32, VOCABULARY, bias=False)
    model.head = torch.nn.ModuleList([model.head, beside])
    model.head.forward = lambda x: model.head[0](x) + beside(x)
    model.head.weight = model.head[0].weight
    with torch.no_grad():
        plain.head.weight += beside.weight
    torch.testing.assert_close(model(tokens)[0], plain(tokens)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.loss((tokens, targets)), plain.loss((tokens, targets)))
    losses = model.token_losses((tokens, targets))
    torch.testing.assert_close(losses, plain.token_losses((tokens, targets)))
    assert (losses[flags] == 0).all() and model.loss((tokens, targets.fill_(-100))) == 0
    assert model.generate([1, 2], 9, temperature=0) == plain.generate([1, 2], 9, temperature=0)
    model.loss(tokens).backward()
    assert beside.weight.grad.abs().sum() > 0


def read(model, x, state):
    model(x)


def learn(model, x, state):
    model.loss(x).backward()


def read_on(model, x, state):
    with torch.no_grad():
        model(x[:, :1], state)


def write(model, x, state):
    model.generate([1], 2, state=model.eval()(x[:1])[1], temperature=0)


@pytest.mark.parametrize("call", (read, learn, read_on, write), ids=lambda call: call.__name__)
@each_kind
def test_a_forward_of_somebody_is_called(blocks, call):
    """As libraries give a module that fetch its weights, which are nowhere before."""
    model = build(blocks, out_norm="rms", slstm=SLSTMOptions(conv=4))
    x, heard = tokens_of(2, 5), []
    _, state = model(x)
    parts = {name: module for name, module in model.named_modules() if name and not isinstance(module, nn.ModuleList)}
    for name, module in parts.items():

        def told(*args, name=name, forward=module.forward, **kwargs):
            heard.append(name)
            return forward(*args, **kwargs)

        module.forward = told
    call(model, x, state)
    assert set(parts) == {*heard}


@pytest.mark.parametrize("call", (read, learn, read_on, write), ids=lambda call: call.__name__)
@each_kind
def test_whoever_listens_to_a_module_hears_every_call(blocks, call):
    """A hook is called, and what it returns is what counts: no shortcut passes a module by."""
    model = build(blocks, out_norm="rms", slstm=SLSTMOptions(conv=4))
    x, heard = tokens_of(2, 5), []
    _, state = model(x)
    for name, module in model.named_modules():
        if name and not isinstance(module, nn.ModuleList):
            module.register_forward_hook(lambda *_, name=name: heard.append(name))
    call(model, x, state)
    wanted = {name for name, module in model.named_modules() if name and not isinstance(module, nn.ModuleList)}
    assert wanted == {*heard}


def test_losses_by_position():
    model, inputs, targets = build(), tokens_of(2, 8), tokens_of(2, 8, seed=1)
    targets[0, 2] = -100
    losses = model.token_losses((inputs, targets))
    assert losses.shape == (2, 8) and not losses.requires_grad and losses[0, 2] == 0
    torch.testing.assert_close(losses.sum() / 15, model.loss((inputs, targets)).detach())
    log_p = model(inputs)[0].log_softmax(-1)[:, :-1].gather(-1, inputs[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(-model.token_losses(inputs), torch.nn.functional.pad(log_p.detach(), (0, 1)))


@each_kind
def test_gradients_reach_every_parameter(blocks):
    model = build(blocks).train()
    model.loss(tokens_of(2, 12)).backward()
    plain = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in plain.values())
    assert model.gradient_checkpointing is False
    model.zero_grad()
    model.gradient_checkpointing = True
    assert model.stack.gradient_checkpointing is True
    model.loss(tokens_of(2, 12)).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], msg=name)


def test_the_loss_compiles_whole():
    model = build(("mlstm", "slstm"))
    batch = Batch(tokens_of(2, 8), tokens_of(2, 8, seed=1))
    compiled = torch.compile(model.loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch), model.loss(batch))


def test_number_of_parameters():
    model, tied = build(), build(tie_embeddings=True)
    embedding = VOCABULARY * 32
    assert model.n_parameters() == sum(p.numel() for p in model.parameters())
    assert model.n_parameters() - tied.n_parameters() == embedding
    assert model.n_parameters() - model.n_parameters(embedding=False) == embedding
    assert tied.n_parameters() - tied.n_parameters(embedding=False) == embedding


def test_start_is_a_function_of_the_seed():
    torch.manual_seed(0)
    model = LanguageModel(LanguageConfig(d_model=32, n_layers=2, n_heads=2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    model.reset_parameters()
    std = {name: value.std() for name, value in model.state_dict().items() if value.numel() > 1000}
    for name, value in std.items():
        assert not torch.equal(model.state_dict()[name], before[name]), name
        torch.testing.assert_close(value, before[name].std(), rtol=0.15, atol=0)


WRONG_TOKENS = {
    "float": (lambda t: t.float(), TypeError, "torch.float32, wanted whole numbers"),
    "bool": (lambda t: t > 3, TypeError, "torch.bool"),
    "rank": (lambda t: t[0], ValueError, r"shape \(6,\), wanted \(B, T\)"),
    "no tokens": (lambda t: t[:, :0], ValueError, r"shape \(2, 0\)"),
    "no rows": (lambda t: t[:0], ValueError, r"shape \(0, 6\)"),
    "too large": (lambda t: t + VOCABULARY, ValueError, f"wanted 0 to {VOCABULARY - 1}"),
    "negative": (lambda t: t - VOCABULARY, ValueError, f"wanted 0 to {VOCABULARY - 1}"),
    "a list": (lambda t: t.tolist(), TypeError, "list, wanted a tensor"),
}


@pytest.mark.parametrize("case", WRONG_TOKENS)
def test_wrong_tokens_are_one_sentence(case):
    spoil, error, told = WRONG_TOKENS[case]
    with pytest.raises(error, match=told) as raised:
        build()(spoil(tokens_of(2, 6)))
    assert "\n" not in str(raised.value)


def test_wrong_batches_and_states_are_one_sentence():
    model, tokens = build(), tokens_of(2, 6)
    with pytest.raises(ValueError, match="2 blocks"):
        model(tokens, (None,))
    with pytest.raises(ValueError, match=r"wanted a tensor of \(2, 6\)"):
        model.loss((tokens, tokens[:, 1:]))
    with pytest.raises(ValueError, match="-1"):
        model.loss((tokens, tokens - tokens - 1))
    with pytest.raises(ValueError, match="did you mean 'targets'"):
        model.loss({"inputs": tokens, "target": tokens})
    with pytest.raises(ValueError, match="wanted inputs and targets"):
        model.loss({"targets": tokens})
    with pytest.raises(ValueError, match="nothing to predict"):
        model.loss(tokens[:, :1])
    with pytest.raises(TypeError, match="the batch is int"):
        model.loss(3)


# Choosing


def draws(rules, logits, count=4000):
    """How often each token is chosen."""
    rows = torch.tensor(logits).expand(count, -1)
    chosen = rules.choose(rows, None, lambda: torch.linspace(0, 1, count + 1)[:-1, None])
    return torch.bincount(chosen, minlength=len(logits)) / count


LOGITS = [0.0, 2.0, 1.0, -1.0, 1.5]
CUTS = {
    "all": ({}, [0, 1, 2, 3, 4]),
    "top k": ({"top_k": 3}, [1, 4, 2]),
    "top k beyond the vocabulary": ({"top_k": 99}, [0, 1, 2, 3, 4]),
    "top p": ({"top_p": 0.6}, [1, 4]),
    "top p, the first alone": ({"top_p": 1e-9}, [1]),
    "min p": ({"min_p": 0.3}, [1, 4, 2]),
    "top k and top p": ({"top_k": 3, "top_p": 0.6}, [1, 4]),
    "hot": ({"temperature": 1e9}, [0, 1, 2, 3, 4]),
    "cold": ({"temperature": 1e-40}, [1]),
}


@pytest.mark.parametrize("case", CUTS)
def test_tokens_are_drawn_as_often_as_they_are_likely(case):
    settings, left = CUTS[case]
    rules = Sampling(**settings)
    logits = torch.full((5,), float("-inf"))
    logits[left] = torch.tensor(LOGITS)[left]
    temperature = max(settings.get("temperature", 1.0), 1e-6)
    torch.testing.assert_close(draws(rules, LOGITS), (logits / temperature).softmax(0), atol=1e-3, rtol=0)


def test_greedy_and_penalty():
    logits = torch.tensor([[1.0, 2.0, -1.0, 1.9]])
    assert Sampling(temperature=0).choose(logits, None, None).tolist() == [1]
    assert Sampling(top_k=1).choose(logits, None, None).tolist() == [1]
    seen = torch.tensor([[False, True, True, False]])
    assert Sampling(temperature=0, repetition_penalty=1.1).choose(logits, seen, None).tolist() == [3]
    # A penalty pushes a negative logit further down, never up.
    lower = Sampling(temperature=0, repetition_penalty=1.5).choose(torch.tensor([[-1.2, -9.0, -1.0, -9.0]]), seen, None)
    assert lower.tolist() == [0]


def test_a_token_without_probability_is_never_drawn():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]])
    for u in (0.0, 0.5, 1 - 2**-24, 1.0):
        for settings in ({}, {"top_k": 4}, {"top_p": 0.99}, {"min_p": 0.1}):
            token = Sampling(**settings).choose(logits, None, lambda u=u: torch.tensor([[u]]))
            assert token.item() in (1, 3)


def test_random_numbers_depend_on_seed_row_and_place_alone():
    three = Uniform(7, [0, 0, 0])
    long = torch.cat([three() for _ in range(200)], 1)  # (3, 200)
    assert long.min() >= 0 and long.max() < 1 and abs(long.mean() - 0.5) < 0.05
    alone = Uniform(7, [0])
    assert torch.equal(torch.cat([alone() for _ in range(200)], 1), long[:1])
    late = Uniform(7, [130, 63, 64])
    numbers = torch.cat([late() for _ in range(5)], 1)
    for row, start in enumerate((130, 63, 64)):
        assert torch.equal(numbers[row], long[row, start : start + 5])
    assert not torch.equal(Uniform(8, [0])(), long[:1, :1])


# Writing on


def by_hand(model, prompt, count):
    """Greedy tokens from the whole text at once, every time."""
    tokens = torch.tensor([prompt])
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens)[0][:, -1:].argmax(-1)], 1)
    return tokens[0, len(prompt) :].tolist()


PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3], [50, 2, 44, 1]]


@each_kind
def test_unequal_prompts_in_one_batch_give_what_each_gives_alone(blocks):
    model = build(blocks)
    with torch.no_grad():
        alone = [by_hand(model, prompt, 8) for prompt in PROMPTS]
    assert len({tuple(row) for row in alone}) == 3
    together, state = model.generate(PROMPTS, 8, temperature=0, return_state=True)
    assert together == alone
    for i, prompt in enumerate(PROMPTS):
        tokens, one = model.generate(prompt, 8, temperature=0, return_state=True)
        assert tokens == alone[i]
        torch.testing.assert_close(one.logits[0], state.logits[i], atol=1e-5, rtol=1e-5)


@each_kind
def test_the_first_row_draws_what_it_draws_alone(blocks):
    model, settings = build(blocks), {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 3}
    together = model.generate(PROMPTS, 12, **settings)
    assert together[0] == model.generate(PROMPTS[0], 12, **settings)
    assert together == model.generate(PROMPTS, 12, **settings)
    assert together != model.generate(PROMPTS, 12, **{**settings, "seed": 4})
    assert [row[:5] for row in together] == model.generate(PROMPTS, 5, **settings)
    same = model.generate([[1, 2]] * 3, 12, seed=0)
    assert len({tuple(row) for row in same}) == 3


def test_without_a_seed_torch_decides():
    model = build()
    before = torch.get_rng_state()
    model.generate([1], 5, temperature=0)
    model.generate([1], 5, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(0)
    first = model.generate([1], 20)
    second = model.generate([1], 20)
    torch.manual_seed(0)
    assert model.generate([1], 20) == first != second


CONTINUED = {
    "greedy": {"temperature": 0},
    "sampled": {"seed": 5, "temperature": 1.1, "top_k": 20},
    "penalised": {"seed": 5, "repetition_penalty": 1.5},
}


@each_kind
@pytest.mark.parametrize("case", CONTINUED)
def test_a_state_continues_as_one_long_run(blocks, case):
    model, settings = build(blocks), CONTINUED[case]
    whole = model.generate(PROMPTS, 20, **settings)
    first, state = model.generate(PROMPTS, 9, return_state=True, **settings)
    second, state = model.generate([[], [], []], 1, state=state, return_state=True, **settings)
    third = model.generate([[], [], []], 10, state=state, **settings)
    assert [a + b + c for a, b, c in zip(first, second, third, strict=True)] == whole


@each_kind
def test_a_next_prompt_follows_the_state(blocks):
    model = build(blocks)
    first, state = model.generate(PROMPTS, 5, temperature=0, return_state=True)
    more = [[7, 7], [], [1, 2, 3]]
    texts = [a + b + c for a, b, c in zip(PROMPTS, first, more, strict=True)]
    assert model.generate(more, 6, temperature=0, state=state) == model.generate(texts, 6, temperature=0)
    # The same state feeds forward, and a state of forward feeds generate.
    logits, layers = model(torch.tensor([[4, 9]] * 3), state)
    written = model.generate([[4, 9]] * 3, 4, temperature=0, state=state)
    assert [row[0] for row in written] == logits[:, -1].argmax(-1).tolist()
    assert model.generate([row[:1] for row in written], 3, temperature=0, state=layers) == [row[1:] for row in written]


@each_kind
def test_the_state_stands_after_the_result_wherever_rows_end(blocks):
    model = build(blocks)
    free = model.generate(PROMPTS, 12, temperature=0)
    eos = [free[0][4], free[1][7]]
    ended, state = model.generate(PROMPTS, 12, temperature=0, eos=eos, return_state=True)
    for row, full in zip(ended, free, strict=True):
        place = min([full.index(t) for t in eos if t in full], default=12)
        assert row == full[:place]
    assert len({len(row) for row in ended}) > 1
    texts = [a + b for a, b in zip(PROMPTS, ended, strict=True)]
    _, fresh = model.generate(texts, 0, return_state=True)
    torch.testing.assert_close(state.logits, fresh.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(state.seen, fresh.seen)
    assert state.drawn.tolist() == [len(row) for row in ended]


def test_a_state_is_a_value():
    model = build(("attention", "mlstm"))
    _, state = model.generate([1, 2, 3], 4, temperature=0, return_state=True)
    before = [state.logits.clone(), state.seen.clone(), state.drawn.clone()]
    first = model.generate([], 6, temperature=0.9, seed=1, repetition_penalty=2.0, state=state)
    assert model.generate([], 6, temperature=0.9, seed=1, repetition_penalty=2.0, state=state) == first
    for a, b in zip(before, (state.logits, state.seen, state.drawn), strict=True):
        assert torch.equal(a, b)
    model.loss(tokens_of(1, 4)).backward()
    logits, _ = model(tokens_of(1, 3), state)
    logits.sum().backward()


def test_long_prompts_are_read_in_pieces(monkeypatch):
    model, prompts = build(), [tokens_of(n, seed=n).tolist() for n in (50, 7, 33)]
    whole = model.generate(prompts, 4, temperature=0, return_state=True)
    monkeypatch.setattr("exlstm.models.reading.PIECE", 16)
    pieces = model.generate(prompts, 4, temperature=0, return_state=True)
    assert pieces[0] == whole[0]
    torch.testing.assert_close(pieces[1].logits, whole[1].logits, atol=1e-5, rtol=1e-5)
    assert PIECE > 16


def test_the_result_has_the_form_of_the_prompt():
    model = writer()
    settings = {"max_tokens": 6, "temperature": 0}
    text = model.generate("ab", **settings)
    tokens = model.generate([97, 98], **settings)
    assert isinstance(text, str) and text == model.tokenizer.decode(tokens)
    assert model.generate(["ab", "ab"], **settings) == [text, text]
    assert model.generate(("ab",), **settings) == [text]
    assert model.generate([[97, 98]], **settings) == [tokens]
    assert model.generate((97, 98), **settings) == tokens
    assert torch.equal(model.generate(torch.tensor([97, 98]), **settings), torch.tensor(tokens))
    rows = model.generate(torch.tensor([[97, 98], [97, 98]], dtype=torch.int32), **settings)
    assert torch.equal(rows, torch.tensor([tokens, tokens]))
    place = tokens.index(tokens[2])
    ended = model.generate(torch.tensor([[97, 98], [65, 66]]), eos=tokens[2], **settings)
    assert ended[0, :place].tolist() == tokens[:place] and set(ended[0, place:].tolist()) <= {-100}
    assert model.generate("ab", 0) == "" and model.generate([97], 0) == []
    assert model.generate(torch.tensor([[97], [98]]), 0).shape == (2, 0)


def test_dropout_reaches_the_embedding_in_training_alone():
    model, seen = build(dropout=0.5).train(), []
    model.stack.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tokens = torch.arange(60).view(1, 60)
    model(tokens), model.eval()(tokens)
    trained, evaluated = seen
    kept = trained != 0
    assert 0.4 < kept.float().mean() < 0.6 and torch.equal(evaluated, model.embedding(tokens))
    torch.testing.assert_close(trained[kept], 2 * evaluated[kept])


def test_training_and_gradients_are_left_as_they_were():
    model = build(dropout=0.5).train()
    model.stack.blocks[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    first = model.generate([1, 2, 3], 8, temperature=0)
    stream = model.generate([1, 2, 3], 8, temperature=0, stream=True)
    assert next(stream) == first[0]
    assert {name: module.training for name, module in model.named_modules()} == before and torch.is_grad_enabled()
    assert [first[0], *stream] == first == model.eval().generate([1, 2, 3], 8, temperature=0)
    with torch.inference_mode():
        assert model.generate([1, 2, 3], 8, temperature=0) == first


@torch.no_grad()
def test_nobody_sees_the_modes_change_while_a_model_writes(tmp_path):
    """Modes are the model's own all the while: others may train it, or write with it, in other threads."""
    model = build(dropout=0.5).train()
    seen = []
    model.stack.register_forward_hook(lambda *_: seen.extend(module.training for module in model.modules()))
    wanted = model.generate([1, 2, 3], 8, temperature=0)
    assert list(model.generate([1, 2, 3], 8, temperature=0, stream=True)) == wanted
    engine = Engine(model, slots=2)
    (one,) = engine.admit(Request([1, 2, 3], 8, temperature=0))
    for _ in engine.run():
        pass
    assert one.tokens == wanted
    export(model, tmp_path / "out", "pt2")
    assert all(seen) and len(seen) > 10 and all(module.training for module in model.modules())
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: model.generate([1, 2, 3], 8, temperature=0), range(12)))
    assert found == [wanted] * 12
    stream = model.eval().generate([1, 2, 3], 8, temperature=0, stream=True)
    begun = next(stream)
    model.train()
    assert [begun, *stream] == wanted


def test_a_compiled_part_writes_in_eval_mode_too():
    model = build(dropout=0.5).train()
    wanted = model.generate([1, 2, 3], 5, temperature=0)
    model.stack.blocks[0].compile(backend="aot_eager")
    assert model.generate([1, 2, 3], 5, temperature=0) == wanted
    model.stack = torch.compile(model.stack, backend="aot_eager")
    assert model.generate([1, 2, 3], 5, temperature=0) == wanted


# Stops and streams


def planted(text, vocabulary=None):
    """A model that writes `text` after anything, then '.', whatever its weights: its logits come from the list."""
    model = build(vocab_size=256)
    model.tokenizer = vocabulary or Bytes()
    tokens = model.tokenizer.encode(text)
    hidden, logits, place = model.hidden, model.logits, [0]

    def counted(x, state=None, **where):
        place[0] = 0 if state is None else place[0] + x.shape[1]
        return hidden(x, state, **where)

    def told(x):
        token = tokens[place[0]] if place[0] < len(tokens) else model.tokenizer.encode(".")[0]
        return logits(x) * 0 + 50 * F.one_hot(torch.tensor(token), 256)

    model.hidden, model.logits = counted, told
    return model


STOPS = {
    "at once": ("hello world", " ", "hello"),
    "a longer one": ("hello world", "o wo", "hell"),
    "the first to be complete": ("hello world", ["world", "lo"], "hel"),
    "the longest of those": ("hello world", ["o", "llo"], "he"),
    "one that begins and fails": ("ababac", "abac", "ab"),
    "none": ("hello", ["x", "hellx"], "hello......."),
    "not at the end": ("hello", "o.........", "hello......."),
    "beginning": ("hello", "hel", ""),
    "beyond ASCII": ("naïve – café", "é", "naïve – caf"),
    "inside of characters": ("日本語", "本", "日"),
    "tokens": ("hello", [[108, 108]], "he"),
    "one sequence": ("hello", [108, 111], "hel"),
    "sequences, the longest": ("hello", [[108], [101, 108]], "h"),
    "tokens and text": ("hello", [[111], "lo"], "hel"),
    "tokens of half a character": ("aéb", [[0xA9]], "a\N{REPLACEMENT CHARACTER}"),
}


@pytest.mark.parametrize("case", STOPS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_stops_end_the_text_and_are_no_part_of_it(case, stream):
    text, stop, expected = STOPS[case]
    count = max(12, len(text.encode()) + 1)
    result = planted(text).generate("?", count if expected[-1:] != "." else 12, temperature=0, stop=stop, stream=stream)
    pieces = list(result) if stream else [result]
    assert "".join(pieces) == expected
    assert not stream or all(pieces)


@pytest.mark.parametrize("case", STOPS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_stops_end_tokens_too(case, stream):
    text, stop, expected = STOPS[case]
    count = max(12, len(text.encode()) + 1)
    model = planted(text)
    tokens = list(model.generate([63], count if expected[-1:] != "." else 12, temperature=0, stop=stop, stream=stream))
    assert model.tokenizer.decode(tokens) == expected


def test_tokens_of_several_letters():
    words = Bytes()
    for token, piece in enumerate((b"hel", b"lo w", b"orld", "é!".encode()[:1], "é!".encode()[1:]), 1):
        words.pieces[token] = piece
    words.encode = {"hello world": [1, 2, 3], "é!": [4, 5], ".": [46], "?": [63]}.get
    model = planted("hello world", words)
    for stop, text, tokens in (("o w", "hell", [1]), ("ello", "h", []), ("orld", "hello w", [1, 2]), ("l", "he", [])):
        assert model.generate("?", 3, temperature=0, stop=stop) == text
        assert "".join(model.generate("?", 3, temperature=0, stop=stop, stream=True)) == text
        assert model.generate([63], 3, temperature=0, stop=stop) == tokens
        assert list(model.generate([63], 3, temperature=0, stop=stop, stream=True)) == tokens
    model = planted("é!", words)
    for stop, text, tokens in (("!", "é", []), ("é", "", []), ("x", "é!.", [4, 5, 46])):
        assert model.generate("?", 3, temperature=0, stop=stop) == text
        assert "".join(model.generate("?", 3, temperature=0, stop=stop, stream=True)) == text
        assert model.generate([63], 3, temperature=0, stop=stop) == tokens
        assert list(model.generate([63], 3, temperature=0, stop=stop, stream=True)) == tokens


def test_pieces_of_a_stream_are_whole_characters_and_come_at_once():
    stream = planted("naïve").generate("?", 6, temperature=0, stream=True)
    assert [next(stream) for _ in range(3)] == ["n", "a", "ï"]
    assert list(stream) == ["v", "e"]
    held = planted("abcabd").generate("?", 6, temperature=0, stream=True, stop="abd")
    assert list(held) == ["abc"] or "".join(held) == "abc"


def test_a_stream_is_the_whole_in_pieces():
    model = writer()
    settings = {"max_tokens": 40, "seed": 2, "temperature": 1.5}
    for extra in ({}, {"stop": ["a", "zz", [120, 120]]}, {"eos": [110, 111]}, {"stop": "\N{REPLACEMENT CHARACTER}x"}):
        text, state = model.generate("ab", return_state=True, **extra, **settings)
        stream = model.generate("ab", stream=True, return_state=True, **extra, **settings)
        assert "".join(stream) == text
        torch.testing.assert_close(stream.state.logits, state.logits)
        tokens = model.generate([97, 98], **extra, **settings)
        assert list(model.generate([97, 98], stream=True, **extra, **settings)) == tokens
        if "stop" not in extra:
            assert model.tokenizer.decode(tokens) == text
    assert model.generate("ab", stream=True, **settings).state is None


def test_rows_stop_by_themselves():
    model = writer()
    prompts = ["ab", "q", "hello there"]
    free = model.generate(prompts, 30, seed=1)
    stop = free[0][5:7]
    stopped = model.generate(prompts, 30, seed=1, stop=stop)
    assert stopped == [text.split(stop)[0] for text in free]
    assert len(stopped[0]) <= 5


def test_tokens_the_tokenizer_does_not_know_are_not_written():
    model = build(vocab_size=8)
    model.tokenizer = Characters("abc")
    assert set(model.generate("ab", 50, seed=0)) <= set("abc")
    assert max(model.generate([0, 1], 50, seed=0)) >= 3


# Bad arguments

BAD = {
    "temperature below 0": ({"temperature": -1}, "temperature is -1"),
    "temperature NaN": ({"temperature": math.nan}, "temperature is nan"),
    "temperature inf": ({"temperature": math.inf}, "temperature is inf"),
    "temperature text": ({"temperature": "hot"}, "temperature is 'hot'"),
    "top_k below 0": ({"top_k": -1}, "top_k is -1"),
    "top_k of a half": ({"top_k": 0.5}, "top_k is 0.5"),
    "top_p 0": ({"top_p": 0}, "top_p is 0"),
    "top_p above 1": ({"top_p": 1.01}, "top_p is 1.01"),
    "top_p NaN": ({"top_p": math.nan}, "top_p is nan"),
    "min_p below 0": ({"min_p": -0.1}, "min_p is -0.1"),
    "min_p above 1": ({"min_p": 2}, "min_p is 2"),
    "penalty 0": ({"repetition_penalty": 0}, "repetition_penalty is 0"),
    "max_tokens below 0": ({"max_tokens": -1}, "max_tokens is -1"),
    "max_tokens a float": ({"max_tokens": 2.0}, "max_tokens is 2.0"),
    "seed a float": ({"seed": 0.5}, "seed is 0.5"),
    "empty text": ({"prompt": ""}, "prompt is empty"),
    "no tokens": ({"prompt": []}, "prompt is empty"),
    "an empty row": ({"prompt": ["a", ""]}, "prompt 1 is empty"),
    "no rows": ({"prompt": torch.zeros(0, 3, dtype=torch.int64)}, "no row"),
    "token too large": ({"prompt": [1, 256]}, "token 256, wanted 0 to 255"),
    "token negative": ({"prompt": torch.tensor([[-1]])}, "token -1"),
    "prompt of floats": ({"prompt": [0.5]}, "list of float"),
    "prompt of bools": ({"prompt": [True, False]}, "list of bool"),
    "prompt mixed": ({"prompt": ["a", 1]}, "list of int, str"),
    "prompt None": ({"prompt": None}, "prompt is NoneType"),
    "tensor of floats": ({"prompt": torch.zeros(3)}, "float32"),
    "tensor of rank 3": ({"prompt": torch.zeros(1, 1, 1, dtype=torch.int64)}, r"\(1, 1, 1\)"),
    "stop empty": ({"stop": ""}, "stop holds an empty"),
    "stop holds an empty one": ({"stop": ["a", ""]}, "stop holds an empty"),
    "stop a number": ({"stop": 3}, "stop is 3"),
    "stop of floats": ({"stop": [0.5]}, r"stop is \[0.5\]"),
    "stop beyond the vocabulary": ({"stop": [[300]]}, "stop holds token 300"),
    "eos text": ({"eos": "a"}, "eos is 'a'"),
    "eos beyond the vocabulary": ({"eos": [1, 256]}, "eos holds token 256"),
    "stream of several": ({"prompt": ["a", "b"], "stream": True}, "single prompt"),
    "state of another batch": ({"state": "wide"}, "state holds 2 rows"),
    "state of another depth": ({"state": (None,)}, "2 blocks"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_one_sentence(case):
    settings, told = BAD[case]
    model = writer()
    if settings.get("state") == "wide":
        settings = {"state": model.generate(["a", "b"], 1, return_state=True)[1]}
    with pytest.raises(ValueError, match=told) as raised:
        model.generate(**{"prompt": "a", "max_tokens": 2, **settings})
    assert "\n" not in str(raised.value)


def test_text_wants_a_tokenizer_that_knows_it():
    model = build()
    with pytest.raises(ValueError, match=r"model\.tokenizer is None"):
        model.generate("a")
    with pytest.raises(ValueError, match=r"model\.tokenizer is None"):
        model.generate([1], stop="a")
    model.tokenizer = Characters("abc")
    with pytest.raises(ValueError, match="z"):
        model.generate("abz")


def test_weights_that_are_not_finite_are_told():
    model = build()
    model.head.weight.data[3] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        model.generate([1, 2])


def test_a_plain_state_wants_a_prompt():
    model = build()
    _, layers = model(tokens_of(1, 4))
    with pytest.raises(ValueError, match="prompt is empty"):
        model.generate([], state=layers)
    assert isinstance(model.generate([1], 1, state=layers, return_state=True)[1], GenerationState)
