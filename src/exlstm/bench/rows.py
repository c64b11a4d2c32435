"""The rows of the scoreboard: what is learnt, what is asked, by which models, under which protocol. Free of torch.

Formal languages as in xLSTM (arXiv 2405.04517, B.1.1): words of 3 to 40 tokens, asked 40 to 256, AdamW (β .9, .99, decay .1), a
tenth of warm-up, cosine; one head of 64, as in the code that was released with it. MQAR as in Zoology (arXiv 2312.04927).
enwik8: 90, 5 and 5 million bytes. tinyshakespeare: nanoGPT's recipe for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from exlstm.bench.entrants import MODELS, THEIRS

# What a row may have several of beside widths, `NAMEs` of Row: each is a line of the table of its own.
WAYS = ("dropout", "optimizer", "final_lr", "clip", "recurrent_lr", "precision")
TEXTS = ("tinyshakespeare", "enwik8", "code")


@dataclass(frozen=True)
class Case:
    """One task of a row: (shortest, longest, items) of the words that are learnt and of those that are asked."""

    name: str
    task: str
    """a name in data.tasks.TASKS, or of a text"""
    train: tuple[tuple[int, int, int], ...] = ((3, 40, 0),)
    shares: tuple[int, ...] = (1,)
    """how often each of `train` is drawn, in relation"""
    test: tuple[tuple[int, int, int], ...] = ((40, 256, 0),)
    """the first is the score; a text: (context, context, tokens of it that are only read)"""
    grow: int = 0
    """a curriculum: the longest words of the first step; they are train's longest after half of the steps. 0: none"""


@dataclass(frozen=True)
class Row:
    """Cases, models, and the protocol that all of them share."""

    about: str
    cases: tuple[Case, ...]
    models: tuple[str, ...]
    steps: int
    batch: int
    lrs: tuple[float, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    d_model: int = 64
    n_layers: int = 2
    n_heads: int = 4
    attention_head: int = 0
    """width of a head of attention, four of them at least; 0: attention has n_heads"""
    window: int = 0
    """tokens that attention sees where the model does not say, no more than it learns from; 0: all before it"""
    drops_weights: bool = False
    """the row's dropout reaches the weights of attention, too"""
    matrix: str = "mlstm_up"
    """the block that "matrix" stands for"""
    memory: tuple[tuple[str, object], ...] = ()
    """settings of that block, where the model says nothing of it"""
    match: str = ""
    """a model whose parameters the others match by their number of layers; empty: all have n_layers"""
    dropout: float = 0.0
    dropouts: tuple[float, ...] = ()
    """several dropouts in place of the one"""
    optimizer: str = "adamw"
    """or muon, for the matrices of the blocks"""
    optimizers: tuple[str, ...] = ()
    """several optimizers in place of the one"""
    final_lrs: tuple[float, ...] = ()
    """several last learning rates, as parts of the highest, in place of the one"""
    clips: tuple[float, ...] = ()
    """several largest norms of the gradient in place of the one; 0: as it is"""
    recurrent_lr: float = 1.0
    """learning rate of recurrent maps over that of all others"""
    recurrent_lrs: tuple[float, ...] = ()
    """several of them in place of the one"""
    precisions: tuple[str, ...] = ()
    """several precisions in place of the one"""
    evaluations: int = 10
    """on the way, evenly; a row whose score is a loss reports the best of them"""
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    final_lr: float = 0.01
    warmup: float = 0.1
    clip: float = 1.0
    precision: str = "float32"
    """on a GPU; a CPU computes in float32"""
    lower: bool = False
    """the score is a loss"""
    stop_at: float = 0.0
    """a run ends where an evaluation on the way reaches this score, as Zoology's do, and all tests are made there; 0: never"""
    widths: tuple[int, ...] = ()
    """several d_model in place of the one"""


def heads(d_model: int, width: int) -> int:
    """Heads of attention about `width` wide, at least four where d_model divides into them; rotary positions want even widths."""
    fitting = (n for n in range(max(4, d_model // width), 1, -1) if d_model % (2 * n) == 0)
    return next(fitting, 1)


def settings(model: str, row: Row) -> tuple[tuple[str, ...], dict[str, dict]] | None:
    """Blocks and settings of a model as a row has it: what the row says of attention beside what the model says.

    None for a model that is not ours. A run is known by these: other settings are another model.
    """
    if model not in MODELS:
        return None
    kinds, options = MODELS[model]
    if row.memory and "matrix" in kinds:
        options = {"matrix": dict(row.memory), **options}
    said = {"n_heads": heads(row.d_model, row.attention_head)} if row.attention_head else {}
    said |= {"window": row.window} if row.window else {}
    said |= {"dropout": row.dropout} if row.drops_weights and row.dropout else {}
    if said and "attention" in kinds:
        options = {**options, "attention": {**said, **options.get("attention", {})}}
    return kinds, options


def told(options: dict[str, dict]) -> str:
    """The settings of the kinds as a line."""
    return ", ".join(
        f"{kind}.{name} {value}" for kind in sorted(options) for name, value in sorted(options[kind].items())
    )


def toy(row: Row) -> Row:
    """The row as a matter of seconds: two steps, small models, words of at most 64 tokens."""

    def short(ends):
        cut = ((min(low, 40 if low < high else 64), min(high, 64), min(items, 4)) for low, high, items in ends)
        return tuple(dict.fromkeys(cut))

    cases = []
    for case in row.cases:
        train = short(case.train)
        shares = case.shares if len(train) == len(case.shares) else (1,) * len(train)
        cases.append(replace(case, train=train, shares=shares, test=short(case.test)))
    sizes = {"d_model": 16, "widths": (), "n_layers": 2, "n_heads": 2, "dropout": 0.0, "dropouts": ()}
    return replace(row, cases=tuple(cases), steps=2, batch=4, lrs=row.lrs[:1], seeds=row.seeds[:1], **sizes)


# A task is solved where an evaluation on the way scores this: of its words hardly one is missed.
SOLVED = 0.9995
RECURRENT = ("xlstm[0:1]", "xlstm[1:1]", "xlstm[1:0]")
PEERS = ("transformer", "mamba2", "lstm")
_MAMBAS = ("mamba2", "mamba2-state-128")
LANGUAGE = ("xlstm[1:0]", "xlstm[7:1]", "xlstm[1:1]", "hybrid[7:1]", "hybrid[3:1]", "mlstm_window", "transformer")
LANGUAGE = (*LANGUAGE, *_MAMBAS, "lstm")
# Where memories have one head attention has its own.
_ONE_HEAD = {"n_heads": 1, "attention_head": 32}


def _languages(*names: str) -> tuple[Case, ...]:
    return tuple(Case(name, name) for name in names)


def _recall(length: int, *items: int) -> tuple[tuple[int, int, int], ...]:
    return tuple((length, length, n) for n in items)


_MQAR = Case(
    "mqar",
    "mqar",
    train=(*_recall(64, 4), *_recall(128, 8), *_recall(256, 16, 32, 64)),
    shares=(5, 1, 1, 1, 1),
    test=(*_recall(256, 64), *_recall(64, 4, 8, 16), *_recall(128, 32), *_recall(512, 128), *_recall(1024, 256)),
)
_TRACKED = ("parity", "even_pairs", "cycle_navigation", "arithmetic")
_TEXT = {
    "betas": (0.9, 0.95),
    "final_lr": 0.1,
    "warmup": 0.02,
    "matrix": "mlstm",
    "match": "transformer",
    "lower": True,
}
_TEXT |= {"precision": "bfloat16", "seeds": (0,), "window": 2048}
_ENWIK8 = Case(
    "enwik8", "enwik8", train=((2048, 2048, 0),), test=((2048, 2048, 0), (2048, 2048, 1536), (32768, 32768, 0))
)
_CODE = Case(
    "code",
    "code",
    train=((2048, 2048, 0),),
    test=((2048, 2048, 0), (4096, 4096, 0), (8192, 8192, 0), (16384, 16384, 0), (32768, 32768, 0)),
)
_SMALL = {"steps": 4000, "batch": 32, "lrs": (1e-3,), "seeds": (0, 1, 2), "d_model": 256, "n_layers": 8, "n_heads": 4}
_ABLATED = (
    *("mlstm", "mlstm_up", "mlstm-conv-all", "mlstm-no-conv", "mlstm-wide-keys", "mlstm-i-bias-0", "mlstm-no-cap"),
    *("mlstm-closed", "mlstm-loud", "mlstm-closed-loud"),
    *("mlstm-sigmoid", "mlstm-no-normaliser", "mlstm-sigmoid-no-normaliser"),
    *("slstm-conv", "xlstm[0:1]", "slstm-dense", "lstm", *_MAMBAS),
)

ROWS = {
    "state": Row(
        "state tracking: regular languages and arithmetic with brackets, uniform lengths and a curriculum to 160",
        (
            *_languages(*_TRACKED, "bracket_arithmetic"),
            Case("bracket_arithmetic, curriculum", "bracket_arithmetic", train=((3, 160, 0),), grow=40),
        ),
        (*RECURRENT, *PEERS),
        steps=10000,
        batch=256,
        lrs=(1e-3, 3e-3, 1e-4),
        d_model=128,
        **_ONE_HEAD,
        precision="bfloat16",
        stop_at=SOLVED,
    ),
    "control": Row(
        "xlstm of NX-AI at its defaults, and ours, under one short protocol",
        _languages(*_TRACKED),
        (*THEIRS, *RECURRENT),
        steps=5000,
        batch=256,
        lrs=(1e-3,),
        seeds=(0,),
        **_ONE_HEAD,
    ),
    "forget": Row(
        "how the forget gates of an sLSTM should start, that it goes on counting in words longer than those it learnt from",
        _languages("cycle_navigation", "arithmetic"),
        ("xlstm[0:1]", "slstm-forget-0", "slstm-forget-2-to-6", "slstm-forget-5-to-5"),
        steps=6000,
        batch=128,
        lrs=(1e-3, 3e-3, 1e-2),
        seeds=(0, 1),
        **_ONE_HEAD,
    ),
    "recurrent": Row(
        "how an sLSTM's recurrent maps should start, and (--recurrent-lrs, --clips, --precisions) learn; a convolution beside",
        _languages("cycle_navigation", "arithmetic"),
        ("xlstm[0:1]", *(f"slstm-recurrent-{size}" for size in ("0", "0.5", "1", "2.5")), "slstm-conv"),
        steps=6000,
        batch=128,
        lrs=(1e-3, 3e-3, 1e-2),
        seeds=(0, 1),
        **_ONE_HEAD,
        precision="bfloat16",
    ),
    "languages": Row(
        "the fifteen formal languages of the xLSTM paper",
        _languages(
            *_TRACKED,
            *("bracket_arithmetic", "solve_equation", "bucket_sort", "missing_duplicate", "majority", "majority_count"),
            *("odds_first", "repetition", "reverse_string", "set", "stack_manipulation"),
        ),
        (*RECURRENT, *PEERS),
        steps=20000,
        batch=256,
        lrs=(1e-3, 3e-3, 1e-2, 1e-4),
        **_ONE_HEAD,
    ),
    "groups": Row(
        "word problems of S3, A5, S5: the running product at every position",
        tuple(Case(name, name, test=((512, 512, 0), (40, 256, 0), (5120, 5120, 0))) for name in ("s3", "a5", "s5")),
        (*RECURRENT, *PEERS),
        steps=12000,
        batch=256,
        lrs=(1e-3, 3e-3, 1e-4),
        d_model=256,
        **_ONE_HEAD,
        precision="bfloat16",
        stop_at=SOLVED,
    ),
    # Nothing is forgotten, so that a count of thousands is as exact as one of ten: gates that start open. Memories are float32.
    "counting": Row(
        "counting: aⁿ bⁿ, majority, majority count, lengths to 128, asked to 2048",
        tuple(
            Case(name, name, train=((3, 128, 0),), test=((128, 2048, 0), (128, 256, 0)))
            for name in ("a_n_b_n", "a_n_b_n_uniform", "majority", "majority_unique", "majority_count")
        ),
        (*RECURRENT, *PEERS),
        steps=10000,
        batch=256,
        lrs=(1e-3, 3e-3),
        matrix="mlstm",
        memory=(("forget_bias", (18.0, 18.0)), ("gate_cap", 0.0)),
        widths=(64, 256),
        precision="bfloat16",
        stop_at=SOLVED,
    ),
    "mqar": Row(
        "associative recall by size of state, Zoology's mixture: accuracy on 64 pairs in 256 tokens, and longer",
        (_MQAR,),
        ("xlstm[1:0]", "xlstm[1:1]", "hybrid[1:1]", "mlstm_window", *PEERS),
        steps=22500,
        batch=256,
        lrs=(1e-3, 3.2e-3, 1e-2, 3.2e-2),
        seeds=(0,),
        n_heads=2,
        precision="bfloat16",
        stop_at=0.99,
        widths=(64, 128, 256),
    ),
    "memory": Row(
        "copying and selective copying of 16 tokens, and the nearest neighbour, trained to 64, asked to 256",
        tuple(
            Case(name, name, train=((32, 64, 0),), test=((64, 256, 0), (32, 64, 0)))
            for name in ("copy", "selective_copy", "nearest_neighbour")
        ),
        (*RECURRENT, "mlstm_window", *PEERS),
        steps=10000,
        batch=128,
        lrs=(1e-3, 3e-3),
        d_model=128,
        precision="bfloat16",
    ),
    "listops": Row(
        "ListOps of the Long Range Arena: nested lists of 500 to 2000 tokens",
        (Case("listops", "listops", train=((500, 2000, 0),), test=((500, 2000, 0),)),),
        (*RECURRENT, *PEERS),
        steps=20000,
        batch=32,
        lrs=(6e-4,),
        seeds=(0,),
        d_model=128,
        n_layers=8,
        precision="bfloat16",
    ),
    "tinyshakespeare": Row(
        "characters, nanoGPT's recipe for a GPU: 6 layers of 384, context 256, best validation loss in nats",
        (Case("tinyshakespeare", "tinyshakespeare", train=((256, 256, 0),), test=((256, 256, 0), (1024, 1024, 0))),),
        tuple(model for model in LANGUAGE if model not in ("xlstm[7:1]", "hybrid[7:1]")),
        steps=5000,
        batch=64,
        lrs=(1e-3,),
        d_model=384,
        n_layers=6,
        n_heads=6,
        dropout=0.2,
        drops_weights=True,
        evaluations=20,
        **_TEXT | {"betas": (0.9, 0.99), "seeds": (0, 1, 2), "window": 256},
    ),
    "enwik8": Row(
        "enwik8, about 40 million parameters, context 2048, test bits a byte",
        (_ENWIK8,),
        LANGUAGE,
        steps=7000,
        batch=32,
        lrs=(1e-3, 2e-3, 5e-4),
        d_model=512,
        n_layers=13,
        n_heads=4,
        **_TEXT,
    ),
    "code": Row(
        "Python source, about 30 million parameters beside the vocabulary, context 2048, held-out packages to 32,768",
        (_CODE,),
        (
            *("hybrid[7:1]", "hybrid[7:1]-early", "hybrid[7:1]-window", "xlstm[7:1]", "xlstm[1:0]", "mlstm_window"),
            *("transformer", *_MAMBAS),
        ),
        steps=6000,
        batch=32,
        lrs=(1e-3,),
        d_model=512,
        n_layers=10,
        n_heads=4,
        **_TEXT,
    ),
    "hybrid": Row(
        "how much attention: mLSTM to attention 1:0, 7:1, 3:1, 1:1, 0:1, and a window beside every memory, on enwik8",
        (_ENWIK8,),
        ("xlstm[1:0]", "hybrid[7:1]", "hybrid[3:1]", "hybrid[1:1]", "transformer", "mlstm_window"),
        **_TEXT | _SMALL,
    ),
    "ablations": Row(
        "what each part of a block is worth, width 256, as many parameters as a Transformer of 8 layers, on enwik8",
        (_ENWIK8,),
        _ABLATED,
        **_TEXT | _SMALL,
    ),
}
