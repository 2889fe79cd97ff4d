"""Muon: momentum with an orthogonalized direction, for the matrices of the blocks."""
from collections import Counter

import torch


def orthogonalize(g, steps=5):
    """Return about U V^T of each matrix g = U S V^T, (n, rows, columns) float32, by Newton-Schulz.

    Every step multiplies g by a polynomial of g g^T, so all steps work on the smaller of the two
    Gram matrices, and g is multiplied once, at the end. Coefficients:
    https://kellerjordan.github.io/posts/muon
    """
    tall = g.size(-2) > g.size(-1)
    x = g.mT if tall else g
    gram = x @ x.mT
    norm2 = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] + 1e-14
    gram, total = gram / norm2, None
    eye = torch.eye(gram.size(-1), device=g.device)
    for step in range(steps):
        p = 3.4445 * eye - 4.7750 * gram + 2.0315 * (gram @ gram)
        total = p if total is None else p @ total
        gram = p @ gram @ p if step < steps - 1 else None
    x = total @ x / norm2.sqrt()
    return x.mT if tall else x


def orthogonalize_all(matrices):
    """Orthogonalize a list of matrices of one shape. With FSDP each rank holds some rows of every
    matrix: an all-to-all gives it all rows of some matrices, a second one gives them back."""
    if not hasattr(matrices[0], "device_mesh"):
        return orthogonalize(torch.stack(matrices))
    from torch.distributed.tensor import DTensor, Shard
    mesh, shape = matrices[0].device_mesh, (len(matrices), *matrices[0].shape)
    stride = (shape[1] * shape[2], shape[2], 1)
    rows = torch.stack([m.to_local() for m in matrices])  # (n, rows / world_size, columns)
    stack = DTensor.from_local(rows, mesh, [Shard(1)], shape=shape, stride=stride)
    whole = stack.redistribute(placements=[Shard(0)]).to_local()  # (n / world_size, rows, columns)
    done = orthogonalize(whole) if len(whole) else whole
    done = DTensor.from_local(done, mesh, [Shard(0)], shape=shape, stride=stride)
    return done.redistribute(placements=[Shard(1)]).unbind(0)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with an orthogonalized direction, for matrices.

    The update is that of torch.optim.Muon(adjust_lr_fn="match_rms_adamw"): as large as AdamW's, so
    that rates and weight decay compare (arXiv:2502.16982). torch's works matrix by matrix in
    bfloat16, 25 times slower than this on a CPU without bfloat16 instructions. Here matrices of one
    shape are multiplied together in float32, slice_numel elements (or one matrix) at a time.
    """
    slice_numel = 2**24  # orthogonalize holds up to 6.5 times as many floats

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for params in by_shape.values():
                n = max(1, self.slice_numel // params[0].numel())
                n *= params[0].device_mesh.size() if hasattr(params[0], "device_mesh") else 1
                for i in range(0, len(params), n):
                    self.update(params[i:i + n], group)

    def update(self, params, group):
        """Update params, matrices of one shape."""
        directions = []
        for p in params:
            state, grad = self.state[p], p.grad.float()
            if not state:
                state["momentum_buffer"] = torch.zeros_like(grad)
            state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
            directions.append(grad.lerp(state["momentum_buffer"], group["momentum"]))
        step_size = group["lr"] * 0.2 * max(params[0].shape) ** 0.5
        for p, direction in zip(params, orthogonalize_all(directions)):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(direction * step_size)


def muon_bytes(model):
    """Return bytes a step of Muon holds for one slice of matrices of one shape: four of their size
    (directions, their stack, its product, the update) and up to 2.5 Gram matrices."""
    shapes = Counter(p.shape for p in model.blocks.parameters() if p.dim() == 2)
    return max(4 * min(n, max(1, Muon.slice_numel // shape.numel()))
               * (4 * shape.numel() + 5 * min(shape) ** 2 // 2) for shape, n in shapes.items())
