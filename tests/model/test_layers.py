"""Several layers on one input: one matmul gives what each would give, and a layer that is something else is asked itself."""

from __future__ import annotations

import torch

from osler.model.layers import Linear, joint_linear


class Doubled(Linear):
    """Stands for a layer that computes in its own way, such as one converted to FP8."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_joint_layers_equal_single_ones() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8, requires_grad=True)
    for kinds in ((Linear, Linear, Linear), (Linear, Doubled, Linear)):
        layers = [kind(8, size) for kind, size in zip(kinds, (6, 2, 4), strict=True)]
        for layer in layers:
            torch.nn.init.normal_(layer.weight)
        weights = [layer.weight for layer in layers]
        joint, single = joint_linear(x, *layers), [layer(x) for layer in layers]
        torch.testing.assert_close(joint, tuple(single))
        grads = [torch.autograd.grad(sum(out.square().sum() for out in outs), [x, *weights]) for outs in (joint, single)]
        torch.testing.assert_close(*grads)
