"""What leaves this machine does not say where on it something lay."""

from __future__ import annotations

import pytest

from potluck.files import name_of, without_folders


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/home/ada/texts", "texts"),
        ("/home/ada/runs/garden/model", "garden/model"),
        ("/home/ada/.cache/models--HuggingFaceTB--SmolLM2-135M/snapshots/93efa2f", "HuggingFaceTB/SmolLM2-135M"),
        ("texts/ada", "texts/ada"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("http://localhost:8000/v1#tiny", "http://localhost:8000/v1#tiny"),
    ],
)
def test_names_of_places(path: str, name: str) -> None:
    assert name_of(path) == name


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/home/ada/texts/a.txt: cannot be read", "a.txt: cannot be read"),
        ("path /mnt/x: holds no text", "path x: holds no text"),
        ("[Errno 2] No such file: '/home/ada/a b/c.txt'", "[Errno 2] No such file: 'a b/c.txt'"),
        ("C:\\Users\\ada\\a.txt and ~/b/c.txt", "a.txt and c.txt"),
        ("tls://run.example.org:4222/a/b answers 12/3 times, texts/a.txt", None),
    ],
)
def test_sentences_without_folders(text: str, told: str | None) -> None:
    assert without_folders(text) == (text if told is None else told)
