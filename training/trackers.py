"""Other displays of a run: wandb, TensorBoard, and the loss curve in loss.png."""
import json
import secrets

from common.command_line import UserError
from common.files import atomic_file, write_file


def open_trackers(cfg, path):
    """Return functions (step, values) that write to wandb and TensorBoard, as the settings ask."""
    trackers = []
    if cfg.wandb_log:
        import wandb
        file = path / "wandb_id"  # one id for all parts of a run that was stopped and resumed
        if not file.is_file():
            write_file(file, secrets.token_hex(4))
        try:
            wandb.init(project=cfg.wandb_project, name=path.name, dir=str(path), config=vars(cfg),
                       id=file.read_text(encoding="utf-8"), resume="allow")
        except Exception as e:  # wandb raises errors of many kinds
            raise UserError(f"wandb: {str(e).rstrip('. ')}. WANDB_MODE=offline needs neither login "
                            "nor network") from e
        trackers.append(lambda step, values: wandb.log(values, step=step))
    if cfg.tensorboard:
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(path / "tensorboard")
        trackers.append(lambda step, values: [writer.add_scalar(key, value, step)
                                              for key, value in values.items()])
        trackers.append(lambda step, values: writer.flush())
    return trackers


def plot_losses(out_dir):
    """Draw loss.png from log.jsonl; needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no loss.png: pip install matplotlib")
        return
    lines = (out_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    axes = Figure(figsize=(7, 4), layout="constrained").subplots()
    for key, label in (("loss", "train"), ("val_loss", "val")):
        points = [(e["tokens"], e[key]) for e in entries
                  if {type(e.get(key)), type(e.get("tokens"))} <= {int, float}]
        if points:
            axes.plot(*zip(*points), label=label)
    axes.set(xlabel="tokens", ylabel="loss (nats per token)")
    axes.legend()
    with atomic_file(out_dir / "loss.png") as f:
        axes.figure.savefig(f, format="png", dpi=120)
