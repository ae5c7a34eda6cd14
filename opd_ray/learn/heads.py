"""Output layers: the student's, which runs in pieces under its loss, and those of frozen models, loaded alone.

A causal LM is a body that turns tokens into hidden states and a head that turns these into logits. The states are
small (H numbers a token), the logits are not (V), so the student's body hands out states of response tokens only, and
:class:`ResponseModel` leaves it to the loss to ask its head for as many logits at a time as it can hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from opd_ray.errors import InputError
from opd_ray.models.attention import row_bounds, seen_across
from opd_ray.models.heads import LogitTransform, checked_transform

LossOfRows = Callable[[int, torch.Tensor], torch.Tensor]
"""(number of a piece, its logits [n, V]) to that piece's share of the loss."""


Consumer = Callable[[torch.Tensor, "ResponseHead"], torch.Tensor]
"""What the loss of one micro-batch is to the student's head: of states [N, H] and the layer that makes logits of them.
"""


class ResponseHead(torch.nn.Linear):
    """An output layer whose forward pass can hold a whole loss.

    DeepSpeed's ZeRO-3 gathers a module's parameters around its forward and its backward pass. With the loss inside
    they are gathered once each, however many pieces the loss cuts its tokens into, so ranks whose numbers of pieces
    differ still take part in the same collectives.
    """

    consumer: Consumer | None = None
    transform: LogitTransform = LogitTransform()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) if self.consumer is None else self.consumer(hidden, self)

    def sum_losses(self, hidden: torch.Tensor, sizes: Sequence[int], loss: LossOfRows) -> torch.Tensor:
        """Σ loss(i, logits of the i-th piece of ``hidden``), pieces of ``sizes`` rows that make up all of it.

        Logits and whatever a loss computes from them live for one piece only: its gradient is taken at once, and what
        stays for the backward pass is the gradient of ``hidden`` and that of the layer.
        """
        return _SumOfPieces.apply(hidden, self.weight, self.bias, self.transform, tuple(sizes), loss)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, V] float32, with gradient; they stay for the backward pass."""
        return self.transform(torch.nn.functional.linear(hidden, self.weight, self.bias))


class _SumOfPieces(torch.autograd.Function):
    """ResponseHead.sum_losses."""

    @staticmethod
    def forward(
        context: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        transform: LogitTransform,
        sizes: tuple[int, ...],
        loss: LossOfRows,
    ) -> torch.Tensor:
        layer = [
            tensor.detach().requires_grad_(tensor.requires_grad) for tensor in (weight, bias) if tensor is not None
        ]
        trained = [tensor for tensor in layer if tensor.requires_grad]  # none of them beside adapters
        of_hidden = torch.empty_like(hidden)
        of_layer = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in trained]
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for index, (rows, target) in enumerate(zip(hidden.split(sizes), of_hidden.split(sizes), strict=True)):
            states = rows.detach().requires_grad_()
            with torch.enable_grad():
                value = loss(index, transform(torch.nn.functional.linear(states, *layer)))
            of_states, *of_piece = torch.autograd.grad(value, [states, *trained])
            target.copy_(of_states)
            for gradient, part in zip(of_layer, of_piece, strict=True):
                gradient.add_(part)
            total += value.detach()
        context.save_for_backward(of_hidden, *of_layer)
        context.dtype = weight.dtype
        return total.float()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_hidden, *of_layer = context.saved_tensors
        scaled = iter([(part * gradient).to(context.dtype) for part in of_layer])
        of_both = [next(scaled) if needed else None for needed in context.needs_input_grad[1:3]]
        return of_hidden * gradient.to(of_hidden.dtype), *of_both, None, None, None


class ResponseModel(torch.nn.Module):
    """A causal LM that ends in a loss on its response tokens; its [B, T, V] logits never exist."""

    def __init__(self, causal_lm: torch.nn.Module, *, packing: bool = False) -> None:
        """Changes the class of the output layer of ``causal_lm``, which otherwise works as before.

        Raises InputError when body and output layer do not make the model's own logits, and with ``packing`` when
        sequences in a row are not kept apart.
        """
        super().__init__()
        self.causal_lm = causal_lm
        head = causal_lm.get_output_embeddings()
        if type(head) is not torch.nn.Linear and not isinstance(head, ResponseHead):
            raise InputError(
                f"student: the output layer of {type(causal_lm).__name__} is a {type(head).__name__}, expected a "
                "linear layer; use an architecture with a plain lm_head"
            )
        transform = checked_transform(causal_lm, "student")
        if packing and (seen := seen_across(causal_lm)):
            raise InputError(f"learner.packing: {seen}; set learner.packing=false")
        head.__class__ = ResponseHead
        head.transform = transform

    @property
    def vocab_size(self) -> int:
        return self.causal_lm.get_output_embeddings().out_features

    def consume(self, consumer: Consumer) -> None:
        """Sets what the next forward pass ends in. Apart from it, as DeepSpeed looks for tensors in its arguments."""
        self.causal_lm.get_output_embeddings().consumer = consumer

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None, logit_index: torch.Tensor
    ) -> torch.Tensor:
        """What the consumer makes of the states at ``logit_index`` [N] in the flattened ``input_ids`` [B, T].

        Without an attention mask: rows are padded on the right, where causal attention never looks; the sequences of
        a packed row begin where its ``position_ids`` do.
        """
        body = self.causal_lm.base_model
        bounds = {}
        if position_ids is not None:
            bounds = row_bounds(position_ids, self.causal_lm.config._attn_implementation)
        hidden = body(input_ids=input_ids, position_ids=position_ids, use_cache=False, **bounds).last_hidden_state
        head = self.causal_lm.get_output_embeddings()
        try:
            return head(hidden.flatten(0, 1).index_select(0, logit_index))
        finally:
            head.consumer = None
