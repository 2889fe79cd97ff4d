"""The optimizers of a run, their state in a checkpoint, and the learning-rate schedule."""
import math

import torch

STATE = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}


def configure_optimizers(model, optimizer, learning_rate, muon_lr, weight_decay, betas):
    """Return a list of optimizers of what is not frozen: AdamW for all, or Muon for the blocks'
    matrices and AdamW for the rest; ValueError for another name.

    Weight decay applies to the blocks' matrices only: not to norms, biases, embeddings and an
    untied head. Each group keeps its peak rate as group["peak_lr"], which the schedule scales.
    """
    if optimizer not in ("adamw", "muon"):
        raise ValueError(f"optimizer must be adamw or muon, got {optimizer}")
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2 and p.requires_grad]
    matrix_ids = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in matrix_ids and p.requires_grad]
    groups = [dict(params=rest, weight_decay=0.0)]
    if optimizer == "adamw":
        groups.append(dict(params=matrices, weight_decay=weight_decay))
    fused = model.device.type in ("cuda", "cpu", "mps")
    optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)]
    if optimizer == "muon":
        from training.muon import Muon
        optimizers.append(Muon(matrices, muon_lr, weight_decay))
    for group in (g for opt in optimizers for g in opt.param_groups):
        group["peak_lr"] = group["lr"]
    return optimizers


def load_optimizer_state(optimizer, state, n_steps, ctx):
    """Load momenta and step counts after n_steps steps from whole tensors.

    The settings of the groups (learning rate, weight decay, betas) stay those of this command.
    ValueError: a tensor is missing or has another shape.
    """
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, values in state["state"].items():
        if values.keys() != STATE[type(optimizer).__name__]:
            raise ValueError(f"optimizer state of {', '.join(values)}")
        for name, value in values.items():
            if value.shape != (() if name == "step" else params[i].shape):
                raise ValueError(f"{name} has shape {tuple(value.shape)}")
            if name == "step" and not 1 <= value <= n_steps:
                raise ValueError(f"step {value} of an optimizer after {n_steps} steps")
            # copied, because it may be mapped from the file; AdamW moves its step itself
            values[name] = value.clone() if name == "step" else ctx.place(value, params[i])
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings):
        group.update(own)


def lr_factor(step, cfg):
    """Return the share of the peak rate at a step: linear warm-up, then cosine to min_lr."""
    if step < cfg.warmup_iters:
        return (step + 1) / cfg.warmup_iters
    floor = cfg.min_lr / cfg.learning_rate
    floor = floor if 0 <= floor <= 1 else 0.1  # as the comment on min_lr says
    progress = min(1.0, (step - cfg.warmup_iters) / max(1, cfg.max_iters - cfg.warmup_iters))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
