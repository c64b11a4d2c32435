"""The scoreboard: every row at toy size, the same samples for all, runs that go on where they stopped, and tables that add up."""

import csv
import json
import math
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from exlstm.bench import compare, contenders, feeds, rows, scoreboard, trial
from exlstm.bench.config import CompareConfig
from exlstm.bench.entrants import MODELS, THEIRS
from exlstm.bench.rows import ROWS, Case
from exlstm.cli import main
from exlstm.models.language import LanguageModel

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 400


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text that serves as any of the three, with its held-out part."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    file.with_name("text.txt.val").write_text(TEXT[::-1])
    return file


@pytest.fixture(autouse=True)
def few_words(monkeypatch):
    monkeypatch.setattr(feeds, "WORDS", 16)
    monkeypatch.setattr(feeds, "ALL_WORDS", 32)
    monkeypatch.setattr(feeds, "AT_ONCE", 1 << 11)
    monkeypatch.setattr(feeds, "VOCABULARY", 300)
    monkeypatch.setattr(feeds, "TOKENS", 1 << 11)
    monkeypatch.setattr(feeds, "ALL_TOKENS", 1 << 12)


def config(tmp_path, **more):
    return CompareConfig(out=tmp_path, device="cpu", at_once=1, **more)


def reads(name):
    return any(case.task in rows.TEXTS for case in ROWS[name].cases)


@pytest.mark.parametrize("name", ROWS)
def test_every_row_runs(name, tmp_path, text, monkeypatch, capsys):
    models = ("xlstm[1:1]", "lstm") if len(ROWS[name].cases) > 3 else ()
    if name not in ("mqar", "tinyshakespeare"):
        monkeypatch.setattr(scoreboard, "_picture", lambda path, *_: path.write_bytes(b"\x89PNG"))
    settings = config(tmp_path, quick=True, models=models, text=text if reads(name) else None)
    table = compare.run(name, settings)
    told = capsys.readouterr().out
    row, folder = compare.chosen(name, settings), tmp_path / f"{name}-quick"
    ours = [model for model in row.models if model not in THEIRS]
    assert {(line["case"], line["model"]) for line in table} >= {(c.name, m) for c in row.cases for m in ours}
    assert all(math.isfinite(line["median"]) and line["parameters"] > 0 for line in table)
    assert all(line["state bytes"] > 0 for line in table if line["model"] in ours)
    assert (folder / "table.md").read_text().count("\n|") == len(table) + 2
    with open(folder / "runs.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(table)
    assert (folder / "table.png").read_bytes().startswith(b"\x89PNG")
    assert not any((folder / "checkpoints").glob("*/step-*"))
    assert "failed" not in told and str(folder / "table.md") in told
    assert compare.run(name, settings) == table
    assert f"{len(table)} runs, {len(table)} of them done" in capsys.readouterr().out


def plan_of(name="state", case=0, model="xlstm[1:1]", steps=20, **more):
    row = replace(rows.toy(ROWS[name]), **more)
    return trial.Plan(row, row.cases[case], model, 1e-3, 0, steps)


def finished(plans, folder, stops=None, texts=None):
    """What `work` tells of these plans, interrupted after so many turns of it, if asked."""
    job = {"device": "cpu", "graphs": True, "threads": 1, "texts": texts or {}, "folder": folder, "at_once": 2}
    waiting, told, turns = list(plans), [], iter(range(10**9))

    def stopped():
        return stops is not None and next(turns) >= stops

    compare.work(
        {**job, "until": math.inf},
        lambda: waiting.pop(0) if waiting else None,
        lambda *message: told.append(message),
        stopped,
    )
    return {key: record for key, _, record in told if record}


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "TURN", 3)
    monkeypatch.setattr(trial.Trial.advance, "__defaults__", (3,))
    plans = [plan_of(), plan_of(case=5, model="lstm")]
    wanted = finished(plans, tmp_path / "whole")
    found, tries = {}, 0
    while len(found) < 2 and tries < 100:
        found |= finished([p for p in plans if p.key not in found], tmp_path / "pieces", stops=3)
        tries += 1
    assert tries > 4
    for key, record in wanted.items():
        assert found[key]["curve"] == record["curve"] and found[key]["scores"] == record["scores"]


def test_processes_find_what_one_process_finds(tmp_path, monkeypatch):
    # Another process knows nothing of the few words here.
    monkeypatch.undo()
    settings = {"quick": True, "cases": ("parity", "even_pairs"), "models": ("lstm",)}
    monkeypatch.setattr(scoreboard, "_picture", lambda *_: None)
    alone = compare.run("state", config(tmp_path / "a", **settings))
    shared = compare.run("state", replace(config(tmp_path / "b", **settings), at_once=2))
    same = ("case", "model", "median", "lr", "parameters")
    key = "case"
    for a, b in zip(sorted(alone, key=lambda r: r[key]), sorted(shared, key=lambda r: r[key]), strict=True):
        assert [a[k] for k in same] == [b[k] for k in same]


def test_a_run_that_fails_is_told_and_tried_again(tmp_path, monkeypatch, capsys):
    settings = config(tmp_path, quick=True, cases=("parity",), models=("lstm", "mamba2"))
    evaluate = trial.Trial.evaluate

    def diverges(self):
        if self.plan.model == "lstm":
            raise FloatingPointError("the loss is nan at step 1")
        evaluate(self)

    monkeypatch.setattr(trial.Trial, "evaluate", diverges)
    assert [line["model"] for line in compare.run("state", settings)] == ["mamba2"]
    told = capsys.readouterr().out
    assert "failed: parity, lstm, lr 0.001, seed 0: FloatingPointError: the loss is nan at step 1" in told
    assert "1 of 2 runs have not ended" in told
    alone = replace(settings, models=("lstm",))
    with pytest.raises(ValueError, match="all 1 runs failed, the first of them by FloatingPointError: the loss is nan"):
        compare.run("state", alone)
    monkeypatch.setattr(trial.Trial, "evaluate", evaluate)
    assert {line["model"] for line in compare.run("state", settings)} == {"lstm", "mamba2"}


def test_what_is_damaged_is_told_and_made_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scoreboard, "_picture", lambda *_: None)
    settings = config(tmp_path, quick=True, cases=("parity",), models=("lstm",), seeds=(0, 1))
    wanted = compare.run("state", settings)
    folder = tmp_path / "state-quick"
    files = [folder / "speeds.json", min((folder / "records").iterdir())]
    for file, damage in zip(files, ('{"a": 1', "null"), strict=True):
        file.write_text(damage)
    capsys.readouterr()
    found = compare.run("state", settings)
    told = capsys.readouterr().out
    assert "2 runs, 1 of them done" in told and all(f"{file} is damaged and is made anew" in told for file in files)
    assert [line["median"] for line in found] == [line["median"] for line in wanted]


def test_a_loss_that_is_not_finite_ends_a_run(tmp_path, monkeypatch):
    plan = plan_of(model="lstm")
    monkeypatch.setattr(trial.Trial, "_work", lambda self, *_: torch.tensor(math.nan))
    (record,) = finished([plan], tmp_path).values()
    assert record["failed"].startswith("FloatingPointError: the loss is nan at step")


def test_all_runs_of_a_case_learn_the_same_rows_whatever_they_are():
    plan = plan_of("mqar", model="lstm")
    case = ROWS["mqar"].cases[0]
    one, other = (feeds.Words(case, 4, 100, seed, "cpu") for seed in (0, 0))
    for step in (0, 5, 17, 3):
        assert all(torch.equal(a, b) for a, b in zip(one.batch(step), other.batch(step), strict=True))
    counts = np.bincount([one.part(step) for step in range(9 * 20)])
    assert (counts == 20 * np.array(case.shares)).all()
    assert all(one.batch(step)[0].shape[1] == case.train[one.part(step)][1] for step in range(9))
    # Blocks are an economy only: far away and back again, the rows are those of the batches one by one.
    words = feeds.Words(plan.case, 4, 100, 0, "cpu")
    rows_there = [words.batch(step)[0].clone() for step in range(40)]
    for step in (700, 0, 39, 17):
        words.batch(step)
    assert all(torch.equal(words.batch(step)[0], rows_there[step]) for step in (0, 17, 39))


def test_tests_ask_words_that_training_never_sees():
    words = feeds.Words(Case("parity", "parity"), 64, 100, 0, "cpu")
    learnt = {tuple(row) for step in range(4) for row in words.batch(step)[0].tolist()}
    asked = []
    for seed in (feeds.CHECK_SEED, feeds.TEST_SEED):
        ((inputs, _, _),) = words._questions((3, 40, 0), 16, seed)
        asked.append({tuple(row) for row in inputs.tolist() if row.index(2) > 20})
        assert asked[-1] and not learnt & asked[-1]
    # Nor does what may end a run ask what is reported.
    assert not asked[0] & asked[1]


def test_a_plan_is_known_by_what_its_figures_depend_on():
    plan = plan_of()
    same = replace(plan, row=replace(plan.row, models=("lstm",), lrs=(1.0,), seeds=(7,), steps=99))
    assert same.key == plan.key
    others = [
        replace(plan, lr=2e-3),
        replace(plan, seed=1),
        replace(plan, steps=21),
        replace(plan, model="lstm"),
        replace(plan, row=replace(plan.row, d_model=32)),
        replace(plan, case=replace(plan.case, grow=5)),
    ]
    assert len({plan.key, *(other.key for other in others)}) == 7


@pytest.mark.parametrize("name", ROWS)
def test_every_model_of_a_row_can_be_built_at_full_size(name):
    row = ROWS[name]
    for model in (m for m in row.models if m not in THEIRS):
        settings = contenders.network(model, row, 256)
        size = contenders.n_parameters(settings)
        if row.match:
            wanted = contenders.n_parameters(contenders.network(row.match, row, 256))
            assert abs(size / wanted - 1) < 0.12, (model, size, wanted)
        kinds = settings.layers()
        if model == "hybrid[3:1]":
            assert abs(kinds.count("attention") / len(kinds) - 0.25) < 0.09
        if model == "xlstm[7:1]":
            assert kinds.count("slstm") >= 1 and kinds.count("mlstm") >= 6


def test_a_row_may_drop_weights_of_attention():
    row = ROWS["tinyshakespeare"]
    for dropout in (0.2, 0.5, 0.0):
        for model, wanted in (("transformer", dropout), ("hybrid[3:1]", dropout), ("xlstm[1:0]", 0.0)):
            settings = contenders.network(model, replace(row, dropout=dropout), 256)
            assert (settings.dropout, settings.attention.dropout) == (dropout, wanted)
    assert contenders.network("transformer", replace(ROWS["enwik8"], dropout=0.2), 256).attention.dropout == 0.0


def test_parameters_are_counted_without_building():
    row = rows.toy(ROWS["hybrid"])
    for model in (*row.models, "xlstm[1:1]", "lstm"):
        settings = contenders.network(model, row, 256)
        assert contenders.n_parameters(settings) == LanguageModel(settings, device="meta").n_parameters()


def test_every_case_has_its_task_and_its_shares():
    for row in ROWS.values():
        assert set(row.models) <= {*MODELS, *THEIRS}
        for case in row.cases:
            assert case.task in (*feeds.TASKS, *rows.TEXTS)
            assert len(case.train) == len(case.shares) and case.test
            assert not case.grow or case.train[0][0] <= case.grow <= case.train[0][1]


def test_the_state_of_attention_grows_and_that_of_xlstm_does_not():
    row = rows.toy(ROWS["state"])
    sizes = {}
    for model in ("xlstm[1:1]", "lstm", "transformer", "mlstm_window"):
        built = contenders.build(model, row.cases[0], row, 3).eval()
        sizes[model] = [contenders.state_size(built, length)["state_bytes"] for length in (8, 64)]
    assert sizes["lstm"] == [2 * 2 * 16 * 4] * 2
    assert sizes["xlstm[1:1]"][0] == sizes["xlstm[1:1]"][1]
    assert sizes["transformer"][1] > 7 * sizes["transformer"][0]


@pytest.mark.parametrize("model", ["transformer", "xlstm[0:1]"])
def test_a_state_is_counted_in_the_precision_of_its_row(model, tmp_path, monkeypatch):
    """Keys and values are half as many bytes in bfloat16, a memory stays in float32."""
    plan = plan_of("enwik8", model=model)
    text = {"enwik8": feeds.Text(*[np.zeros(1000, np.uint8)] * 3, np.ones(256, np.int64), "bits a byte")}
    (full,) = finished([plan], tmp_path / "full", texts=text).values()
    monkeypatch.setattr(trial.Trial, "_precision", lambda _: torch.autocast("cpu", torch.bfloat16))
    (half,) = finished([plan], tmp_path / "half", texts=text).values()
    assert full["state_floats"] == half["state_floats"] > 0
    fewer = 2 * full["state_floats"] if model == "transformer" else 0
    assert half["state_bytes"] == full["state_bytes"] - fewer


def test_a_text_read_in_pieces_loses_nothing(text, monkeypatch):
    row = rows.toy(ROWS["enwik8"])
    whole = feeds.open_text("enwik8", text, text.parent)
    assert [len(part) for part in whole[:3]] == [len(TEXT) * 90 // 100, len(TEXT) * 5 // 100, len(TEXT) * 5 // 100]
    assert b"".join(part.tobytes() for part in whole[:3]).decode() == TEXT
    reading = feeds.Reading(whole, row.cases[0], 4, 0, "cpu")
    inputs, targets = reading.batch(3)
    assert inputs.shape == (4, 64) and torch.equal(inputs[:, 1:], targets[:, :-1])
    assert bytes(inputs[0].tolist()).decode() in TEXT
    for model in ("xlstm[1:1]", "transformer"):
        net = contenders.build(model, row.cases[0], row, 256).eval()
        wanted = reading.test(net, True)
        monkeypatch.setattr(feeds, "PIECE", 10)
        found = reading.test(net, True)
        assert found == pytest.approx(wanted, rel=1e-5)
        assert list(found) == ["validation", "test, context 64", "test, context 64, 4 of it before"]
        assert 7 < found["validation"] < 9
        monkeypatch.undo()


def test_every_token_behind_the_first_window_is_told_once_after_as_many_as_wanted(text):
    whole = feeds.open_text("enwik8", text, text.parent)
    case = replace(rows.toy(ROWS["enwik8"]).cases[0], test=((64, 64, 48),))
    reading = feeds.Reading(whole, case, 4, 0, "cpu")
    net = contenders.build("xlstm[1:1]", case, rows.toy(ROWS["enwik8"]), 256).eval()
    tokens = torch.from_numpy(whole.test[: feeds.ALL_TOKENS + 1]).long()
    nats, last = [], 0
    with torch.no_grad():
        for start in range(0, len(tokens) - 64, 16):
            window = tokens[start : start + 65][None]
            losses, _ = net.read(window[:, :-1], window[:, 1:])
            nats += losses[0, last - start :].tolist()
            last = start + 64
    assert len(nats) == last and last > len(tokens) - 17
    found = reading.test(net, True)["test, context 64, 48 of it before"]
    assert found == pytest.approx(sum(nats) / len(nats) / math.log(2), rel=1e-5)


def test_code_counts_the_bytes_of_its_tokens(text, monkeypatch):
    monkeypatch.setattr(feeds, "VOCABULARY", 300)
    code = feeds.open_text("code", text, text.parent / "cache")
    again = feeds.open_text("code", text, text.parent / "cache")
    assert all(np.array_equal(a, b) for a, b in zip(code[:4], again[:4], strict=True))
    assert code.token_bytes[code.train.view(np.uint16)].sum() == len(TEXT)
    held = np.concatenate((code.validation, code.test)).view(np.uint16)
    assert code.token_bytes[held].sum() == len(TEXT) and len(code.train) < len(TEXT) / 4


def record(model="a", lr=1e-3, seed=0, last=0.9, pace=0.1, **more):
    """The record of a run of ten steps whose score rises evenly."""
    curve = [{"step": s, "loss": 1.0, "scores": {"40–256": last * s / 10}} for s in (5, 10)]
    scores = {"40–256": last, "long": last / 2}
    facts = {"case": "parity", "model": model, "lr": lr, "seed": seed, "equal": "tokens", "d_model": 64, "steps": 10}
    facts |= {"n_layers": 2, "n_heads": 4, "batch": 8}
    return {**facts, "pace": pace, "curve": curve, "scores": scores, "parameters": 7, "state_bytes": 64, **more}


def test_a_table_counts_right():
    row = ROWS["state"]
    ended = [record(seed=s, last=v) for s, v in enumerate((0.5, 0.9, 0.8))]
    ended += [record(lr=1e-2, seed=s, last=v) for s, v in enumerate((0.1, 1.0, 0.2))]
    ended += [record("slow", last=1.0, pace=0.2)]
    first, slow = scoreboard.table(row, ended)
    assert first["steps made"] == 10 and first["failed"] is first["stop at"] is first["stopped early"] is None
    assert (first["lr"], first["median"], first["best"], first["spread"]) == (1e-3, 0.8, 0.9, 0.4)
    assert (first["seeds"], first["runs"], first["long"], first["seconds"]) == (3, 6, 0.4, 1.0)
    assert first["at equal seconds"] == 0.8
    # In the second that the quick ones took, the slow one made half of its steps.
    assert (slow["median"], slow["at equal seconds"], slow["ms a step"]) == (1.0, 0.5, 200.0)


def test_a_failure_is_the_worst_of_the_seeds():
    """A rate at which most seeds fail is not chosen for the one that does not, and a median that failed is none."""
    row = ROWS["state"]
    ended = [record(seed=s, last=v) for s, v in enumerate((0.5, 0.9, 0.8))] + [record(lr=1e-2, last=1.0)]
    lost = [record(lr=1e-2, seed=s, scores=None, failed="FloatingPointError: nan") for s in (1, 2)]
    (line,) = scoreboard.table(row, ended, lost)
    assert (line["lr"], line["median"], line["failed"], line["seeds"]) == (1e-3, 0.8, None, 3)
    (line,) = scoreboard.table(row, ended[3:], lost)
    assert (line["lr"], line["median"], line["best"], line["failed"], line["seeds"]) == (1e-2, None, 1.0, 2, 1)
    lost = [record(seed=3, scores=None, failed="OutOfMemoryError: full")]
    (line,) = scoreboard.table(row, ended[:3], lost)
    assert (line["median"], line["long"], line["failed"], line["spread"]) == (0.65, 0.325, 1, 0.4)


def test_a_failure_and_a_score_that_is_no_number_count_at_equal_seconds_too():
    ended = [record(seed=s, last=v) for s, v in enumerate((0.9, 0.8))]
    lost = [record(seed=s, scores=None, failed="OutOfMemoryError: full") for s in (2, 3)]
    (line,) = scoreboard.table(ROWS["state"], ended, lost)
    assert line["median"] is line["at equal seconds"] is None and line["failed"] == 2
    (line,) = scoreboard.table(ROWS["state"], ended, lost[:1])
    assert line["median"] == line["at equal seconds"] == 0.8
    strange = [record(seed=s, scores={"40–256": 0.9, "long": v}) for s, v in enumerate((0.5, math.nan, 0.7))]
    assert scoreboard.table(ROWS["state"], strange)[0]["long"] == 0.5


def test_schedules_of_equal_seconds_count_whole():
    """Runs of a second say nothing about those of ten, nor does a third of a step that one model has less."""
    ended = []
    for name, pace in (("quick", 0.01), ("slow", 0.03)):
        for seconds in (1, 10):
            steps = round(seconds / pace)
            curve = [{"step": steps * n // 4, "loss": 1.0, "scores": {"40–256": seconds * n}} for n in (1, 2, 3, 4)]
            ended.append(record(name, pace=pace, steps=steps, equal="seconds", curve=curve))
    lines = scoreboard.table(ROWS["state"], ended)
    assert {line["steps"]: line["at equal seconds"] for line in lines} == {100: 4, 1000: 40, 33: 4, 333: 40}


def test_picture_and_head_show_the_rates_of_the_table(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    ended = [record(seed=s, last=v) for s, v in enumerate((0.5, 0.9, 0.8))] + [record(lr=1e-2, last=1.0)]
    lost = [record(lr=1e-2, seed=s, scores=None, failed="FloatingPointError: nan") for s in (1, 2)]
    drawn, draw = [], scoreboard._draw_curve

    def listened(line, group, label):
        drawn.extend(run["lr"] for run in group)
        draw(line, group, label)

    monkeypatch.setattr(scoreboard, "_draw_curve", listened)
    records = {str(i): run for i, run in enumerate([*ended, *lost])}
    (line,) = scoreboard.report(tmp_path, "state", ROWS["state"], [], records, {})
    assert set(drawn) == {line["lr"]} == {1e-3}
    # The row's own grid is another one.
    assert "Learning rates 0.001, 0.01, seeds 0, 1, 2," in (tmp_path / "table.md").read_text()


def test_a_run_whose_score_is_no_number_has_diverged(tmp_path, monkeypatch):
    monkeypatch.setattr(feeds.Reading, "_loss", lambda *_: math.nan)
    text = feeds.Text(*[np.zeros(1000, np.uint8)] * 3, np.ones(256, np.int64), "bits a byte")
    plan = plan_of("enwik8", model="lstm")
    (found,) = finished([plan], tmp_path, texts={"enwik8": text}).values()
    assert found["failed"].startswith("FloatingPointError: the score is nan at step") and found["scores"] is None


def test_validation_reads_the_same_tokens_on_the_way_and_at_the_end():
    """Else the best of a curve, and what stands at equal seconds, would compare one part of the text with another."""
    quarters = np.repeat(np.arange(4, dtype=np.uint8), 1 << 10)
    text = feeds.Text(*[quarters] * 3, np.ones(256, np.int64), "bits a byte")
    feed = feeds.Reading(text, Case("enwik8", "enwik8", train=((64, 64, 0),), test=((64, 64, 0),)), 2, 0, "cpu")

    class Counts:
        def read(self, inputs, targets, state):
            return targets.float(), state

    way, end = feed.test(Counts(), last=False), feed.test(Counts(), last=True)
    assert way["validation"] == end["validation"] < end["test, context 64"]


def test_a_table_says_which_runs_ended_early_and_where(tmp_path):
    row = replace(ROWS["state"], stop_at=0.99)
    early = [{"step": 5, "loss": 1.0, "scores": {"40–256": 1.0}, "last": True}]
    ended = [record(seed=s, stop_at=0.99) for s in (0, 1)] + [record(seed=2, stop_at=0.99, last=1.0, curve=early)]
    ended += [record("slow", last=1.0, pace=0.4, stop_at=0.99, curve=early), record("never")]
    first, slow, never = scoreboard.table(row, ended)
    assert (first["stopped early"], first["steps made"], first["steps"], first["seconds"]) == (1, 10, 10, 1.0)
    assert (slow["stopped early"], slow["steps made"], slow["seconds"], slow["at equal seconds"]) == (1, 5, 2.0, None)
    # A run under another rule stands on a line of its own, in which nothing is said of stops.
    assert never["stop at"] is never["stopped early"] is None and never["steps made"] == 10
    assert [scoreboard._plain(run)["steps made"] for run in ended] == [10, 10, 5, 5, 10]
    told = scoreboard.markdown("state", row, [first, slow, never], {"torch": "1"}, 0, ["parity, lstm: nan"])
    assert "reached 0.99; all tests were made there" in told and "| stopped early | steps made |" in told
    assert told.endswith("Failed:\n\n* parity, lstm: nan\n")
    pytest.importorskip("matplotlib")
    scoreboard._picture(tmp_path / "table.png", row, ended)
    assert (tmp_path / "table.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["state", "groups"])
def test_a_solved_task_ends_its_run(name, tmp_path, monkeypatch):
    plan = plan_of(name, model="lstm", stop_at=ROWS[name].stop_at)
    test = feeds.Words.test

    def solved(self, model, last):
        return dict.fromkeys(test(self, model, last), 1.0)

    monkeypatch.setattr(feeds.Words, "test", solved)
    (found,) = finished([plan], tmp_path).values()
    assert [point["step"] for point in found["curve"]] == [2] and found["curve"][0]["last"]
    assert len(found["scores"]) == len(plan.case.test)


def test_every_run_keeps_where_it_was_made(tmp_path, monkeypatch):
    """Lines of an earlier command are not said to be of this machine."""
    settings = {"quick": True, "cases": ("parity",)}
    monkeypatch.setattr(scoreboard, "_picture", lambda *_: None)
    monkeypatch.setattr(compare.timing, "machine", lambda *_: {"device": "card A", "torch": "1"})
    compare.run("state", config(tmp_path, models=("lstm",), **settings))
    monkeypatch.setattr(compare.timing, "machine", lambda *_: {"device": "card B", "torch": "1"})
    compare.run("state", config(tmp_path, models=("mamba2", "lstm"), **settings))
    with open(tmp_path / "state-quick" / "runs.csv", newline="", encoding="utf-8") as file:
        assert {line["model"]: line["device"] for line in csv.DictReader(file)} == {
            "lstm": "card A",
            "mamba2": "card B",
        }
    assert "device card A; card B, torch 1" in (tmp_path / "state-quick" / "table.md").read_text()


def test_a_model_that_cannot_take_a_case_takes_the_others(tmp_path):
    """Whatever its package raises."""

    class Some:
        def of(self, plan):
            return None if (plan.model, plan.case.name) == ("lstm", "nearest_neighbour") else 0.01

    settings = config(tmp_path, models=("lstm", "mamba2"))
    plans = compare.planned(compare.chosen("memory", settings), settings, Some())
    assert len(plans) == 2 * 3 * 5 and sum(plan.model == "lstm" for plan in plans) == 2 * 3 * 2


def test_whatever_a_model_raises_costs_that_model_alone(tmp_path, monkeypatch, capsys):
    build = contenders.build

    def broken(name, *given, **more):
        return [][1] if name == "lstm" else build(name, *given, **more)

    monkeypatch.setattr(contenders, "build", broken)
    settings = config(tmp_path, quick=True, cases=("parity", "even_pairs"), models=("lstm", "mamba2", "lstm"))
    assert {line["model"] for line in compare.run("state", settings)} == {"mamba2"}
    assert capsys.readouterr().out.count("lstm is left out: list index out of range") == 1
    (record,) = finished([plan_of(model="lstm")], tmp_path / "work").values()
    assert record["failed"] == "IndexError: list index out of range"


def test_runs_of_another_text_are_not_taken_for_done(tmp_path, text, capsys):
    settings = config(tmp_path, quick=True, models=("lstm",), text=text)
    compare.run("enwik8", settings)
    other = tmp_path / "other.txt"
    other.write_text(TEXT.upper())
    with pytest.raises(ValueError, match=r"read another text than .*other.txt; choose another folder with --out"):
        compare.run("enwik8", replace(settings, text=other))


def test_a_text_that_no_run_has_read_does_not_count(tmp_path, text, monkeypatch):
    monkeypatch.setattr(scoreboard, "_picture", lambda *_: None)
    settings = config(tmp_path, quick=True, models=("lstm",), text=text)
    (tmp_path / "short.txt").write_text("ab")
    with pytest.raises(ValueError, match="too short"):
        compare.run("enwik8", replace(settings, text=tmp_path / "short.txt"))
    assert len(compare.run("enwik8", settings)) == 1


def test_a_text_of_the_same_size_is_another_text(tmp_path, text):
    other = tmp_path / text.name
    other.write_text(text.read_text())
    other.with_name("text.txt.val").write_text(TEXT)
    read, held = (feeds.open_text("code", file, tmp_path).test for file in (text, other))
    assert read.tolist() != held.tolist()


def test_every_width_and_dropout_is_a_line_of_its_own(tmp_path):
    settings = config(tmp_path, quick=True, models=("lstm",), cases=("parity",), widths=(8, 16), dropouts=(0.0, 0.5))
    lines = compare.run("state", settings)
    assert [(line["width"], line["dropout"]) for line in lines] == [(8, None), (8, 0.5), (16, None), (16, 0.5)]
    assert len({line["parameters"] for line in lines}) == 2 and all(line["runs"] == 1 for line in lines)


def test_every_optimizer_is_a_line_of_its_own(tmp_path):
    settings = config(tmp_path, quick=True, models=("xlstm[0:1]",), cases=("parity",), widths=(16,))
    compare.run("state", settings)
    lines = compare.run("state", replace(settings, optimizers=("adamw", "muon")))
    assert [(line["optimizer"], line["runs"]) for line in lines] == [("adamw", 1), ("muon", 1)]
    records = [json.loads(path.read_text()) for path in (tmp_path / "state-quick" / "records").glob("*.json")]
    losses = {record["optimizer"]: record["curve"][-1]["loss"] for record in records}
    assert len(records) == 2 and losses["adamw"] != losses["muon"]


def test_a_model_of_other_settings_is_not_taken_for_done(tmp_path, monkeypatch):
    settings = config(tmp_path, quick=True, models=("xlstm[1:1]",), cases=("parity",))
    compare.run("state", settings)
    compare.run("state", settings)
    records = tmp_path / "state-quick" / "records"
    assert len([*records.iterdir()]) == 1
    monkeypatch.setitem(rows.MODELS, "xlstm[1:1]", (("slstm", "matrix"), {}))
    compare.run("state", settings)
    assert len([*records.iterdir()]) == 2
    assert len(json.loads((tmp_path / "state-quick" / "speeds.json").read_text())) == 2


@pytest.mark.parametrize("model", ["transformer", "hybrid[7:1]"])
def test_what_a_row_says_of_attention_is_another_model(model, tmp_path, monkeypatch):
    """Runs of before attention had its own heads, whose records say nothing of them, are neither done nor counted with these."""
    settings = config(tmp_path, quick=True, models=(model, "lstm"), cases=("parity",), seeds=(0,))
    with monkeypatch.context() as before:
        before.setitem(ROWS, "state", replace(ROWS["state"], attention_head=0))
        old = {line["model"]: line for line in compare.run("state", settings)}
        files = sorted((tmp_path / "state-quick" / "records").iterdir())
        for file in files:
            record = json.loads(file.read_text())
            del record["settings"]
            file.write_text(json.dumps(record))
        assert {line["model"]: line["median"] for line in compare.run("state", settings)} == {
            name: line["median"] for name, line in old.items()
        }
    lines = compare.run("state", settings)
    # The LSTM, of which the row says nothing, is the same; attention's old line stands beside the new one.
    assert len(sorted((tmp_path / "state-quick" / "records").iterdir())) == len(files) + 1 == 3
    assert [line["runs"] for line in lines] == [1, 1, 1]
    told = {line["settings"] for line in lines if line["model"] == model}
    assert len(told) == 2 and sum("attention.n_heads 4" in (text or "") for text in told) == 1
    assert len(json.loads((tmp_path / "state-quick" / "speeds.json").read_text())) == 3


@pytest.mark.parametrize("name", ROWS)
def test_attention_has_heads_of_its_own_where_memories_have_one(name):
    row = ROWS[name]
    for width in row.widths or (row.d_model,):
        sized = replace(row, d_model=width)
        for model in ("transformer", "hybrid[7:1]", "mamba2", "mlstm_window"):
            network = contenders.network(model, replace(sized, match=""), 256)
            heads = network.attention.n_heads or network.n_heads
            if "attention" not in network.blocks:
                assert not network.attention.n_heads
            elif row.n_heads == 1:
                assert heads == max(4, width // 32) and width // heads in (16, 32)
            assert network.n_heads == row.n_heads and ("attention" not in network.blocks or width // heads <= 128)
        # Nor does attention see more of a text than it has learnt to, in ours or theirs.
        if reads(name):
            assert rows.settings("transformer", sized)[1]["attention"]["window"] == row.cases[0].train[0][1]
            assert "window" in rows.settings("hybrid[7:1]", sized)[1]["attention"]


@pytest.mark.parametrize(
    ("width", "head", "wanted"),
    [
        (64, 32, 4),
        (128, 32, 4),
        (256, 32, 8),
        (512, 64, 8),
        (16, 32, 4),
        (8, 32, 4),
        (4, 32, 2),
        (2, 32, 1),
        (15, 32, 1),
        (96, 32, 4),
    ],
)
def test_heads_of_attention_divide_the_width(width, head, wanted):
    assert rows.heads(width, head) == wanted


def test_a_table_says_where_the_best_rate_is_the_last_that_ran():
    def line(*rates, failed=()):
        ended = [record(lr=lr, last=last) for lr, last in rates]
        lost = [record(lr=lr, scores=None, failed="nan") for lr in failed]
        return scoreboard.table(ROWS["state"], ended, lost)[0]["lr is"]

    assert line((1e-3, 0.9)) == "the only one" and line((1e-3, 0.9), (3e-3, 0.5)) == "lowest"
    assert line((1e-3, 0.5), (3e-3, 0.9)) == "highest" and line((1e-3, 0.5), (3e-3, 0.9), (1e-2, 0.8)) is None
    assert line((1e-3, 0.5), (3e-3, 0.9), failed=[1e-2]) is None


def test_every_last_learning_rate_is_a_line_of_its_own(tmp_path, text):
    settings = config(tmp_path, quick=True, models=("lstm",), text=text, final_lrs=(0.0, 0.1, 0.5))
    lines = compare.run("enwik8", settings)
    assert [line["final lr"] for line in lines] == [0.0, 0.1, 0.5]
    records = [json.loads(path.read_text()) for path in (tmp_path / "enwik8-quick" / "records").glob("*.json")]
    assert len({record["scores"]["validation"] for record in records}) == 3


@pytest.mark.parametrize(
    "way, values", [("clips", (0.01, 1.0)), ("recurrent_lrs", (0.0, 1.0, 3.0)), ("precisions", ("float32", "bfloat16"))]
)
def test_what_a_row_has_several_of_is_a_line_each_in_table_and_picture(way, values, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    labels, draw = [], scoreboard._draw_curve
    monkeypatch.setattr(
        scoreboard, "_draw_curve", lambda line, group, label: labels.append(label) or draw(line, group, label)
    )
    settings = config(tmp_path, quick=True, models=("slstm-recurrent-2.5", "lstm"), cases=("arithmetic",))
    lines = compare.run("recurrent", replace(settings, **{way: values}))
    told = way[:-1].replace("_", " ")
    assert [line[told] for line in lines] == 2 * list(values)
    assert labels == [f"{line['model']}, {way[:-1]} {line[told]}" for line in lines]
    records = [json.loads(path.read_text()) for path in (tmp_path / "recurrent-quick" / "records").glob("*.json")]
    assert len({record["curve"][-1]["loss"] for record in records}) == (2 if way == "precisions" else 2 * len(values))


def test_a_row_says_how_memories_start_where_a_model_does_not():
    row = ROWS["counting"]
    for model, wanted in {"xlstm[1:0]": ((18.0, 18.0), 0.0), "memory-forget-3-to-6": ((3.0, 6.0), 15.0)}.items():
        built = contenders.network(model, row, 8)
        assert built.blocks == ("mlstm",) and (built.mlstm.forget_bias, built.mlstm.gate_cap) == wanted
    assert contenders.network("transformer", row, 8).mlstm.gate_cap == 15.0
    assert "matrix.gate_cap 0.0" in rows.told(rows.settings("xlstm[1:1]", row)[1])


def test_runs_from_before_a_way_existed_keep_their_names():
    plan = plan_of()
    told = [plan.key, replace(plan, row=replace(plan.row, clips=(), recurrent_lr=1.0)).key]
    assert told[0] == told[1] != replace(plan, row=replace(plan.row, recurrent_lr=3.0)).key
    assert plan.key.endswith("-81e70e30")


@pytest.mark.parametrize("evaluations", [4, 10])
def test_a_row_says_how_often_it_is_evaluated(evaluations, tmp_path):
    plan = plan_of()
    (ended,) = finished([replace(plan, row=replace(plan.row, evaluations=evaluations))], tmp_path).values()
    steps = [point["step"] for point in ended["curve"]]
    assert steps == [plan.steps * n // evaluations for n in range(1, evaluations + 1)]


def test_a_loss_is_better_when_lower_and_counts_where_it_was_best():
    curve = [{"step": s, "loss": 1.0, "scores": {"validation": v}} for s, v in ((5, 1.4), (10, 1.5))]
    ended = [record(curve=curve, scores={"validation": 1.5, "test": 1.6})]
    ended += [
        record(lr=1e-2, curve=[{"step": 10, "loss": 1.0, "scores": {"validation": 1.7}}], scores={"validation": 1.7})
    ]
    (line,) = scoreboard.table(ROWS["tinyshakespeare"], ended)
    assert (line["lr"], line["median"], line["test"]) == (1e-3, 1.4, 1.6)


def test_markdown_names_the_protocol_and_leaves_empty_columns_out():
    lines = scoreboard.markdown("state", ROWS["state"], [{"model": "a", "x": None, "n": 1234}], {"torch": "1"}, 2)
    assert "| model | n |\n| --- | --- |\n| a | 1,234 |" in lines
    assert "2 runs have not ended" in lines and "AdamW β 0.9 and 0.99" in lines
    assert "|" not in scoreboard.markdown("state", ROWS["state"], [], {"torch": "1"}, 2)


def test_equal_seconds_give_the_quicker_more_steps(tmp_path):
    class Known:
        def of(self, plan):
            return {"lstm": 0.01, "xlstm[0:1]": 0.03}.get(plan.model)

    settings = config(tmp_path, models=("lstm", "xlstm[0:1]", "mamba2"), cases=("parity",), minutes_each=0.5)
    plans = compare.planned(compare.chosen("state", settings), settings, Known())
    assert {(p.model, p.steps, p.equal) for p in plans} == {("lstm", 3000, "seconds"), ("xlstm[0:1]", 1000, "seconds")}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_writes_and_ends_as_it_would_have(number, code, tmp_path, monkeypatch, capsys):
    advance = trial.Trial.advance

    def interrupted(self, *count):
        if self.folder.parent.name != "nowhere" and self.step:
            signal.raise_signal(number)
        advance(self, *count)

    monkeypatch.setattr(trial.Trial, "advance", interrupted)
    command = [
        "compare",
        "state",
        "--quick",
        "--cases",
        "parity",
        "--models",
        "lstm",
        "--steps",
        "40",
        "--out",
        str(tmp_path),
    ]
    command += ["--device", "cpu", "--at-once", "1"]
    try:
        assert main(command) == code
    except SystemExit as end:
        assert end.code == code
    assert "1 of 1 runs have not ended" in capsys.readouterr().out
    assert (tmp_path / "state-quick" / "table.md").is_file()
    assert list((tmp_path / "state-quick" / "checkpoints").glob("*/step-*"))
    monkeypatch.setattr(trial.Trial, "advance", advance)
    assert main(command) == 0
    assert "runs have not ended" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["stat"], "unknown row 'stat', did you mean 'state'?"),
        (["state", "--models", "xlstm[0:2]"], "unknown model 'xlstm[0:2]', did you mean 'xlstm[0:1]'?"),
        (["state", "--models", "slstm"], "unknown model 'slstm'; 'xlstm[0:1]' is of such blocks alone"),
        (["state", "--models", "attention"], "unknown model 'attention'; 'transformer' is of such blocks alone"),
        (["state", "--cases", "zzz"], "'bracket_arithmetic', 'bracket_arithmetic, curriculum'"),
        (["enwik8", "--text", "."], ". is a folder, wanted a file with the text of enwik8"),
        (["state", "--cases", "pairity"], "row state has no case 'pairity', did you mean 'parity'?"),
        (["enwik8"], "row enwik8 reads a text, give its file with --text"),
        (["enwik8", "--text", "nowhere.txt"], "there is no file nowhere.txt with the text of enwik8"),
        (["tinyshakespeare", "--text", sys.executable], "is no text in UTF-8"),
        (["state", "--steps", "5", "--minutes-each", "1"], "one of the two fixes a run"),
        (["state", "--steps", "-1"], "steps is -1, wanted at least 0"),
        (["state", "--dropouts", "0.1", "1.5"], "a dropout is 1.5, wanted 0 ≤ dropout < 1"),
        (["state", "--quick", "--minutes", "nan"], "minutes is nan, wanted at least 0"),
        (["state", "--quick", "--minutes-each", "inf"], "minutes_each is inf, wanted at least 0"),
        (["state", "--quick", "--lrs", "0.01", "nan"], "an lr is nan, wanted 0 < lr < ∞"),
        (["state", "--quick", "--lrs", "0"], "an lr is 0.0, wanted 0 < lr < ∞"),
        (["state", "--quick", "--seeds", "3", "-1"], "a seed is -1, wanted 0 ≤ seed"),
        (["state", "--quick", "--seeds", "9223372036854775808"], "a seed is 9223372036854775808, wanted 0 ≤ seed"),
        (["state", "--final-lrs", "2"], "a final_lr is 2.0, wanted 0 ≤ final_lr ≤ 1"),
        (["state", "--clips", "-1"], "a clip is -1.0, wanted 0 ≤ clip < ∞"),
        (["state", "--recurrent-lrs", "inf"], "a recurrent_lr is inf, wanted 0 ≤ recurrent_lr < ∞"),
        (["state", "--precisions", "float16"], "unknown precision 'float16'"),
        (["state", "--optimizers", "moun"], "unknown optimizer 'moun', did you mean 'muon'?"),
        (["state", "--quick", "--widths", "15"], "no model of row state can run so: d_model 15 is not divisible by"),
        (["state", "--step", "1"], "unknown field --step, did you mean --steps?"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *arguments]) == 2
    told = capsys.readouterr().err
    assert sentence in told and told.count("\n") == 1
    assert not list(tmp_path.rglob("*.csv"))


def test_the_rows_are_listed(capsys):
    assert main(["compare"]) == 0
    told = capsys.readouterr().out
    assert all(f"  {name} " in told for name in ROWS)


def test_a_package_that_is_not_here_leaves_its_models_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "xlstm", None)
    table = compare.run("state", config(tmp_path, quick=True, cases=("parity",), models=("lstm", "nx-ai[0:1]")))
    assert [line["model"] for line in table] == ["lstm"]
    assert "nx-ai[0:1] is left out: the package xlstm is not installed" in capsys.readouterr().out
    assert json.loads((tmp_path / "state-quick" / "speeds.json").read_text())


def test_the_outside_control_is_trained(tmp_path, capsys):
    """At its own defaults, by the same optimizer, and not left out in silence."""
    pytest.importorskip("xlstm")
    wanted = config(tmp_path, quick=True, steps=2, cases=("parity",), models=tuple(THEIRS))
    table = compare.run("control", wanted)
    assert [line["model"] for line in table] == [*THEIRS], capsys.readouterr().out
    for path in (tmp_path / "control-quick" / "records").glob("*.json"):
        found = json.loads(path.read_text())
        assert found["scores"] and math.isfinite(found["curve"][-1]["loss"]), found


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["xlstm[1:1]", "xlstm[0:1]", "lstm", "mamba2", "transformer", "mlstm_window"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_graph_learns_what_plain_steps_learn(model, scale, tmp_path):
    plan = plan_of(model=model, steps=40, recurrent_lr=scale)
    curves = []
    for graphs in (True, False):
        feed = feeds.open_feed(plan.case, plan.row.batch, plan.steps, 0, "cuda", {})
        run = trial.Trial(plan, feed, tmp_path / str(graphs), "cuda", graphs)
        while not run.done:
            run.evaluate() if run.due() else run.advance()
        curves.append([point["loss"] for point in run.curve])
        assert bool(run.graphs) == graphs and not run.note
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
