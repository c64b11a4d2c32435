"""A LightningModule around our language model: Lightning trains, checkpoints and resumes; ours writes and is saved.

pip install lightning
python examples/train_lightning.py
"""

import tempfile
from pathlib import Path

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

from exlstm import LanguageConfig, LanguageModel
from exlstm.data.tokenizer import Bytes

TEXT = "Once upon a time there was a line, and it was the same line again and again. "


class Writer(lightning.LightningModule):
    def __init__(self, lr: float = 3e-3, **network):
        super().__init__()
        self.save_hyperparameters()
        self.model = LanguageModel(LanguageConfig(**network))
        self.model.tokenizer = Bytes()

    def training_step(self, batch, _):
        loss = self.model.loss(batch[0])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


def main(steps: int = 120, folder: str | None = None) -> float:
    """Trains, resumes from Lightning's checkpoint, and returns the share of bytes that are told right."""
    lightning.seed_everything(0, verbose=False)
    tokens = torch.tensor(Bytes().encode(TEXT * 40)[: 40 * 64]).view(-1, 64)
    loader = DataLoader(TensorDataset(tokens), batch_size=8, shuffle=True)
    folder = Path(folder or tempfile.mkdtemp())
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"default_root_dir": str(folder), "log_every_n_steps": 1}
    writer = Writer(d_model=64, n_layers=2, n_heads=2, blocks=("slstm", "mlstm"))
    first = lightning.Trainer(max_steps=steps // 2, **quiet)
    first.fit(writer, loader)
    first.save_checkpoint(folder / "half.ckpt")
    lightning.Trainer(max_steps=steps, **quiet).fit(writer, loader, ckpt_path=folder / "half.ckpt")
    writer.model.save_pretrained(folder / "model")
    model = LanguageModel.from_pretrained(folder / "model")
    with torch.no_grad():
        right = (model(tokens[:8, :-1])[0].argmax(-1) == tokens[:8, 1:])[:, 16:].float().mean().item()
    print(model.generate("Once upon", 40, temperature=0))
    print(f"bytes told right {right:.3f}")
    return right


if __name__ == "__main__":
    main()
