"""Benchmarks: ours beside the peers, each figure from one run."""

# name -> (module with `run(config)`, its settings in `exlstm.bench.config`, one line of help); free of torch
BENCHES = {
    "kernels": ("exlstm.bench.kernels", "KernelsConfig", "the two operators beside nn.LSTM and mlstm_kernels"),
    "mlstm": ("exlstm.bench.mlstm", "MLSTMConfig", "the mLSTM on a GPU beside mlstm_kernels, attention and fla"),
    "decode": (
        "exlstm.bench.decode",
        "DecodeConfig",
        "decoding on a GPU: language models up to 6.9 B beside two peers",
    ),
    "train": (
        "exlstm.bench.train",
        "TrainConfig",
        "training on a GPU: tokens a second over the length, beside two peers",
    ),
    "slstm": ("exlstm.bench.slstm", "SLSTMConfig", "the sLSTM on a GPU beside cuDNN's LSTM and FlashRNN"),
    "training": ("exlstm.bench.training", "TrainingConfig", "forward and backward of the stack in xlstm's README"),
    "decoding": ("exlstm.bench.decoding", "DecodingConfig", "greedy decoding of that stack, milliseconds a token"),
    "parity": ("exlstm.bench.parity", "ParityConfig", "state tracking: parity of strings longer than in training"),
    "quality": ("exlstm.bench.quality", "QualityConfig", "loss on text: nanoGPT's recipe, and the default run"),
    "forecast": (
        "exlstm.bench.forecasting",
        "ForecastingConfig",
        "public forecasting benchmarks, ours beside other libraries",
    ),
}
