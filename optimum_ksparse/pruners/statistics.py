"""Running statistics of a layer's inputs, over all calibration tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch

# Rows kept of the inputs, on which a layer's output error is measured after pruning.
SAMPLE_ROWS = 256


class ColumnNorms:
    """Mean squared inputs, [in] float32: ‖X_j‖² / tokens for each input feature j.

    Args:
        in_features: width of the inputs.
        device: where the sums are kept; inputs are reduced where they are.
        expected_tokens: how many rows all updates will bring, so that `sample` is spread evenly over them. None keeps
            the first rows.

    Attributes:
        min_tokens: with fewer rows, the inputs of one expert are better judged by those of all experts of its layer.
            Measured on two Mixtral models (64 and 256 wide, 16 and 8 experts, trained on Korean text): by error on
            other text, own statistics of tokens next to each other won from 8 to 64 rows on with Wanda (mostly 16 to
            32), and from 16 to 128 on with a Gram matrix, for 64 to 512 inputs and with no clear dependence on their
            number.
        num_tokens: rows seen.
        squared_norms: [in] float32, ‖X_j‖² / tokens.
        sample: [≤ 256, in], evenly spread rows of the inputs in their own dtype.
    """

    min_tokens = 32

    def __init__(
        self, in_features: int, device: torch.device | str = "cpu", expected_tokens: int | None = None
    ) -> None:
        self.num_tokens = 0
        self.squared_norms = torch.zeros(in_features, dtype=torch.float32, device=device)
        self._stride = max(1, -(-(expected_tokens or 0) // SAMPLE_ROWS))
        self._rows: list[torch.Tensor] = []

    @classmethod
    def merged(cls, parts: Sequence[Self]) -> Self:
        """Statistics of the rows of all `parts`, at least one, which were made alike."""
        moments = parts[0].averages
        merged = cls(len(moments), moments.device)
        for part in parts:
            total = merged.num_tokens + part.num_tokens
            if part.num_tokens:
                merged.averages.mul_(merged.num_tokens / total).add_(part.averages, alpha=part.num_tokens / total)
            merged.num_tokens = total
        rows = torch.cat([part.sample for part in parts])
        merged._rows = [rows[:: max(1, -(-len(rows) // SAMPLE_ROWS))]]
        return merged

    @property
    def sample(self) -> torch.Tensor:
        if not self._rows:
            return self.squared_norms.new_empty(0, len(self.squared_norms))
        return torch.cat(self._rows)[:SAMPLE_ROWS]

    @property
    def averages(self) -> torch.Tensor:
        """All that is averaged over the tokens, as one tensor."""
        return self.squared_norms

    def take(self, num_tokens: int, sample: torch.Tensor) -> None:
        """Notes that `averages` are now those of `num_tokens` rows, of which `sample` is a part."""
        self.num_tokens, self._rows = num_tokens, [sample]

    def update(self, x: torch.Tensor) -> None:
        """Adds inputs [..., in] of any floating dtype. Samples [batch, tokens, in] are added one by one, so that the
        result does not depend on how they are batched."""
        for rows in x if x.dim() == 3 else [x.reshape(-1, x.shape[-1])]:
            if len(rows):
                self._keep_sample(rows)
                self._accumulate(rows, self.num_tokens + len(rows))
                self.num_tokens += len(rows)

    def _keep_sample(self, rows: torch.Tensor) -> None:
        # The first row kept lies half a stride in, and the phase runs on over updates.
        first = (self._stride // 2 - self.num_tokens) % self._stride
        if self.num_tokens + first < SAMPLE_ROWS * self._stride:
            self._rows.append(rows[first :: self._stride][:SAMPLE_ROWS].clone())

    def _accumulate(self, rows: torch.Tensor, total: int) -> None:
        """Running mean over `total` rows, these included; in the order of Wanda's published code, which it equals bit
        for bit where the rows of a sample are a power of two."""
        squares = torch.linalg.vector_norm(rows.float(), dim=0).square_().to(self.squared_norms.device)
        self.squared_norms.mul_(self.num_tokens / total).add_(squares.div_(total))


class GramMatrix(ColumnNorms):
    """Gram matrix H = XᵀX / tokens, [in, in] float32, whose diagonal is `squared_norms`."""

    min_tokens = 128

    def __init__(
        self, in_features: int, device: torch.device | str = "cpu", expected_tokens: int | None = None
    ) -> None:
        super().__init__(in_features, device, expected_tokens)
        self._gram = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.squared_norms = self._gram.diagonal()
        # H is symmetric: where it is large its upper triangle is summed alone, in four strips of rows, which are
        # five eighths of the work.
        height = -(-in_features // 4) if in_features >= 1024 else in_features
        self._strips = [slice(i, min(i + height, in_features)) for i in range(0, in_features, height)]
        self._is_whole = True

    @property
    def gram(self) -> torch.Tensor:
        if not self._is_whole:
            for strip in self._strips:
                self._gram[strip.stop :, strip] = self._gram[strip, strip.stop :].T
            self._is_whole = True
        return self._gram

    @property
    def averages(self) -> torch.Tensor:
        return self.gram

    def _accumulate(self, rows: torch.Tensor, total: int) -> None:
        rows = rows.to(self._gram.device)
        if rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16):
            # On tensor cores: products of 16-bit numbers are exact in float32, in which they are summed.
            product = torch.mm(rows.T, rows, out_dtype=torch.float32)
            self._gram.mul_(self.num_tokens / total).add_(product, alpha=1 / total)
            return
        rows, keep = rows.float(), self.num_tokens / total
        for strip in self._strips:
            left, right = rows[:, strip], rows[:, strip.start :]
            self._gram[strip, strip.start :].addmm_(left.T, right, beta=keep, alpha=1 / total)
        self._is_whole = len(self._strips) == 1


class CrossMatrix:
    """The other inputs O of a layer beside its inputs X: OᵀX / tokens, [in, in] float32. A layer with the weight W
    that meets O has the outputs Y = OWᵀ, so that YᵀX / tokens = W·OᵀX / tokens.

    Args:
        in_features: width of both inputs.
        device: where the sums are kept.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.num_tokens = 0
        self.matrix = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)

    def update(self, other: torch.Tensor, x: torch.Tensor) -> None:
        """Adds inputs [..., in] of any floating dtype, row by row of the same tokens."""
        left, right = (t.reshape(-1, t.shape[-1]).to(self.matrix.device).float() for t in (other, x))
        if len(left):
            total = self.num_tokens + len(left)
            self.matrix.addmm_(left.T, right, beta=self.num_tokens / total, alpha=1 / total)
            self.num_tokens = total
