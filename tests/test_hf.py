"""Our language model in transformers: padding, beams, caches, Trainer, adapters and pipelines, and the same tokens as ours."""

import copy
import warnings

import pytest
import torch
from torch import nn

from exlstm.data.tokenizer import BPE, Bytes, Characters
from exlstm.models.config import LanguageConfig, MLSTMOptions
from exlstm.models.language import LanguageModel

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

from exlstm import hf  # noqa: E402
from exlstm.hf.cache import CACHE  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
VOCABULARY = 61
KINDS = [("mlstm",), ("slstm", "mlstm_up"), ("attention", "mamba2", "lstm")]
each_kind = pytest.mark.parametrize("blocks", KINDS, ids="+".join)


def build(blocks=("slstm", "mlstm"), seed=0, **settings):
    """Ours, with logits far from flat."""
    torch.manual_seed(seed)
    settings = {"d_model": 32, "n_layers": max(2, len(blocks)), "n_heads": 2, "vocab_size": VOCABULARY, **settings}
    model = LanguageModel(LanguageConfig(blocks=blocks, **settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p) / (p.shape[-1] ** 0.5 if p.ndim > 1 else 1))
        (model.embedding if model.head is None else model.head).weight.normal_(std=0.7)
    return model


def wrapped(blocks=("slstm", "mlstm"), **settings):
    return hf.ExlstmForCausalLM.from_exlstm(build(blocks, **settings))


def tokens_of(*shape, seed=1):
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def write(model, tokens, count=12, **how):
    with torch.no_grad():
        how = {"do_sample": False, "pad_token_id": 0, **how}
        return model.generate(tokens, max_new_tokens=count, **how)[:, tokens.shape[1] :]


# The same network


@each_kind
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_there_and_back(blocks, tied, tmp_path):
    ours, tokens = build(blocks, tie_embeddings=tied), tokens_of(2, 13)
    model = hf.ExlstmForCausalLM.from_exlstm(ours)
    with torch.no_grad():
        wanted = ours(tokens)[0]
        assert torch.equal(model(tokens).logits, wanted)
        model.save_pretrained(tmp_path)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert isinstance(again, hf.ExlstmForCausalLM) and not again.training
        assert torch.equal(again(tokens).logits, wanted)
        assert again.config.language() == ours.config
        back = again.to_exlstm()
        assert torch.equal(back(tokens)[0], wanted) and (back.head is None) == tied
        body = transformers.AutoModel.from_pretrained(tmp_path)
        assert torch.equal(body(tokens).last_hidden_state, ours.hidden(tokens)[0])
    assert back.embedding.weight is again.model.embedding.weight


@each_kind
def test_it_writes_what_ours_writes(blocks):
    ours, tokens = build(blocks), tokens_of(3, 7)
    model = hf.ExlstmForCausalLM.from_exlstm(ours)
    wanted = ours.generate(tokens, 12, temperature=0)
    assert torch.equal(write(model, tokens), wanted)
    assert torch.equal(write(model, tokens, use_cache=False), wanted)
    assert torch.equal(write(model, tokens, cache_implementation="static"), wanted)


def test_sampling_draws_from_the_same_logits():
    ours, tokens = build(), tokens_of(1, 7).expand(400, -1)
    torch.manual_seed(0)
    drawn = write(hf.ExlstmForCausalLM.from_exlstm(ours), tokens, 1, do_sample=True, top_k=0)
    shares = torch.bincount(drawn.flatten(), minlength=VOCABULARY) / 400
    assert (shares - ours(tokens[:1])[0][0, -1].softmax(-1)).abs().max() < 0.08


@each_kind
def test_beam_search_with_a_cache_is_that_without(blocks):
    model, tokens = wrapped(blocks), tokens_of(2, 7)
    how = {"num_beams": 4, "num_return_sequences": 2}
    assert torch.equal(write(model, tokens, **how), write(model, tokens, use_cache=False, **how))


@each_kind
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(blocks, side):
    model, tokens = wrapped(blocks), tokens_of(2, 13)
    mask = torch.ones(2, 13, dtype=torch.long)
    kept = slice(5, None) if side == "left" else slice(0, 8)
    mask[1] = 0
    mask[1, kept] = 1
    with torch.no_grad():
        padded = model(tokens, attention_mask=mask).logits
        alone = model(tokens[1:, kept]).logits
        torch.testing.assert_close(padded[1:, kept], alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(padded[:1], model(tokens[:1]).logits, atol=1e-5, rtol=1e-5)
    if side == "left":
        written = write(model, tokens, attention_mask=mask)
        assert torch.equal(written[1:], write(model, tokens[1:, kept]))
        beams = write(model, tokens, attention_mask=mask, num_beams=3)
        assert torch.equal(beams[1:], write(model, tokens[1:, kept], num_beams=3))


@each_kind
def test_a_prompt_in_pieces_and_a_cache_that_goes_on(blocks):
    model, tokens = wrapped(blocks), tokens_of(2, 13)
    with torch.no_grad():
        whole = model(tokens)
        first = model(tokens[:, :5])
        second = model(tokens[:, 5:], **{CACHE: first[CACHE]})
        parts = torch.cat([first.logits, second.logits], 1)
        torch.testing.assert_close(parts, whole.logits, atol=1e-5, rtol=1e-5)
        assert second[CACHE].get_seq_length() == 13
        # The prompt's cache serves twice.
        held = model(tokens[:, :12], use_cache=True)[CACHE]
        for _ in range(2):
            how = {CACHE: copy.deepcopy(held), "attention_mask": torch.ones(2, 13, dtype=torch.long)}
            assert torch.equal(write(model, tokens, **how), write(model, tokens))
        for name in ("cache", "past_key_values"):
            torch.testing.assert_close(
                model(tokens[:, 12:], **{name: copy.deepcopy(held)}).logits, whole.logits[:, 12:], atol=1e-5, rtol=1e-5
            )
    with pytest.raises(ValueError, match="cannot go back to 3"):
        held.crop(3)
    held.reset()
    assert held.states() is None and held.get_seq_length() == 0
    embedded = model.get_input_embeddings()(tokens)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs_embeds=embedded).logits, whole.logits)
        made = model.generate(inputs_embeds=embedded, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(made, write(model, tokens, 5))


@pytest.mark.parametrize("piece", [1, 4, 13, 50])
def test_generate_may_read_the_prompt_in_pieces(piece):
    """Also behind a cache that has read some of it, and with padding."""
    model, tokens = wrapped(("slstm", "mlstm_up", "attention")), tokens_of(2, 13)
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[1, :3] = 0
    for how in ({}, {"attention_mask": mask}, {"num_beams": 3}):
        assert torch.equal(write(model, tokens, prefill_chunk_size=piece, **how), write(model, tokens, **how))
    with torch.no_grad():
        held = model(tokens[:, :5], attention_mask=mask[:, :5], use_cache=True)[CACHE]
    wanted = write(model, tokens, attention_mask=mask)
    for rest in (tokens, tokens[:, 5:]):
        found = model.generate(
            rest,
            attention_mask=mask,
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            **{CACHE: copy.deepcopy(held)},
        )
        assert torch.equal(found[:, -12:], wanted)


def test_logits_to_keep_and_tuples():
    model, tokens = wrapped(), tokens_of(2, 9)
    with torch.no_grad():
        whole = model(tokens).logits
        torch.testing.assert_close(model(tokens, logits_to_keep=1).logits, whole[:, -1:])
        loss, logits = model(tokens, labels=tokens, return_dict=False, use_cache=False)
    assert loss.ndim == 0 and torch.equal(logits, whole)


@each_kind
def test_documents_in_a_row(blocks):
    """Position 0 begins a document, as a collator tells that packs them; what was before is not seen."""
    model, parts = wrapped(blocks), [tokens_of(1, n, seed=n) for n in (5, 1, 8)]
    collate = transformers.DataCollatorWithFlattening()
    batch = collate([{"input_ids": part[0].tolist(), "labels": part[0].tolist()} for part in parts])
    assert batch["input_ids"].shape == (1, 14)
    told = model(**batch)
    torch.testing.assert_close(told.logits, torch.cat([model(part).logits for part in parts], 1), atol=1e-4, rtol=1e-4)
    losses = [(model(part, labels=part).loss, part.shape[1] - 1) for part in parts if part.shape[1] > 1]
    torch.testing.assert_close(told.loss, sum(loss * n for loss, n in losses) / 11)
    # Positions that count on from padding, or from a cache, begin nothing anew.
    tokens = tokens_of(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    found, wanted = model(tokens, mask, position_ids=places).logits, model(tokens, mask).logits
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=1e-4)
    first = model(tokens[:, :5], position_ids=torch.arange(5)[None])
    then = model(tokens[:, 5:], position_ids=torch.arange(5, 9)[None], **{CACHE: first[CACHE]})
    torch.testing.assert_close(then.logits, model(tokens).logits[:, 5:], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"position_ids have shape \(1, 3\), wanted \(2, 9\)"):
        model(tokens, position_ids=torch.arange(3)[None])


@each_kind
def test_hidden_states(blocks):
    """What goes into every block, and what the head reads; from a cache, in generate, and in every head."""
    ours = build(blocks, out_norm="rms")
    model, tokens, n = hf.ExlstmForCausalLM.from_exlstm(ours), tokens_of(2, 9), ours.config.n_layers
    heard = []
    for block in ours.stack.blocks:
        block.register_forward_pre_hook(lambda _, given: heard.append(given[0]))
    told = model(tokens, output_hidden_states=True)
    assert len(told.hidden_states) == n + 1 and model(tokens).hidden_states is None
    for found, wanted in zip(told.hidden_states, heard[:n], strict=False):
        assert torch.equal(found, wanted)
    assert torch.equal(told.hidden_states[-1], ours.hidden(tokens)[0])
    first = model(tokens[:, :5], output_hidden_states=True)
    then = model(tokens[:, 5:], output_hidden_states=True, **{CACHE: first[CACHE]})
    for parts in zip(first.hidden_states, then.hidden_states, told.hidden_states, strict=True):
        torch.testing.assert_close(torch.cat(parts[:2], 1), parts[2], atol=1e-4, rtol=1e-4)
    written = model.generate(
        tokens, max_new_tokens=3, pad_token_id=0, output_hidden_states=True, return_dict_in_generate=True
    )
    assert [len(step) for step in written.hidden_states] == [n + 1] * 3
    model.config.output_hidden_states = True
    assert len(model.model(tokens, return_dict=False)[-1]) == n + 1
    for head in (hf.ExlstmForSequenceClassification, hf.ExlstmForTokenClassification):
        assert len(head(model.config)(tokens).hidden_states) == n + 1


def test_what_does_not_fit_is_told(tmp_path):
    model, tokens = wrapped(), tokens_of(2, 9)
    # With the sizes of a fresh config every weight would fit.
    LanguageModel(LanguageConfig(logit_cap=2.0)).save_pretrained(tmp_path / "ours")
    for call, told in (
        (lambda: model(), "one of input_ids and inputs_embeds"),
        (lambda: model(tokens, attention_mask=torch.ones(2, 5)), r"attention_mask has shape \(2, 5\), wanted \(2, 9\)"),
        (lambda: model(tokens, attention_mask=torch.ones(2, 1, 9, 9)), "attention_mask has shape"),
        (lambda: model(tokens, past_key_values=transformers.DynamicCache()), "DynamicCache, wanted an ExlstmCache"),
        (lambda: model(tokens, output_attentions=True), "are not offered"),
        (lambda: hf.ExlstmConfig(network={"d_modle": 3}), "did you mean 'd_model'"),
        (lambda: hf.ExlstmForCausalLM.from_pretrained(tmp_path / "ours"), r"which ExlstmForCausalLM.from_exlstm\("),
        (lambda: write(model, tokens[:1], assistant_model=wrapped()), "assist"),
    ):
        with pytest.raises(ValueError, match=told):
            call()


# Training


def test_the_loss_is_ours():
    ours, tokens = build(), tokens_of(2, 9)
    labels = tokens.masked_fill(torch.arange(9) < 3, -100)
    batch = {"input_ids": tokens, "labels": labels}
    torch.testing.assert_close(hf.ExlstmForCausalLM.from_exlstm(ours)(**batch).loss, ours.loss(batch))


class Rows(torch.utils.data.Dataset):
    def __init__(self, labels=None):
        self.labels = labels

    def __len__(self):
        return 16

    def __getitem__(self, i):
        row = tokens_of(12, seed=i)
        return {"input_ids": row, "labels": row if self.labels is None else self.labels(i, row)}


def trained(model, tmp_path, data, **more):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, report_to=[], disable_tqdm=True, use_cpu=True, **more
    )
    before = [p.detach().clone() for p in model.parameters()]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    result = trainer.train()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert result.training_loss > 0
    assert trainer.evaluate()["eval_loss"] > 0
    return moved


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("how", [{}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}], ids=str)
def test_trainer_with_default_settings(how, tmp_path):
    assert all(trained(wrapped(("slstm", "mlstm")).train(), tmp_path, Rows(), **how))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_heads_for_classes(tmp_path):
    network = build().config
    model = hf.ExlstmForSequenceClassification(hf.ExlstmConfig(network=network, num_labels=3, pad_token_id=60))
    assert all(trained(model, tmp_path, Rows(lambda i, row: i % 3)))
    tagger = hf.ExlstmForTokenClassification(hf.ExlstmConfig(network=network, num_labels=2))
    assert all(trained(tagger, tmp_path, Rows(lambda i, row: row % 2)))
    tokens, mask = tokens_of(2, 9).clamp(max=59), torch.ones(2, 9, dtype=torch.long)
    model.eval(), tagger.eval()
    mask[1, 5:] = 0
    alone = model(tokens[1:, :5]).logits
    torch.testing.assert_close(model(tokens, attention_mask=mask).logits[1:], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(tokens.masked_fill(mask == 0, 60)).logits[1:], alone, atol=1e-5, rtol=1e-5)
    found = tagger(
        tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100) % 2 * mask - 100 * (1 - mask)
    )
    torch.testing.assert_close(found.logits[1:, :5], tagger(tokens[1:, :5]).logits, atol=1e-5, rtol=1e-5)
    for labels, problem in ((torch.rand(2, 3), None), (torch.rand(2, 3), "multi_label_classification")):
        model.config.problem_type = problem
        assert model(tokens, labels=labels).loss.isfinite()
    one = hf.ExlstmForSequenceClassification(hf.ExlstmConfig(network=network, num_labels=1))
    assert one(tokens, labels=torch.rand(2)).loss.isfinite()
    model.save_pretrained(tmp_path / "head")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "head")
    torch.testing.assert_close(again(tokens, attention_mask=mask).logits[1:], alone, atol=1e-5, rtol=1e-5)


def test_a_fresh_model_starts_as_ours(tmp_path):
    torch.manual_seed(0)
    network = LanguageConfig(d_model=64, n_layers=2, vocab_size=500)
    model = hf.ExlstmForCausalLM(hf.ExlstmConfig(network=network))
    ours = LanguageModel(network)
    for (name, p), q in zip(model.named_parameters(), [*ours.parameters()], strict=True):
        assert p.std().item() == pytest.approx(q.std().item(), rel=0.15, abs=0.02), name
    assert model.model.stack.blocks[0].mixer.gate.bias[0] == network.mlstm.i_bias
    # A body goes into another head whole, and only the head begins anew.
    model.save_pretrained(tmp_path)
    head = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path, num_labels=4)
    wanted = model.model.state_dict()
    assert all(torch.equal(t, wanted[name]) for name, t in head.model.state_dict().items())
    assert head.score.weight.std() < 0.2 and (head.score.bias == 0).all()


def test_the_vocabulary_can_grow(tmp_path):
    model = wrapped()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again(tokens_of(1, 4)).logits.shape[-1] == 70 and again.to_exlstm().config.vocab_size == 70


# Adapters and pipelines


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("targets", ["all-linear", ["gate"], ["q", "v"], ["up", "out"]], ids=str)
def test_lora_on_our_linears(targets):
    """Every adapter has a gradient, and what it learnt is in the forward, in the single step, and in the merged weights; in
    float64, for adapters of that size make every rounding larger."""
    peft = pytest.importorskip("peft")
    model, tokens = wrapped(("mlstm", "mlstm_up", "slstm"), mlstm=MLSTMOptions(conv=4)), tokens_of(2, 9)
    plain = model.double()(tokens).logits.detach()
    settings = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    lora = peft.get_peft_model(model, settings, autocast_adapter_dtype=False).train()
    with torch.no_grad():
        for name, p in lora.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.3)
    lora(tokens, labels=tokens).loss.backward()
    adapters = [p for name, p in lora.named_parameters() if "lora_" in name]
    assert adapters and all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters)
    lora.eval()
    with torch.no_grad():
        adapted = lora(tokens).logits
        assert not torch.allclose(adapted, plain, atol=1e-3)
        cache, steps = None, []
        for t in range(9):
            output = lora(tokens[:, t : t + 1], use_cache=True, **{CACHE: cache})
            cache = output[CACHE]
            steps.append(output.logits)
        torch.testing.assert_close(torch.cat(steps, 1), adapted, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(lora.merge_and_unload()(tokens).logits, adapted, atol=1e-9, rtol=1e-9)


def bpe():
    return BPE.fit(["one two three four five six seven eight nine ten " * 20], vocab_size=300)


@pytest.mark.parametrize("make", [Bytes, bpe])
def test_a_pipeline_from_text_to_text(make, tmp_path):
    tokenizer = make()
    ours = build(vocab_size=tokenizer.vocab_size)
    ours.tokenizer = tokenizer
    with torch.no_grad():
        ours.head.weight[:32], ours.head.weight[127:256] = -3 * ours.head.weight[32:64], 0
    fast = hf.fast_tokenizer(tokenizer)
    text = "three four: naïve ☃\n\n  two"
    assert fast(text)["input_ids"] == tokenizer.encode(text) and fast.decode(tokenizer.encode(text)) == text
    hf.ExlstmForCausalLM.from_exlstm(ours).save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    pipe = transformers.pipeline("text-generation", model=str(tmp_path), tokenizer=str(tmp_path), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (made,) = pipe("three", max_new_tokens=9, do_sample=False, return_full_text=False)
    assert made["generated_text"] == ours.generate("three", 9, temperature=0)


@pytest.mark.parametrize("make", [Bytes, bpe])
@pytest.mark.parametrize(("text", "byte"), [("\0", 0), ("\n", 10), ("Ċ", 10)])
def test_special_tokens_are_tokens_of_the_model(make, text, byte, tmp_path):
    """Padding has a row in the embedding, and what pads a batch means itself in a text."""
    tokenizer = make()
    hf.fast_tokenizer(tokenizer, pad_token=text).save_pretrained(tmp_path)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(fast) == tokenizer.vocab_size and [fast.pad_token_id] == tokenizer.encode(chr(byte))
    words = ["one Ċ\n", "two\0", "Ā three four"]
    batch = fast(words, padding=True)
    for word, ids, mask in zip(words, batch["input_ids"], batch["attention_mask"], strict=True):
        assert [i for i, m in zip(ids, mask, strict=True) if m] == tokenizer.encode(word)
        assert {i for i, m in zip(ids, mask, strict=True) if not m} <= {fast.pad_token_id}
    with pytest.raises(ValueError, match="pad_token is '<pad>', which is 5 tokens, wanted one of the vocabulary"):
        hf.fast_tokenizer(Bytes(), pad_token="<pad>")


def test_characters_have_no_counterpart():
    with pytest.raises(TypeError, match="Characters, wanted one of bytes"):
        hf.fast_tokenizer(Characters("abc"))


def test_dtypes(tmp_path):
    wrapped().save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.head.weight.dtype == torch.bfloat16
    logits = model(tokens_of(2, 9)).logits
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    assert isinstance(model.model.stack, nn.Module)


@pytest.mark.filterwarnings("ignore::UserWarning")
@each_kind
def test_weights_that_lie_elsewhere_are_fetched(blocks):
    """accelerate keeps the weights, and gives every module that has some a forward that brings them."""
    accelerate, tokens = pytest.importorskip("accelerate"), tokens_of(2, 9)
    model = wrapped(blocks)
    wanted, written = model(tokens).logits, write(model, tokens)
    away = accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    assert all(p.is_meta for p in away.parameters())
    torch.testing.assert_close(away(tokens).logits, wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(write(away, tokens), written)
