"""Other libraries' forecasts beside ours: what they are given, and what is said when they do not answer."""

import json
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch

from exlstm.bench import forecast_peers, forecasting
from test_bench import toys

ANSWER = (
    "import json, sys, time, numpy as np, csv; place = sys.argv[2]; s = json.load(open(place + '/settings.json'))\n"
    "rows = list(csv.DictReader(open(place + '/data.csv')))\n"
    "ids = sorted({r['unique_id'] for r in rows}); n = {i: sum(r['unique_id'] == i for r in rows) for i in ids}\n"
    "q = np.stack([np.zeros((s['h'], len(s['levels']))) + s['season'] for _ in ids])\n"
    "took = s['futr'] + s['hist'] if s['model'] == 'nhits' else []\n"
    "assert all(abs(np.mean([float(r[k]) for r in rows])) < 1 for k in s['futr'] + s['hist'])\n"
    "np.savez(place + '/out.npz', quantiles=q, series=np.array(ids), cuts=np.array([n[i] - s['h'] for i in ids]), "
    "covariates=np.array(took, str))\n"
)


def interpreter(folder, name, code) -> str:
    """A stand-in for the peers' interpreter, which runs `code` in place of their script."""
    script, python = folder / f"{name}.py", folder / name
    script.write_text(code)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    python.chmod(0o755)
    return str(python)


def test_a_peer_runs_in_an_environment_of_its_own(tmp_path, capsys):
    """A stand-in interpreter that answers as the script does, one that fails and one that does not end."""
    pytest.importorskip("pandas")
    settings = toys(tmp_path)["forecast"]
    ((task,),) = [forecasting.tasks_of(settings.files[2], settings)]
    good, bad = (
        interpreter(tmp_path, "good", ANSWER),
        interpreter(tmp_path, "bad", "raise SystemExit('no such library')"),
    )
    (row,) = forecasting._theirs(task, replace(settings, peer_python=good), "patchtst")
    truth = [task.panel.y[b - 12 : b] for b in task.panel.offsets[1:]]
    assert row["MAE"] == pytest.approx(sum(abs(y - 12).mean() for y in truth) / 3)
    assert forecasting._theirs(task, replace(settings, peer_python=bad), "nhits") == []
    assert "nhits on m3 failed: no such library" in capsys.readouterr().out
    late = replace(
        settings, peer_python=interpreter(tmp_path, "late", "import time; time.sleep(60)"), peer_minutes=0.01
    )
    assert forecasting._theirs(task, late, "nhits") == []
    assert "nhits on m3 was stopped: not done in 0.01 minutes" in capsys.readouterr().out


def test_a_peer_has_the_covariates_of_the_task_or_its_row_says_that_it_has_none(tmp_path):
    pytest.importorskip("pandas")
    settings = toys(tmp_path)["forecast"]
    settings = replace(settings, peer_python=interpreter(tmp_path, "good", ANSWER))
    for task, role in zip(forecasting.tasks_of(settings.files[1], settings), ("futr", "hist"), strict=True):
        rows, roles = forecasting._peer_rows(task)
        assert {k for k, names in roles.items() if names} == {role}
        (seen,) = task.seen
        for name, column in zip(roles[role], getattr(task.panel, role).T, strict=True):
            assert rows[name][:seen].mean() == pytest.approx(0, abs=1e-9)
            assert rows[name][:seen].std(ddof=0) == pytest.approx(1)
            assert abs(torch.corrcoef(torch.tensor([rows[name].tolist(), column.tolist()]))[0, 1]) > 0.999
        models = [forecasting._theirs(task, settings, peer)[0]["model"] for peer in ("nhits", "dlinear")]
        assert models == ["nhits", "dlinear, no covariates"]


def test_the_script_of_the_peers_hands_covariates_to_models_that_take_them(tmp_path, monkeypatch):
    """A stand-in for neuralforecast, whose forecasts are the truth and whose models tell what they were given."""
    pd = pytest.importorskip("pandas")
    given = {}

    def kind(futr, hist):
        made = type("Kind", (), {"__init__": lambda self, **options: given.update(options)})
        made.EXOGENOUS_FUTR, made.EXOGENOUS_HIST = futr, hist
        return made

    class Fitted:
        def __init__(self, models, freq):
            assert freq == 1

        def cross_validation(self, df, test_size, **_):
            given["columns"] = list(df.columns)
            made = df.groupby("unique_id").tail(test_size)
            ends = {f"Kind-{side}-{p:.1f}": made.y for side in ("lo", "hi") for p in (80, 95)}
            return made.assign(cutoff=made.ds.min() - 1, **{"Kind-median": made.y}, **ends)

    package = {"neuralforecast": {"NeuralForecast": Fitted}, "neuralforecast.losses": {}}
    package["neuralforecast.losses.pytorch"] = {"MQLoss": lambda level: level}
    package["neuralforecast.models"] = {"NHITS": kind(True, True), "DLinear": kind(False, False)}
    for name, content in package.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["neuralforecast"].models = sys.modules["neuralforecast.models"]
    data = pd.DataFrame({"unique_id": "a", "ds": range(40), "y": range(40), "futr0": 1.0, "hist0": 2.0})
    data.to_csv(tmp_path / "data.csv", index=False)
    settings = {"h": 4, "season": 2, "steps": 1, "step": 4, "windows": 1, "val_size": 4, "seed": 0, "raw": False}
    settings |= {"futr": ["futr0"], "hist": ["hist0"], "levels": [0.025, 0.1, 0.5, 0.9, 0.975]}
    for model, taken, raw in (("nhits", ["futr0", "hist0"], False), ("dlinear", [], True)):
        given.clear()
        (tmp_path / "settings.json").write_text(json.dumps(settings | {"model": model, "raw": raw}))
        forecast_peers.main(tmp_path)
        out = np.load(tmp_path / "out.npz")
        assert out["covariates"].tolist() == taken
        assert given["columns"] == ["unique_id", "ds", "y", *taken]
        assert given.get("futr_exog_list", []) + given.get("hist_exog_list", []) == taken
        assert given.get("scaler_type") == ("robust" if raw else None)
        assert out["quantiles"].tolist() == [[[y] * 5 for y in range(36, 40)]]
        assert out["cuts"].tolist() == [36]


def test_the_picture_holds_errors_over_those_of_the_seasonal_naive_forecast():
    none = float("nan")
    rows = [
        {"task": "a", "h": 24.0, "model": m, "MSE": e, "WQL": none} for m, e in (("SeasonalNaive", 2.0), ("xLSTM", 1.0))
    ]
    rows += [
        {"task": "b", "h": 12, "model": m, "MSE": 9.0, "WQL": e} for m, e in (("SeasonalNaive", 0.4), ("nhits", 0.3))
    ]
    rows += [{"task": "a, mean", "h": none, "model": "xLSTM", "MSE": 5.0}]
    drawn = {}

    class Axes:
        def bar(self, places, heights, width, label):
            drawn[label] = heights

        def __getattr__(self, name):
            return lambda *_, **__: None

    forecasting.drawing(rows)(Axes())
    assert drawn == {
        "xLSTM": pytest.approx([0.5, none], nan_ok=True),
        "nhits": pytest.approx([none, 0.75], nan_ok=True),
    }
