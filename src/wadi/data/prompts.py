"""Prompts from a text file, in an order that depends on seed and position alone."""

from __future__ import annotations

from pathlib import Path

import torch

from wadi.errors import WadiError


def read_prompts(path: Path) -> list[str]:
    """The non-empty lines of a UTF-8 text file, stripped.

    Raises:
        WadiError: if the file is missing, is not UTF-8 text, or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise WadiError(
            f"Prompts file {str(path)!r} is not UTF-8 text (byte {error.start}). Expected one prompt a line."
        ) from error
    except OSError as error:
        raise WadiError(f"Prompts file {str(path)!r} cannot be read: {error.strerror}. Expected a text file.") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise WadiError(f"Prompts file {str(path)!r} holds no prompt. Expected one prompt a line.")
    if any("\0" in prompt for prompt in prompts):
        raise WadiError(f"Prompts file {str(path)!r} is binary (it holds NUL bytes). Expected one prompt a line, in UTF-8.")
    return prompts


class PromptOrder:
    """Row indices batch by batch: every epoch a fresh shuffle, a function of ``(seed, epoch)``.

    Position is a count of rows drawn, so a resumed run continues where it stopped without replaying.

    Args:
        count: number of prompts; may be less than a batch.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, self.count)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=generator)
        return int(self._order[offset])

    def rows(self, position: int, batch: int) -> torch.Tensor:
        """Indices of the ``batch`` prompts from ``position`` on, shape ``(batch,)``."""
        return torch.tensor([self._row(position + i) for i in range(batch)], dtype=torch.long)
